"""A tier, and what stands behind it in a test's hands: it writes objects as LMCache does, and harms them."""

import secrets
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import redis
from blake3 import blake3

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Tier
from gateway.kv.tiers.disk import DiskTier
from gateway.kv.tiers.redis import RedisOptions, RedisTier
from gateway.records import PinnedObject
from gateway.stack.trial_tiers import valkey_server
from tests.support.gateway_process import eventually, free_port

STORE = "0123456789ab"
MODEL = "org/some-model"


def key(number: int, *, model: str = MODEL, salt: str = "salt", rank: int = 0x01000100) -> ObjectKey:
    """The key of one chunk."""
    return ObjectKey(model, rank, 0, f"{number:064x}", salt)


def keys(count: int) -> list[ObjectKey]:
    """The keys of a window."""
    return [key(number) for number in range(count)]


def spelled(*those: ObjectKey) -> list[str]:
    """Keys as the store spells them."""
    return [str(one) for one in those]


def value(size: int = 5000) -> bytes:
    """The bytes of one object."""
    return secrets.token_bytes(size)


def lose_text(store: Path, name: str) -> None:
    """Delete a window's text, as older versions did while its session was frozen."""
    with closing(sqlite3.connect(store)) as db:
        db.execute("DROP TRIGGER IF EXISTS windows_keep_their_text")
        db.execute("DELETE FROM links WHERE id IN (SELECT transcript FROM windows WHERE name = ?)", (name,))
        db.commit()


class TierHarness(Protocol):
    """One tier and its storage."""

    @property
    def tier(self) -> Tier:
        """The tier itself."""
        ...

    def checksum(self, value: bytes) -> bytes:
        """The checksum of a pin with these bytes."""
        ...

    def put(self, key: ObjectKey, value: bytes) -> None:
        """Write an object under LMCache's name."""
        ...

    def live(self, key: ObjectKey) -> bytes | None:
        """What LMCache would load."""
        ...

    def lose(self, key: ObjectKey) -> None:
        """Delete LMCache's object behind everybody's back."""
        ...

    def put_pin(self, key: ObjectKey, value: bytes) -> None:
        """Put other bytes in the place of a pin, and leave LMCache's object alone."""
        ...

    def pinned(self, key: ObjectKey) -> bytes | None:
        """The bytes of a pin."""
        ...

    def drop_pin(self, key: ObjectKey) -> None:
        """Take a pin away."""
        ...


async def pinned(rig: TierHarness, count: int) -> tuple[list[bytes], list[PinnedObject]]:
    """Objects of a window, and their pins."""
    values = [value() for _ in range(count)]
    for one, content in zip(keys(count), values, strict=True):
        rig.put(one, content)
    return values, await rig.tier.pin(keys(count), {})


class DiskTierHarness:
    """Two directories."""

    def __init__(self, folder: Path, pins: Path | None = None) -> None:
        self.kv = folder / "kv"
        self.kv.mkdir()
        self.pins = pins or folder / "kv-pins" / STORE
        self.tier = DiskTier(self.kv, self.pins)

    def checksum(self, value: bytes) -> bytes:
        return blake3(value).digest()

    def put(self, key: ObjectKey, value: bytes) -> None:
        _replace(self.kv / key.file_name, value)

    def live(self, key: ObjectKey) -> bytes | None:
        return _read(self.kv / key.file_name)

    def lose(self, key: ObjectKey) -> None:
        (self.kv / key.file_name).unlink()

    def put_pin(self, key: ObjectKey, value: bytes) -> None:
        _replace(self.pins / key.file_name, value)

    def pinned(self, key: ObjectKey) -> bytes | None:
        return _read(self.pins / key.file_name)

    def drop_pin(self, key: ObjectKey) -> None:
        (self.pins / key.file_name).unlink()

    def inodes(self, key: ObjectKey) -> tuple[int, int]:
        """The inodes of an object and of its pin."""
        return (self.kv / key.file_name).stat().st_ino, (self.pins / key.file_name).stat().st_ino

    def flip(self, key: ObjectKey, *, pin: bool = False) -> None:
        """Change one byte in place, as a bad disk does: every link to the file has it."""
        with ((self.pins if pin else self.kv) / key.file_name).open("r+b") as file:
            first = file.read(1)[0]
            file.seek(0)
            file.write(bytes([first ^ 1]))


def redis_tier(
    port: int, store: str = STORE, timeout_s: float = 5, now: Callable[[], float] = time.monotonic, user: str = ""
) -> RedisTier:
    """The tier of a server on this machine."""
    return RedisTier(RedisOptions(url=f"redis://{user}127.0.0.1:{port}"), store, timeout_s, now)


class RedisTierHarness:
    """A database of a redis-server, empty."""

    def __init__(self, port: int, store: str = STORE, timeout_s: float = 5) -> None:
        self.client = redis.Redis(port=port)
        self.client.flushall()
        self._store = store
        self.tier = redis_tier(port, store, timeout_s)

    def checksum(self, value: bytes) -> bytes:
        return blake3(value).digest()

    def put(self, key: ObjectKey, value: bytes) -> None:
        self.client.set(str(key), value)

    def live(self, key: ObjectKey) -> bytes | None:
        return self._get(str(key))

    def lose(self, key: ObjectKey) -> None:
        self.client.delete(str(key))

    def put_pin(self, key: ObjectKey, value: bytes) -> None:
        self.client.set(self._pin(key), value)

    def pinned(self, key: ObjectKey) -> bytes | None:
        return self._get(self._pin(key))

    def drop_pin(self, key: ObjectKey) -> None:
        self.client.delete(self._pin(key))

    def _get(self, name: str) -> bytes | None:
        found = self.client.get(name)
        assert not isinstance(found, str)
        return found

    def _pin(self, key: ObjectKey) -> str:
        return f"cwg:{self._store}:pin:{key}"


class TierServer:
    """The process of a tier's server, on a free port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes]

    def hang(self) -> None:
        """Stop it where it is: connections stay, and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


class RedisServer(TierServer):
    """A Valkey on a free port, which keeps nothing on disk."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__()
        self._folder = folder
        self._options = options

    def start(self) -> "RedisServer":
        """Start it and wait until it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        argv = [str(valkey_server()), *options, *self._options]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as client:
            eventually(lambda: _answers(client), "redis-server answers")
        return self


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs with the bounds in `options`. Raises PermissionError where this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _replace(path: Path, value: bytes) -> None:
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    fresh.write_bytes(value)
    fresh.replace(path)

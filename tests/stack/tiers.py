"""What really lies in the tiers: the files, the keys and the bytes of a window's chunks, past the gateway."""

from collections.abc import Collection
from pathlib import Path

from blake3 import blake3

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway


def hashes(gateway: Gateway, window: str) -> list[str]:
    """The chunk hashes of a window, in order; its text has to be the test's own, or others have them too."""
    status = gateway.http.get(f"/admin/windows/{window}", params={"include_blocks": "true"}).json()
    return [str(block["hash"]) for block in status["blocks"]]


def files(stack: Stack, wanted: Collection[str], *, pins: bool | None = None) -> list[Path]:
    """Objects and pins of these chunks on disk; only pins, or only LMCache's own, where asked."""
    live = [stack.kv_dir.glob("*.data")] if pins is not True else []
    held = [(stack.plan.data_dir / "kv-pins").glob("*/*.data")] if pins is not False else []
    return sorted(file for found in (*live, *held) for file in found if file.name.split("@")[3] in wanted)


def names(stack: Stack, wanted: Collection[str]) -> list[bytes]:
    """Objects and pins of these chunks in Redis."""
    found = stack.redis.scan_iter("*@*", count=10**5)
    return sorted(name for name in found if name.decode().split("@")[-2] in wanted)


def contents(stack: Stack, wanted: Collection[str]) -> dict[str, bytes]:
    """A digest of every object and pin of these chunks, in each tier."""
    disk = {str(file): blake3(file.read_bytes()).digest() for file in files(stack, wanted)}
    return disk | {n.decode(): blake3(stack.redis.get(n) or b"").digest() for n in names(stack, wanted)}


def stored_bytes(stack: Stack, wanted: Collection[str]) -> int:
    """Bytes that they take: on disk an inode once, in Redis each key."""
    stats = [file.stat() for file in files(stack, wanted)]
    disk = {stat.st_ino: stat.st_size for stat in stats}
    return sum(disk.values()) + sum(int(stack.redis.strlen(name)) for name in names(stack, wanted))

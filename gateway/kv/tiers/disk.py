"""LMCache's `fs` tier: one file per object in a flat directory. A pin is a hard link in a directory of ours.

LMCache writes to a temporary name and renames (`fs_l2_adapter.py`), so a file that is there is whole; it never
rewrites a file in place, so the link and the original share their bytes until one of them is removed. There is no
checksum and no header in the file, and a right-sized file with wrong bytes would be loaded: hence ours.
"""

import asyncio
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from gateway.kv.keys import ObjectKey, file_names
from gateway.kv.tiers.base import Restored, Stored, TierFull, TierUnavailable
from gateway.records import PinnedObject

Item = TypeVar("Item")
T = TypeVar("T")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK})
_UNREADABLE = frozenset({errno.EIO, errno.EBADMSG})  # a bad sector, or one that fails its file system's checksum
_BLOCK = 2**20
_THREADS = 4  # hashing and reading overlap; more only fight over the disk


class DiskTier:
    """The disk tier as the gateway sees it: `kv_dir` is LMCache's, `pins_dir` is ours."""

    name = "disk"
    adapter = "fs"

    def __init__(self, kv_dir: Path, pins_dir: Path) -> None:
        self._kv = kv_dir
        self._pins = pins_dir
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk-tier")

    async def __aenter__(self) -> "DiskTier":
        """Make the pins' directory. Raises TierUnavailable."""
        await self._run(self._open)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def resting(self) -> bool:
        """See `Tier.resting`."""
        return False

    async def sizes(self, names: Sequence[str]) -> list[int]:
        """See `Tier.sizes`."""
        return await self._run(lambda: _sizes(self._kv, file_names(names)))

    async def pin(self, keys: Sequence[ObjectKey], known: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        """See `Tier.pin`."""
        pinned = await self._each(keys, lambda key: self._pin(key, known.get(str(key))))
        await self._run(lambda: _sync_directory(self._pins))
        return [p for p in pinned if p is not None]

    async def restore(self, objects: Sequence[PinnedObject]) -> list[Restored]:
        """See `Tier.restore`."""
        return await self._each(objects, self._restore)

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        """See `Tier.expose_pin`."""
        await self._each(objects, self._lend)

    async def verify(self, objects: Sequence[PinnedObject]) -> list[Restored]:
        """See `Tier.verify`."""
        return await self._each(objects, self._verify)

    async def read(self, item: PinnedObject) -> bytes | None:
        """See `Tier.read`."""
        return await self._run(lambda: _read(self._paths(item)[1], item))

    async def put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        """See `Tier.put`."""
        return await self._run(lambda: self._put(key, value))

    async def unpin(self, keys: Iterable[ObjectKey]) -> int:
        """See `Tier.unpin`."""
        return sum(await self._each([self._pin_path(key) for key in keys], _unlink))

    async def remove(self, keys: Iterable[ObjectKey]) -> int:
        """See `Tier.remove`."""
        # Both links of a key one after the other: side by side, each would see the other and free nothing.
        return sum(await self._each(list(keys), lambda key: _unlink(self._live(key)) + _unlink(self._pin_path(key))))

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        """See `Tier.drop_original`."""
        await self._each([self._live(key) for key in keys], _unlink)

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        """See `Tier.keys_with_salt`."""
        wanted = frozenset(salts)
        return await self._run(lambda: {key for key in self._named() if key.salt in wanted})

    async def inventory(self) -> list[Stored]:
        """See `Tier.inventory`."""
        return await self._run(self._inventory)

    async def free(self) -> int | None:
        """See `Tier.free`."""
        return await self._run(lambda: shutil.disk_usage(self._kv).free)

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        """See `Tier.sweep`."""
        names = {key.file_name for key in keep}
        stray = await self._run(lambda: [path for path in self._pins.iterdir() if path.name not in names])
        await self._each(stray, _unlink)
        return len(stray)

    def _named(self) -> Iterator[ObjectKey]:
        for folder in (self._kv, self._pins):
            with os.scandir(folder) as entries:
                yield from filter(None, (ObjectKey.parse_file_name(entry.name) for entry in entries))

    def _inventory(self) -> list[Stored]:
        lives, pins = _stats(self._kv), _stats(self._pins)
        seen: set[tuple[int, int]] = set()  # an isolated clone's objects are links to pins that go by other names
        return [_stored(key, lives.get(key), pins.get(key), seen) for key in (pins | lives)]

    def _open(self) -> None:
        self._pins.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _live(self, key: ObjectKey) -> Path:
        return self._kv / key.file_name

    def _pin_path(self, key: ObjectKey) -> Path:
        return self._pins / key.file_name

    def _paths(self, item: PinnedObject) -> tuple[Path, Path]:
        """Where LMCache has an object, and where its pin is."""
        live, pin = file_names((item.key, item.pin_key))
        return self._kv / live, self._pins / pin

    def _pin(self, key: ObjectKey, known: PinnedObject | None) -> PinnedObject | None:
        live, pin = self._live(key), self._pin_path(key)
        if known is not None and _matches(pin, known):
            return known
        if known is not None and _same_file(pin, live):
            live.unlink(missing_ok=True)  # the damaged bytes are LMCache's too
        if known is not None:
            pin.unlink(missing_ok=True)  # damaged
        try:
            self._link_over(live, pin)
        except FileNotFoundError:
            if not pin.exists():  # else it is of a freeze that is about to commit, and LMCache has lost its own since
                return None
        with pin.open("rb") as file:
            os.fsync(file.fileno())  # LMCache does not; a power cut must not turn "frozen" into a false word
        return PinnedObject(str(key), self.name, pin.stat().st_size, _checksum(pin))

    def _restore(self, item: PinnedObject) -> Restored:
        live, pin = self._paths(item)
        pin_good = _matches(pin, item)
        live_good = pin_good if _same_file(pin, live) else _matches(live, item)
        if pin_good and live_good:
            return Restored.INTACT
        if pin_good:
            self._link_over(pin, live)
            return Restored.RELINKED
        if live_good:
            self._link_over(live, pin)
            return Restored.INTACT
        found = pin.exists() or live.exists()
        live.unlink(missing_ok=True)
        pin.unlink(missing_ok=True)
        return Restored.CORRUPT if found else Restored.MISSING

    def _lend(self, item: PinnedObject) -> None:
        live, pin = self._paths(item)
        with suppress(FileNotFoundError):  # the pin is gone: there is nothing to be found
            self._link_over(pin, live)

    def _link_over(self, source: Path, target: Path) -> None:
        """Make `target` a link to `source` in one step, so that a reader sees the old file or the new one."""
        fresh = self._pins / f"{secrets.token_hex(8)}.link"  # here, where the next sweep finds it if we die
        fresh.hardlink_to(source)
        fresh.replace(target)
        fresh.unlink(missing_ok=True)  # a rename onto another link of the same file does nothing

    def _put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        fresh = self._pins / f"{secrets.token_hex(8)}.put"  # here, where the next sweep finds it if we die
        try:
            with fresh.open("xb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._pin_path(key))
        finally:
            fresh.unlink(missing_ok=True)
        _sync_directory(self._pins)
        return PinnedObject(str(key), self.name, len(value), blake3(value).digest())

    def _verify(self, item: PinnedObject) -> Restored:
        _, pin = self._paths(item)
        if not pin.exists():
            return Restored.MISSING
        return Restored.INTACT if _matches(pin, item) else Restored.CORRUPT

    async def _each(self, items: Sequence[Item], work: Callable[[Item], T]) -> list[T]:
        """Do `work` on every item, in slices side by side; order is kept."""
        step = -(-len(items) // _THREADS) or 1
        slices = [items[i : i + step] for i in range(0, len(items), step)]
        # All of them end before one's failure is told: who hears of it lets go of the lock.
        done = await asyncio.gather(*(self._run(partial(_map, work, part)) for part in slices), return_exceptions=True)
        for part in done:
            if isinstance(part, BaseException):
                raise part
        return [result for part in done if not isinstance(part, BaseException) for result in part]

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            kind = TierFull if error.errno in _FULL else TierUnavailable
            raise kind(f"disk tier: {error.strerror} ({error.filename2 or error.filename or self._kv})") from error


def _stats(folder: Path) -> dict[ObjectKey, os.stat_result]:
    found: dict[ObjectKey, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            key = ObjectKey.parse_file_name(entry.name)
            if key is not None:
                with suppress(FileNotFoundError):  # removed since
                    found[key] = entry.stat()
    return found


def _stored(
    key: ObjectKey, live: os.stat_result | None, pin: os.stat_result | None, seen: set[tuple[int, int]]
) -> Stored:
    files = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (live, pin) if stat is not None}
    size = sum(size for inode, size in files.items() if inode not in seen)
    seen.update(files)
    return Stored(key, live.st_size if live else 0, pin.st_size if pin else 0, size)


def _map(work: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    return [work(item) for item in items]


def _unlink(path: Path) -> int:
    """Remove a file; return the bytes that this frees, none while another link holds them."""
    try:
        stat = path.stat()
        path.unlink()
    except FileNotFoundError:
        return 0
    return stat.st_size if stat.st_nlink == 1 else 0


def _sizes(folder: Path, names: Sequence[str]) -> list[int]:
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # LMCache makes it
        return [0] * len(names)
    try:  # thousands are one call's work: from the folder on, the kernel has less of a path to walk for each
        return [os.stat(name, dir_fd=fd).st_size for name in names]
    except FileNotFoundError:  # seldom: most often all are there
        return [_size(name, fd) for name in names]
    finally:
        os.close(fd)


def _size(name: str, folder: int) -> int:
    try:
        return os.stat(name, dir_fd=folder).st_size
    except FileNotFoundError:
        return 0


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except FileNotFoundError:
        return False


def _matches(path: Path, item: PinnedObject) -> bool:
    try:
        return path.stat().st_size == item.size and _checksum(path) == item.checksum
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return False


def _read(path: Path, item: PinnedObject) -> bytes | None:
    try:
        value = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return None
    return value if len(value) == item.size and blake3(value).digest() == item.checksum else None


def _checksum(path: Path) -> bytes:
    """The blake3 of a file. Not by `mmap`: a file truncated meanwhile, or a bad sector, would kill the process."""
    digest, block = blake3(), bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.digest()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

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
from typing import Final, TypeVar

from blake3 import blake3

from gateway.kv.keys import ObjectKey, file_names
from gateway.kv.tiers.base import ObjectState, Stored, TierFull, TierUnavailable
from gateway.kv.tiers.mounts import MOUNTINFO, mount_of, nfs_risk
from gateway.records import PinnedObject
from gateway.runtime import own_process

Item = TypeVar("Item")
T = TypeVar("T")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK})
_UNREADABLE = frozenset({errno.ENOENT, errno.EIO, errno.EBADMSG})  # missing, or damaged on the disk
_BLOCK = 2**20
_THREADS = 4  # hashing and reading overlap; more would only compete for the disk


class DiskTier:
    """The disk tier as the gateway sees it: `kv_dir` is LMCache's, `pins_dir` is ours."""

    name = "disk"
    adapter = "fs"
    checksum: Final = "blake3"
    lists = True

    def __init__(self, kv_dir: Path, pins_dir: Path) -> None:
        self._kv = kv_dir
        self._pins = pins_dir
        self._writer = own_process.tag(own_process.identity())
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk-tier")

    async def __aenter__(self) -> "DiskTier":
        """Create the pins' directory. Raises TierUnavailable."""
        await self._run(lambda: self._pins.mkdir(parents=True, exist_ok=True, mode=0o700))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def suspended(self) -> bool:
        return False

    async def sizes(self, names: Sequence[str], *, lately: bool = False) -> list[int]:
        return await self._run(lambda: _sizes(self._kv, file_names(names)))

    async def pin(self, keys: Sequence[ObjectKey], existing: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        pinned = await self._each(keys, lambda key: self._pin(key, existing.get(str(key))))
        await self._run(lambda: _sync_directory(self._pins))
        return [p for p in pinned if p is not None]

    async def check_and_restore(self, objects: Sequence[PinnedObject]) -> list[ObjectState]:
        return await self._each(objects, self._check_and_restore)

    async def expose_pin(self, objects: Sequence[PinnedObject]) -> None:
        await self._each(objects, self._expose)

    async def verify(self, objects: Sequence[PinnedObject], *, deep: bool = False) -> list[ObjectState]:
        return await self._each(objects, self._verify)

    async def read(self, item: PinnedObject) -> bytes | None:
        return await self._run(lambda: _read(self._paths(item)[1], item))

    async def put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        return await self._run(lambda: self._put(key, value))

    async def unpin(self, keys: Iterable[ObjectKey]) -> int:
        return sum(await self._each([self._pin_of(key) for key in keys], _unlink))

    async def remove(self, keys: Iterable[ObjectKey]) -> int:
        # One link of a key after the other: in parallel each would see the other, and count nothing as freed.
        return sum(await self._each(list(keys), lambda k: _unlink(self._original_of(k)) + _unlink(self._pin_of(k))))

    async def drop_original(self, keys: Iterable[ObjectKey]) -> None:
        await self._each([self._original_of(key) for key in keys], _unlink)

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        wanted = frozenset(salts)
        return await self._run(
            lambda: {key for folder in (self._kv, self._pins) for key, _ in _scan(folder) if key.salt in wanted}
        )

    async def inventory(self) -> list[Stored]:
        return await self._run(self._inventory)

    async def free(self) -> int | None:
        return await self._run(lambda: shutil.disk_usage(self._kv).free)

    async def sweep(self, keep: Collection[ObjectKey]) -> int:
        names = {key.file_name for key in keep}
        stray = await self._run(lambda: [path for path in self._pins.iterdir() if path.name not in names])
        await self._each(stray, _unlink)
        return len(stray)

    async def writers(self) -> set[str]:
        return {writer for _, writer in await self._run(lambda: list(_unfinished(self._pins)))}

    async def discard_unfinished(self, writers: Collection[str]) -> None:
        found = await self._run(lambda: [path for path, writer in _unfinished(self._pins) if writer in writers])
        await self._each(found, _unlink)

    async def risks(self) -> list[str]:
        risk = await self._run(lambda: nfs_risk(mount_of(self._kv, MOUNTINFO.read_text())))
        return [f"disk tier: {risk}"] if risk else []

    def _inventory(self) -> list[Stored]:
        originals, pins = _stats(self._kv), _stats(self._pins)
        counted: set[tuple[int, int]] = set()  # an isolated clone's objects are links to pins with other names
        return [_stored(key, originals.get(key), pins.get(key), counted) for key in (pins | originals)]

    def _original_of(self, key: ObjectKey) -> Path:
        return self._kv / key.file_name

    def _pin_of(self, key: ObjectKey) -> Path:
        return self._pins / key.file_name

    def _paths(self, item: PinnedObject) -> tuple[Path, Path]:
        """Where LMCache has an object, and where its pin is."""
        original, pin = file_names((item.key, item.pin_key))
        return self._kv / original, self._pins / pin

    def _pin(self, key: ObjectKey, existing: PinnedObject | None) -> PinnedObject | None:
        original, pin = self._original_of(key), self._pin_of(key)
        if existing is not None and _matches(pin, existing):
            return existing
        if existing is not None and _same_file(pin, original):
            original.unlink(missing_ok=True)  # LMCache has the damaged bytes too
        if existing is not None:
            pin.unlink(missing_ok=True)
        try:
            self._link_over(original, pin)
        except FileNotFoundError:
            if not pin.exists():  # else a freeze that is about to commit has made it, and LMCache has lost its own
                return None
        with pin.open("rb") as file:
            os.fsync(file.fileno())  # LMCache does not; "frozen" must survive a power cut
        return PinnedObject(str(key), self.name, pin.stat().st_size, _checksum(pin))

    def _check_and_restore(self, item: PinnedObject) -> ObjectState:
        original, pin = self._paths(item)
        pin_good = _matches(pin, item)
        original_good = pin_good if _same_file(pin, original) else _matches(original, item)
        if pin_good and original_good:
            return ObjectState.INTACT
        if pin_good:
            self._link_over(pin, original)
            return ObjectState.RELINKED
        if original_good:
            self._link_over(original, pin)
            return ObjectState.INTACT
        found = pin.exists() or original.exists()
        original.unlink(missing_ok=True)
        pin.unlink(missing_ok=True)
        return ObjectState.CORRUPT if found else ObjectState.MISSING

    def _expose(self, item: PinnedObject) -> None:
        original, pin = self._paths(item)
        with suppress(FileNotFoundError):  # without its pin there is nothing to expose
            self._link_over(pin, original)

    def _link_over(self, source: Path, target: Path) -> None:
        """Make `target` a link to `source` in one step, so that a reader sees the old file or the new one."""
        temporary = self._temporary("link")
        temporary.hardlink_to(source)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # a rename onto another link of the same file does nothing

    def _temporary(self, kind: str) -> Path:
        """A new name that says whose it is: should we die, another gateway removes it."""
        return self._pins / f"{secrets.token_hex(8)}.{self._writer}.{kind}"

    def _put(self, key: ObjectKey, value: bytes) -> PinnedObject:
        temporary = self._temporary("put")
        try:
            with temporary.open("xb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._pin_of(key))
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(self._pins)
        return PinnedObject(str(key), self.name, len(value), blake3(value).digest())

    def _verify(self, item: PinnedObject) -> ObjectState:
        _, pin = self._paths(item)
        if not pin.exists():
            return ObjectState.MISSING
        return ObjectState.INTACT if _matches(pin, item) else ObjectState.CORRUPT

    async def _each(self, items: Sequence[Item], work: Callable[[Item], T]) -> list[T]:
        """Do `work` on every item, in parallel slices; the order is kept."""
        step = -(-len(items) // _THREADS) or 1
        slices = [items[i : i + step] for i in range(0, len(items), step)]
        # Every slice ends before one's failure is raised: the caller then releases the lock.
        results: list[T] = []
        runs = (self._run(partial(_map, work, part)) for part in slices)
        for part in await asyncio.gather(*runs, return_exceptions=True):
            if isinstance(part, BaseException):
                raise part
            results += part
        return results

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            kind = TierFull if error.errno in _FULL else TierUnavailable
            raise kind(f"disk tier: {error.strerror} ({error.filename2 or error.filename or self._kv})") from error


def _scan(folder: Path) -> Iterator[tuple[ObjectKey, "os.DirEntry[str]"]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if key := ObjectKey.parse_file_name(entry.name):
                yield key, entry


def _unfinished(pins: Path) -> Iterator[tuple[Path, str]]:
    """The temporary files in a directory of pins, and the tags of the processes that made them."""
    with os.scandir(pins) as entries:
        for entry in entries:
            if entry.name.endswith((".link", ".put")):
                yield pins / entry.name, entry.name.split(".")[-2]


def _stats(folder: Path) -> dict[ObjectKey, os.stat_result]:
    found: dict[ObjectKey, os.stat_result] = {}
    for key, entry in _scan(folder):
        with suppress(FileNotFoundError):  # removed since
            found[key] = entry.stat()
    return found


def _stored(
    key: ObjectKey, original: os.stat_result | None, pin: os.stat_result | None, counted: set[tuple[int, int]]
) -> Stored:
    files = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (original, pin) if stat is not None}
    size = sum(size for inode, size in files.items() if inode not in counted)
    counted.update(files)
    return Stored(key, original.st_size if original else 0, pin.st_size if pin else 0, size)


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
    try:  # there are thousands: relative to the folder, the kernel has a shorter path to walk for each
        return [os.stat(name, dir_fd=fd).st_size for name in names]
    except FileNotFoundError:  # rare: usually all exist
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
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return False


def _read(path: Path, item: PinnedObject) -> bytes | None:
    try:
        value = path.read_bytes()
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

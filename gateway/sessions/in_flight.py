"""Show turns in flight to the other workers on this machine, by locks on single bytes of a few files.

A worker holds a shared lock on a byte for each `LockKey` of a turn - its session, its lineage, its request - from the
turn's beginning until it is recorded, and another worker asks the kernel. The byte is a hash of the key: the odds that
two keys share one are 1 to 2^58. Another file has a byte for each batch of turns that are over and not recorded yet, so
that a worker can wait for those turns of the others only.

A worker that dies loses its locks with its files, so nothing has to be cleaned up after it. The locks are those of an
open file (`F_OFD_SETLK`), not of a process: no thread and no second file handle can drop them by accident, and our own
do not count when we ask for others'.
"""

import fcntl
import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from blake3 import blake3

from gateway.errors import StartError

LockKey = tuple[Literal["session", "lineage", "request", "session request", "first message"], str, str]
"""What is locked, the tenant, and its name."""

NONE: Collection[LockKey] = frozenset()


class TurnsElsewhere(Protocol):
    """How this process shows its turns to the others that share the store, and sees theirs."""

    def acquire(self, keys: Iterable[LockKey]) -> None:
        """A turn with these keys begins."""

    def release(self, keys: Iterable[LockKey]) -> None:
        """A turn with these keys has been recorded."""

    @property
    def lags(self) -> bool:
        """Whether the others see a turn only once `visible` was awaited."""

    async def visible(self) -> None:
        """Wait until the others see the turns that have begun by now."""

    def mark_ended(self, batch: int) -> None:
        """Turns of a batch are over and not recorded yet."""

    def mark_recorded(self, batch: int) -> None:
        """All turns of a batch are recorded."""

    async def held(self, keys: Iterable[LockKey]) -> Collection[LockKey]:
        """Those of `keys` that a turn of another process has."""

    async def any(self) -> bool:
        """Whether another process is in any turn that `ended` may not tell of yet."""

    async def ended(self) -> Collection[int]:
        """The other processes' batches that are over and not recorded yet."""


_FLOCK = struct.Struct("hhqqi4x")  # struct flock of Linux on 64 bits: type, whence, start, length, pid
# The kernel keeps a file's locks in a list: with 1,000 turns one lock takes 13 us in one file, and 1 us in one of 16.
_FILES = 16
_BATCHES = 2**30
_END = 2**62


@dataclass(slots=True)
class _Lock:
    """A lock of this worker, and how many of its turns it is for."""

    file: int
    byte: int
    turns: int = 1


class TurnLocks:
    """Locks for this worker's turns, and queries for those of the others."""

    def __init__(self, folder: Path) -> None:
        """Open the files, in `folder`. Raises StartError if they cannot be opened or locked."""
        self._locks: dict[LockKey, _Lock] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._files = [_open(folder / f"{number:02d}.lock") for number in range(_FILES)]
            self._over = _open(folder / "over.lock")
            self.mark_ended(0)
            self.mark_recorded(0)
        except OSError as error:
            what = f"several workers need locks on files in {folder}: {error.strerror}"
            raise StartError(f"{what}; put data_dir on a local disk, or set workers to 1") from error

    def close(self) -> None:
        """Drop every lock."""
        for file in (*self._files, self._over):
            os.close(file)

    def acquire(self, keys: Iterable[LockKey]) -> None:
        """A turn with these keys begins. Never waits: no lock is exclusive."""
        for key in keys:
            lock = self._locks.get(key)
            if lock is not None:
                lock.turns += 1
                continue
            lock = self._locks[key] = _Lock(*self._place(key))
            _lock(lock.file, lock.byte, fcntl.F_RDLCK)

    def release(self, keys: Iterable[LockKey]) -> None:
        """A turn with these keys has been recorded."""
        for key in keys:
            lock = self._locks[key]
            lock.turns -= 1
            if not lock.turns:
                del self._locks[key]
                _lock(lock.file, lock.byte, fcntl.F_UNLCK)

    def held_elsewhere(self, key: LockKey) -> bool:
        """Whether another worker is in a turn with this key."""
        return _locked_by_others(*self._place(key), 1) is not None

    @property
    def lags(self) -> bool:
        """See `TurnsElsewhere.lags`."""
        return False

    async def visible(self) -> None:
        """See `TurnsElsewhere.visible`."""

    async def held(self, keys: Iterable[LockKey]) -> Collection[LockKey]:
        """See `TurnsElsewhere.held`."""
        return [key for key in keys if self.held_elsewhere(key)]

    async def any(self) -> bool:
        """See `TurnsElsewhere.any`."""
        return False

    async def ended(self) -> Collection[int]:
        """See `TurnsElsewhere.ended`."""
        return self.ended_elsewhere()

    def mark_ended(self, batch: int) -> None:
        """Turns of a batch are over and not recorded yet."""
        _lock(self._over, _byte(batch), fcntl.F_RDLCK)

    def mark_recorded(self, batch: int) -> None:
        """All turns of a batch are recorded."""
        _lock(self._over, _byte(batch), fcntl.F_UNLCK)

    def ended_elsewhere(self) -> set[int]:
        """The bytes of other workers' batches that are over and not recorded yet."""
        batches: set[int] = set()
        parts = [(0, _END)]
        while parts:  # the kernel names some lock of a part, not its first
            start, end = parts.pop()
            byte = _locked_by_others(self._over, start, end - start) if start < end else None
            if byte is not None:
                batches.add(byte)
                parts += [(start, byte), (byte + 1, end)]
        return batches

    def _place(self, key: LockKey) -> tuple[int, int]:
        digest = blake3("\0".join(key).encode()).digest(9)
        return self._files[digest[8] % _FILES], int.from_bytes(digest[:8], "little") >> 2


def _byte(batch: int) -> int:
    return os.getpid() << 32 | (batch % _BATCHES) << 1  # every other one: the kernel makes one lock of two neighbours


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(file: int, byte: int, kind: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _locked_by_others(file: int, start: int, length: int) -> int | None:
    """One of these bytes that another worker has locked, None if there is none."""
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer: bytes = fcntl.fcntl(file, fcntl.F_OFD_GETLK, query)
    kind, _, byte, *_ = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else byte

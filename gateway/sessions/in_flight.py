"""Show turns in flight to the other workers on this machine, by locks on single bytes of a few files.

A worker holds a shared lock for each session and each lineage that is in a turn, and for what else tells its turn from
another (`LockKey`), from the turn's beginning until it is recorded; whoever wants to know asks the kernel. Which byte
stands for a mark is a hash: two marks share one in 2^58. Another file tells which turns are over and not recorded yet:
a byte for each batch of them, so that a worker can wait for just those of the others that are over by now.

A worker that dies loses its locks with its files, so nothing has to be cleaned up after it. The locks are those of an
open file (`F_OFD_SETLK`), not of a process: no thread and no second file handle can drop them by accident, and our own
do not count when we ask for others'.
"""

import fcntl
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3

from gateway.errors import StartError

LockKey = tuple[Literal["session", "lineage", "head", "asked", "question"], str, str]
"""What, of which tenant, and its name."""

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of Linux on 64 bits: type, whence, start, length, pid
# The kernel keeps a file's locks in a list: with 1,000 turns one lock takes 13 us in one file, and 1 us in one of 16.
_FILES = 16
_BATCHES = 2**30
_END = 2**62


@dataclass(slots=True)
class _Held:
    """A lock of ours, and how many of our turns it is for."""

    file: int
    byte: int
    turns: int = 1


class TurnLocks:
    """This worker's turns, and the questions for those of the others."""

    def __init__(self, folder: Path) -> None:
        """Open the files, in `folder`. Raises StartError where they cannot be had or cannot be locked."""
        self._held: dict[LockKey, _Held] = {}
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

    def acquire(self, marks: Iterable[LockKey]) -> None:
        """Say that a turn with these marks has begun. Never waits: nobody locks alone."""
        for mark in marks:
            held = self._held.get(mark)
            if held is not None:
                held.turns += 1
                continue
            held = self._held[mark] = _Held(*self._place(mark))
            _lock(held.file, held.byte, fcntl.F_RDLCK)

    def release(self, marks: Iterable[LockKey]) -> None:
        """Say that it is recorded."""
        for mark in marks:
            held = self._held[mark]
            held.turns -= 1
            if not held.turns:
                del self._held[mark]
                _lock(held.file, held.byte, fcntl.F_UNLCK)

    def held_elsewhere(self, mark: LockKey) -> bool:
        """Whether another worker is in a turn with this mark."""
        return _held_by_others(*self._place(mark), 1) is not None

    def mark_ended(self, batch: int) -> None:
        """Say that turns of a batch are over and not recorded yet."""
        _lock(self._over, _byte(batch), fcntl.F_RDLCK)

    def mark_recorded(self, batch: int) -> None:
        """Say that all turns of a batch are recorded."""
        _lock(self._over, _byte(batch), fcntl.F_UNLCK)

    def ended_elsewhere(self) -> set[int]:
        """What stands for the turns of other workers that are over and not recorded yet."""
        found: set[int] = set()
        parts = [(0, _END)]
        while parts:  # the kernel names some lock of a part, not its first
            start, end = parts.pop()
            held = _held_by_others(self._over, start, end - start) if start < end else None
            if held is not None:
                found.add(held)
                parts += [(start, held), (held + 1, end)]
        return found

    def _place(self, mark: LockKey) -> tuple[int, int]:
        digest = blake3("\0".join(mark).encode()).digest(9)
        return self._files[digest[8] % _FILES], int.from_bytes(digest[:8], "little") >> 2


def _byte(batch: int) -> int:
    return os.getpid() << 32 | (batch % _BATCHES) << 1  # every other one: the kernel makes one lock of two neighbours


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(file: int, byte: int, kind: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_others(file: int, start: int, length: int) -> int | None:
    """A byte of these that another worker has locked."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer: bytes = fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked)
    kind, _, held, *_ = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else held

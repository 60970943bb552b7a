"""Turns that are going on, told to the other workers on this machine by locks on single bytes of a few files.

A worker holds a shared lock for each session and each lineage that is in a turn, from the turn's beginning until it is
recorded; whoever wants to know asks the kernel. A worker that dies loses its locks with its files, so nothing has to be
cleaned up after it. Which byte stands for a name is a hash: two names share one in 2^58.

The locks are those of an open file (`F_OFD_SETLK`), not of a process: no thread and no second file handle can drop them
by accident, and our own do not count when we ask for others'.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import Literal

from blake3 import blake3

from gateway.errors import StartError

Kind = Literal["session", "lineage"]

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of Linux on 64 bits: type, whence, start, length, pid
# The kernel keeps a file's locks in a list: with 1,000 turns one lock takes 13 us in one file, and 1 us in one of 16.
_FILES = 16
_WHOLE = 0  # a length: to the end of the file, wherever that is


class TurnLocks:
    """This worker's turns, and the question for those of the others."""

    def __init__(self, folder: Path) -> None:
        """Open the files, in `folder`. Raises StartError where they cannot be had or cannot be locked."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._files = [_open(folder / f"{number:02d}.lock") for number in range(_FILES)]
            self.hold("session", "", "")
            self.let_go("session", "", "")
        except OSError as error:
            what = f"several workers need locks on files in {folder}: {error.strerror}"
            raise StartError(f"{what}; put data_dir on a local disk, or set workers to 1") from error

    def close(self) -> None:
        """Drop every lock."""
        for file in self._files:
            os.close(file)

    def hold(self, kind: Kind, tenant: str, name: str) -> None:
        """Say that the session, or a session of the lineage, is in a turn. Never waits: nobody locks alone."""
        file, byte = self._place(kind, tenant, name)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))

    def let_go(self, kind: Kind, tenant: str, name: str) -> None:
        """Say that it is so no more."""
        file, byte = self._place(kind, tenant, name)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))

    def elsewhere(self, kind: Kind, tenant: str, name: str) -> bool:
        """Whether another worker holds it."""
        return _held_by_others(*self._place(kind, tenant, name), 1)

    def any_elsewhere(self) -> bool:
        """Whether another worker has any turn."""
        return any(_held_by_others(file, 0, _WHOLE) for file in self._files)

    def _place(self, kind: Kind, tenant: str, name: str) -> tuple[int, int]:
        digest = blake3(f"{kind}\0{tenant}\0{name}".encode()).digest(9)
        return self._files[digest[8] % _FILES], int.from_bytes(digest[:8], "little") >> 2


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _held_by_others(file: int, start: int, length: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer: bytes = fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

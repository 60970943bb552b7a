"""Disk space set aside next to the database, and released when the disk is full.

On a full disk two things must still work: recording the turns whose replies clients already have, and deleting, which
is what makes room. So the reserve has two parts: turns may use up the first only.
"""

import logging
import os
import shutil
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

log = logging.getLogger(__name__)

PART_BYTES = 4 * 2**20
_ROOM = 4 * PART_BYTES  # free bytes from which the parts are made: a small disk must not be filled by the ballast


class Reserve(IntEnum):
    """How much of the reserve a write may use up."""

    NONE = 0
    TURNS = 1
    DELETIONS = 2


class Ballast:
    """Two files of `PART_BYTES`. Several processes may share them: each step is safe to repeat and to race for."""

    def __init__(self, database: Path) -> None:
        self._folder = database.parent
        self._paths = {
            part: database.with_name(f"{database.name}-ballast-{part:d}") for part in (Reserve.TURNS, Reserve.DELETIONS)
        }

    @property
    def whole(self) -> bool:
        """Whether nothing of it has been given up."""
        return all(_size(path) >= PART_BYTES for path in self._paths.values())

    def give_up(self, part: Reserve) -> bool:
        """Free the space of a part; return whether there was any."""
        try:
            self._paths[part].unlink()
        except OSError:
            return False
        log.error("the disk of %s is full: gave up %d bytes that were set aside", self._folder, PART_BYTES)
        return True

    def restore(self) -> None:
        """Set space aside again, if there is room."""
        if self.whole or self.free_bytes < _ROOM:
            return
        for path in self._paths.values():
            _allocate(path)

    @property
    def free_bytes(self) -> int:
        """Free bytes on the disk of the database."""
        return shutil.disk_usage(self._folder).free


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _allocate(path: Path) -> None:
    """Make a file whose blocks are on the disk, not only promised."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, PART_BYTES)
        finally:
            os.close(file)
    except OSError as error:
        log.warning("could not set %d bytes aside in %s: %s", PART_BYTES, path, error.strerror)
        with suppress(OSError):
            path.unlink()

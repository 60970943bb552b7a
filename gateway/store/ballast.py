"""Disk space set aside next to the database, and released when the disk is full.

On a full disk two things must still work: recording the turns whose replies clients already have, and deleting, which
frees space. So the reserve has two parts: turns may use up only the first.
"""

import logging
import shutil
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from gateway.runtime.disk import allocate

log = logging.getLogger(__name__)

PART_BYTES = 4 * 2**20
_MIN_FREE_BYTES = 4 * PART_BYTES  # with less the parts are not created: the ballast must not fill a small disk


class Reserve(IntEnum):
    """How much of the reserve a write may use up."""

    NONE = 0
    TURNS = 1
    DELETIONS = 2


class Ballast:
    """Two files of `PART_BYTES`. Several processes may share them: each step can be repeated, and raced for."""

    def __init__(self, database: Path) -> None:
        self._folder = database.parent
        self._paths = {
            part: database.with_name(f"{database.name}-ballast-{part:d}") for part in (Reserve.TURNS, Reserve.DELETIONS)
        }

    @property
    def is_complete(self) -> bool:
        """Whether both parts are set aside."""
        return all(_size(path) >= PART_BYTES for path in self._paths.values())

    def release(self, part: Reserve) -> bool:
        """Free the space of a part; return whether there was any."""
        try:
            self._paths[part].unlink()
        except OSError:
            return False
        log.error("the disk of %s is full: released %d bytes that were set aside", self._folder, PART_BYTES)
        return True

    def restore(self) -> None:
        """Set space aside again, if there is room."""
        if self.is_complete or self.free_bytes < _MIN_FREE_BYTES:
            return
        for path in self._paths.values():
            try:
                allocate(path, PART_BYTES)
            except OSError as error:
                log.warning("could not set %d bytes aside in %s: %s", PART_BYTES, path, error.strerror)
                with suppress(OSError):
                    path.unlink()

    @property
    def free_bytes(self) -> int:
        """Free bytes on the disk of the database."""
        return shutil.disk_usage(self._folder).free


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

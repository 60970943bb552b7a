"""Locks between the processes of one machine, which the kernel releases when a process dies."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_POLL_S = 0.005


class FileLock:
    """A shared or exclusive lock on a file."""

    def __init__(self, path: Path, poll_s: float = _POLL_S) -> None:
        self._path = path
        self._poll_s = poll_s

    @asynccontextmanager
    async def acquire(self, *, exclusive: bool) -> AsyncIterator[None]:
        """Wait for the lock and hold it for the block."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):  # noqa: ASYNC110 - the kernel wakes no task
                await asyncio.sleep(self._poll_s)
            yield
        finally:
            os.close(fd)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

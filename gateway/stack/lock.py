"""A lock that lets only one stack use a data directory: two would write the same files."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.stack.errors import StackError

_REAPED_WITHIN = 30.0
"""Seconds to wait for the lock of a dead supervisor; its reaper holds it until everything is swept."""


@contextmanager
def holding(data_dir: Path) -> Iterator[int]:
    """Hold the lock of a data directory; yields its descriptor, for the reaper."""
    path = data_dir / "up.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(descriptor, data_dir)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, data_dir: Path) -> None:
    deadline = time.monotonic() + _REAPED_WITHIN
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode()
            if _is_alive(owner) or time.monotonic() > deadline:
                raise StackError(
                    f"{data_dir} is in use by process {owner}; stop that one or name another --data-dir"
                ) from None
            time.sleep(0.1)
        else:
            return


def _is_alive(owner: str) -> bool:
    return owner.isdigit() and Path("/proc", owner).exists()

"""A lock that lets only one stack use a data directory: two would write the same files.

The file says which process holds it and on which port its gateway listens.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gateway.stack.errors import StackError

_NAME = "up.lock"
_REAPED_WITHIN = 30.0
"""Seconds to wait for the lock of a dead supervisor; its reaper holds it until everything is swept."""


class Holder(NamedTuple):
    """The supervisor of a running stack, and the port of its gateway."""

    pid: int
    port: int


def holder(data_dir: Path) -> Holder | None:
    """Which process runs a stack in a data directory; None if none does."""
    try:
        with (data_dir / _NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        pid, _, port = (data_dir / _NAME).read_text(encoding="ascii").partition(" ")
        return Holder(int(pid), int(port)) if pid.isdigit() and port.isdigit() and _is_alive(pid) else None
    return None


@contextmanager
def holding(data_dir: Path, port: int) -> Iterator[int]:
    """Hold the lock of a data directory; yields its descriptor, for the reaper."""
    path = data_dir / _NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(descriptor, data_dir)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {port}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, data_dir: Path) -> None:
    deadline = time.monotonic() + _REAPED_WITHIN
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode().partition(" ")[0]
            if _is_alive(owner) or time.monotonic() > deadline:
                raise StackError(
                    f"{data_dir} is in use by process {owner}; stop that one or pass another --data-dir"
                ) from None
            time.sleep(0.1)
        else:
            return


def _is_alive(owner: str) -> bool:
    return owner.isdigit() and Path("/proc", owner).exists()

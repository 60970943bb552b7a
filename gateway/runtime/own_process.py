"""Which process this is, so that others on the same machine can tell at once that it has ended."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

_PROC = Path("/proc")
_STARTED = 19  # the field of `/proc/PID/stat`, counted after the command, with the start in ticks since boot


def identity() -> str:
    """Names this process among all that ever ran on this machine; empty where the system cannot tell."""
    place, running = _place(), _running_since(os.getpid())
    return f"{place} {os.getpid()} {running}" if place and running else ""


def tag(process: str) -> str:
    """A short form of an `identity`, for the names of files."""
    return hashlib.blake2s(process.encode(), digest_size=8).hexdigest()


def has_ended(process: str) -> bool:
    """Whether the process with this `identity` is known to have ended; one of another machine or container is not."""
    place, _, rest = process.partition(" ")
    pid, _, since = rest.partition(" ")
    if not since or place != _place():
        return False
    return _is_gone(int(pid)) or _running_since(int(pid)) not in ("", since)


@lru_cache(1)
def _place() -> str:
    """This boot of this machine, and this container: process numbers mean nothing elsewhere."""
    try:
        boot = _PROC.joinpath("sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{_PROC.joinpath('self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_gone(pid: int) -> bool:
    """Whether there is no such process; what another user's does is perhaps not to be seen, but that it exists is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _stat(pid)[:1] in (["Z"], ["X"])  # a zombie runs no more


def _running_since(pid: int) -> str:
    """When a process was started, in ticks since boot; empty if that is not to be seen."""
    return next(iter(_stat(pid)[_STARTED:]), "")


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` after the command, which may hold anything; none if they are not to be seen."""
    try:
        return _PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

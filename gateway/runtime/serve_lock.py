"""A lock that lets only one gateway serve a data directory: two would not see each other's turns."""

import fcntl
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gateway.errors import StartError

log = logging.getLogger(__name__)


def lock(paths: Iterable[Path]) -> list[int]:
    """Lock these files for as long as this process and its children live. Raises StartError if another has one.

    Returns the open files: the kernel drops a lock when the last process that has it open is gone, however it ended.
    """
    return [_lock(path) for path in paths]


def _lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"the lock {path} cannot be created: {error.strerror}; make data_dir writable") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.pread(file, 20, 0).decode("ascii", "replace").strip() or "unknown"
        raise StartError(
            f"another gateway (process {who}) serves {path.parent}; stop it, or set data_dir to another directory"
        ) from error
    except OSError as error:
        log.warning("%s cannot be locked (%s): make sure that no second gateway serves it", path.parent, error.strerror)
        return file
    with suppress(OSError):  # a full disk: then the message of a second gateway has no process id
        os.ftruncate(file, 0)
        os.pwrite(file, b"%d\n" % os.getpid(), 0)
    return file

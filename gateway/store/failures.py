"""Turn SQLite's failures into errors that name the file and the cause."""

import errno
import os
import sqlite3
import tempfile
from pathlib import Path

from gateway.store.damage import StoreDamaged, is_damage
from gateway.store.types import StoreUnavailable

# Primary result codes (sqlite.org/rescode.html) that speak of the file or its disk, not of what was to be done.
_OUT_OF_ORDER = frozenset(
    {
        sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
    }
)  # fmt: skip
_LIMITS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "a quota is reached",
    errno.EFBIG: "a limit on the size of files is reached (ulimit -f)",
}
_TRIED_BYTES = 64 * 1024


def primary(error: BaseException) -> int:
    """The primary result code of an error of SQLite, 0 for any other error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def read_failure(path: Path, error: sqlite3.Error) -> Exception:
    """What whoever wanted to read is told of an error; the error itself where it is a fault of ours."""
    if is_damage(error):
        return StoreDamaged(path, error)
    if primary(error) not in _OUT_OF_ORDER:
        return error
    return StoreUnavailable("internal", f"the store {path} cannot be read: {error}")


def write_failure(path: Path, error: sqlite3.Error, *, full: bool) -> Exception:
    """What whoever wanted to write is told of an error; may itself write to the disk, to find out what it refuses."""
    if is_damage(error):
        return StoreDamaged(path, error)
    if primary(error) not in _OUT_OF_ORDER:
        return error
    if full:
        return StoreUnavailable("storage_full", f"the store's disk is full ({path})")
    why = str(error)
    if error.sqlite_errorcode == sqlite3.SQLITE_IOERR_WRITE:
        # SQLite keeps the error number to itself: for all but ENOSPC it has this one code (os_unix.c, unixWrite).
        refused = _try_to_write(path)
        if refused in _LIMITS:
            return StoreUnavailable("storage_full", f"the store {path} cannot be written: {_LIMITS[refused]}")
        why = f"{os.strerror(refused or errno.EIO)}; is its disk faulty?"
    return StoreUnavailable("internal", f"the store {path} cannot be written: {why}")


def _try_to_write(store: Path) -> int:
    """Write beyond the end of the store's files, into one that vanishes; return the error number, 0 where it works."""
    try:
        at = max(file.stat().st_size for file in (store, store.with_name(f"{store.name}-wal")) if file.exists())
        with tempfile.TemporaryFile(dir=store.parent, buffering=0) as file:
            for _ in range(2):  # the first may be cut short at a limit, the second fails there
                at += os.pwrite(file.fileno(), bytes(_TRIED_BYTES), at)
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0

"""Turn SQLite's failures into errors that name the file and the cause, and check the file for damage."""

import errno
import os
import sqlite3
import tempfile
from pathlib import Path

from gateway.errors import GatewayError
from gateway.store.types import StoreUnavailable

RESCUE = (
    "stop the gateway and restore the store from a copy, or rescue what can be read into a new one "
    "(sqlite3 STORE .recover | sqlite3 NEW); then check it with cwg doctor"
)
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# Primary result codes (sqlite.org/rescode.html) that are about the file or its disk, not about the statement.
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
_PROBE_BYTES = 64 * 1024
_MAX_PROBLEMS = 5


class StoreDamaged(GatewayError):
    """The store's file is not as SQLite wrote it; neither a retry nor a restart helps."""

    def __init__(self, path: Path, error: sqlite3.Error) -> None:
        super().__init__("internal", f"the store {path} is damaged: {error}", hint=RESCUE)


def primary_code(error: BaseException) -> int:
    """The primary result code of an error of SQLite, 0 for any other error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_damage(error: BaseException) -> bool:
    """Whether an error of SQLite means that a file is damaged, or not a database."""
    return primary_code(error) in _CORRUPT


def read_failure(path: Path, error: sqlite3.Error) -> Exception:
    """The error to raise for a failed read; the error itself if it is a bug of ours."""
    return _known_failure(path, error) or StoreUnavailable("internal", f"the store {path} cannot be read: {error}")


def write_failure(path: Path, error: sqlite3.Error, *, full: bool) -> Exception:
    """The error to raise for a failed write; may itself write to the disk, to find out what is wrong with it."""
    if failure := _known_failure(path, error):
        return failure
    if full:
        return StoreUnavailable("storage_full", f"the store's disk is full ({path})")
    reason = str(error)
    if error.sqlite_errorcode == sqlite3.SQLITE_IOERR_WRITE:
        # SQLite does not report the error number, and has this one code for all but ENOSPC (os_unix.c, unixWrite).
        number = _try_to_write(path)
        if number in _LIMITS:
            return StoreUnavailable("storage_full", f"the store {path} cannot be written: {_LIMITS[number]}")
        reason = f"{os.strerror(number or errno.EIO)}; is its disk faulty?"
    return StoreUnavailable("internal", f"the store {path} cannot be written: {reason}")


def _known_failure(path: Path, error: sqlite3.Error) -> Exception | None:
    if is_damage(error):
        return StoreDamaged(path, error)
    return None if primary_code(error) in _OUT_OF_ORDER else error


def _try_to_write(store: Path) -> int:
    """Write beyond the end of the store's files, into a temporary one; return the error number, 0 on success."""
    try:
        at = max(file.stat().st_size for file in (store, store.with_name(f"{store.name}-wal")) if file.exists())
        with tempfile.TemporaryFile(dir=store.parent, buffering=0) as file:
            for _ in range(2):  # the first may be cut short at a limit, the second fails there
                at += os.pwrite(file.fileno(), bytes(_PROBE_BYTES), at)
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def find_damage(path: Path) -> list[str]:
    """Read every page of the store and return what is wrong, in SQLite's words; takes seconds for each gigabyte.

    It has a connection of its own, so neither requests nor finished turns wait for it.
    """
    try:
        db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        return [str(error)]
    try:
        problems = [str(row[0]) for row in db.execute(f"PRAGMA quick_check({_MAX_PROBLEMS})")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    finally:
        db.close()
    return [] if problems == ["ok"] else problems

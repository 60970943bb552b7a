"""A connection to the database, as every thread of the store has its own."""

import sqlite3
import time
from pathlib import Path

_BUSY_S = 10.0  # another worker's transaction is milliseconds; this is for a disk that stalls
_BUSY_POLL_S = 0.01
_CACHE_KIB = 16 * 1024  # of pages, for each connection: the objects of a large window lie all over their table


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection; any thread may use it. Raises sqlite3.DatabaseError."""
    # Python's own transaction handling is off: every BEGIN and COMMIT is written here.
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    _use_wal(db)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    # FULL syncs the log at each commit, off the request path: a window that was committed survives a power cut.
    db.execute("PRAGMA synchronous = FULL")
    return db


def _use_wal(db: sqlite3.Connection) -> None:
    """Write ahead. Where two open a new file at once, SQLite refuses one of them without waiting for the other."""
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(_BUSY_POLL_S)
        else:
            return

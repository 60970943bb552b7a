"""The store on SQLite in WAL mode: one writer thread, one reader thread, and inline reads for the request path.

The reads that a request waits for (`gateway.store.database.point_read`) are point reads of pages that SQLite has
cached: some ten microseconds, less than it costs to hand them to a thread. `gateway.store.writer` is the thread that
writes.
"""

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from gateway.errors import StartError
from gateway.store import search_index
from gateway.store.ballast import PART_BYTES, Ballast, Reserve
from gateway.store.database import Work, finish
from gateway.store.failures import RESCUE, find_damage, is_damage, primary_code, read_failure
from gateway.store.schema import migrate
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.types import StoreCheck
from gateway.store.writer import Writer

T = TypeVar("T")
_BUSY_S = 10.0  # another worker's transaction is milliseconds; this is for a disk that stalls
_BUSY_POLL_S = 0.01
_CACHE_KIB = 16 * 1024  # of pages, for each connection: the objects of a large window lie all over their table


class SqliteStore(Store):
    """The store in a file."""

    def __init__(self, path: Path, *, turns_kept: int, responses_kept: int = 10_000) -> None:
        super().__init__(turns_kept=turns_kept, responses_kept=responses_kept)
        self._path = path
        self._ballast = Ballast(path)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer = Writer(path, partial(_connect, path), self._ballast)
        self.store_id = ""

    async def __aenter__(self) -> "SqliteStore":
        """Open the database and bring its schema up to date. Raises StartError."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open_on_any_disk()
        except (OSError, sqlite3.DatabaseError) as error:
            raise StartError(f"the store {self._path} cannot be opened: {error}{self._remedy(error)}") from error
        self._ballast.restore()
        self._writer.start()
        return self

    def _open_on_any_disk(self) -> None:
        """Open it; if the disk is full, release the space set aside for that, part by part."""
        for part in (Reserve.TURNS, Reserve.DELETIONS):
            try:
                return self._open()
            except (OSError, sqlite3.DatabaseError):
                if not (self._is_disk_full() and self._ballast.release(part)):
                    raise
        return self._open()

    def _remedy(self, error: Exception) -> str:
        if is_damage(error):
            return f"; {RESCUE}"
        return f"; its disk is full: free {2 * PART_BYTES >> 20} MiB there" if self._is_disk_full() else ""

    def _is_disk_full(self) -> bool:
        return self._path.parent.is_dir() and self._ballast.free_bytes < PART_BYTES // 4

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        connection = _connect(self._path)
        migrate(connection)
        search_index.prepare(connection)
        (self.store_id,) = connection.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
        self._inline, self._slow = SqliteDb(connection), SqliteDb(_connect(self._path))

    async def __aexit__(self, *_: object) -> None:
        await self._writer.stop()
        self._reader.shutdown()
        self._slow.connection.close()
        self._inline.connection.close()

    async def check(self) -> None:
        """See `Store.check`; also sets aside again what a full disk has used up."""
        await super().check()
        await asyncio.to_thread(self._ballast.restore)

    async def examine(self) -> StoreCheck:
        """See `Store.examine`."""
        errors = await asyncio.to_thread(find_damage, self._path)
        if not errors:
            return StoreCheck("ok", "every page is intact")
        return StoreCheck("failed", f"the store is damaged: {'; '.join(errors)}", RESCUE)

    async def run_inline(self, work: Work[T]) -> T:
        try:
            return await work(self._inline)  # which never waits
        except sqlite3.DatabaseError as error:
            raise read_failure(self._path, error) from error

    async def run_read(self, work: Work[T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, _read, self._slow, work)
        except sqlite3.DatabaseError as error:
            raise read_failure(self._path, error) from error

    async def run_write(
        self, work: Work[T], reserve: Reserve = Reserve.NONE, *, shared: bool = False, durable: bool = True
    ) -> T:
        return await self._writer.write(work, reserve, durable=durable)


def _read(db: SqliteDb, work: Work[T]) -> T:
    db.connection.execute("BEGIN")  # one snapshot, however many statements the work takes
    try:
        return finish(work(db))
    finally:
        db.connection.execute("ROLLBACK")  # there is nothing to commit, and of a damaged file a COMMIT fails


def _connect(path: Path) -> sqlite3.Connection:
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
    """Switch to WAL. If two open a new file at once, SQLite refuses one of them without waiting for the other."""
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(_BUSY_POLL_S)
        else:
            return

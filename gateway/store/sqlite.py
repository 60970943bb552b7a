"""The store on SQLite in WAL mode: one writer thread, one reader thread, and an inline read for the request path.

The reads that a request waits for (`gateway.store.database.point_read`) are point reads from pages that SQLite has
cached: some ten microseconds, less than handing them to a thread would cost. Everything else runs in a thread of its
own; `gateway.store.writer` is the one that writes.
"""

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from gateway.errors import StartError
from gateway.store.ballast import PART_BYTES, Ballast, Reserve
from gateway.store.connect import connect
from gateway.store.damage import REMEDY, is_damage
from gateway.store.database import Work
from gateway.store.failures import read_failure
from gateway.store.schema import migrate
from gateway.store.store import Store
from gateway.store.writer import Writer

T = TypeVar("T")


class SqliteStore(Store):
    """The store in a file."""

    def __init__(self, path: Path, *, turns_kept: int, responses_kept: int = 10_000) -> None:
        super().__init__(turns_kept=turns_kept, responses_kept=responses_kept)
        self._path = path
        self._ballast = Ballast(path)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer = Writer(path, partial(connect, path), self._ballast)
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
        """Open it; where the disk is full, use up what was set aside for that, part by part."""
        for part in (Reserve.TURNS, Reserve.DELETIONS):
            try:
                return self._open()
            except (OSError, sqlite3.DatabaseError):
                if not (self._no_room() and self._ballast.give_up(part)):
                    raise
        return self._open()

    def _remedy(self, error: Exception) -> str:
        if is_damage(error):
            return f"; {REMEDY}"
        return f"; its disk is full: free {2 * PART_BYTES >> 20} MiB there" if self._no_room() else ""

    def _no_room(self) -> bool:
        return self._path.parent.is_dir() and self._ballast.free_bytes < PART_BYTES // 4

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        self._inline = connect(self._path)
        migrate(self._inline)
        (self.store_id,) = self._inline.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
        self._slow = connect(self._path)

    async def __aexit__(self, *_: object) -> None:
        await self._writer.stop()
        self._reader.shutdown()
        self._slow.close()
        self._inline.close()

    async def check(self) -> None:
        """See `Store.check`; also sets aside again what a full disk has used up."""
        await super().check()
        await asyncio.to_thread(self._ballast.restore)

    def run_inline(self, work: Work[T]) -> T:
        """See `Database.run_inline`."""
        try:
            return work(self._inline)
        except sqlite3.DatabaseError as error:
            raise read_failure(self._path, error) from error

    async def run_read(self, work: Work[T]) -> T:
        """See `Database.run_read`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, _whole, self._slow, work)
        except sqlite3.DatabaseError as error:
            raise read_failure(self._path, error) from error

    async def run_write(self, work: Work[T], reserve: Reserve = Reserve.NONE) -> T:
        """See `Database.run_write`."""
        return await self._writer.write(work, reserve)


def _whole(db: sqlite3.Connection, work: Work[T]) -> T:
    """All that a call reads it reads from one moment, however many statements that takes."""
    db.execute("BEGIN")
    try:
        return work(db)
    finally:
        db.execute("ROLLBACK")  # there is nothing to commit, and of a damaged file a COMMIT fails

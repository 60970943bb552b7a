"""The store's one writer: a thread that puts all waiting writes into one transaction, each under a savepoint.

So a burst of turns costs one commit, and a write that fails affects no other. On a full disk, writes that may use the
reserve (`gateway.store.ballast`) are retried after it has been released; all others fail.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, TypeVar

from gateway.store.ballast import Ballast, Reserve
from gateway.store.database import Work, finish
from gateway.store.failures import primary_code, write_failure
from gateway.store.sqlite_db import SqliteDb

T = TypeVar("T")
_WRITES_PER_COMMIT = 256
_FULL_BYTES = 2**20  # with less free than this, an I/O error is taken for a full disk


class _Write(NamedTuple):
    work: Work[object]
    future: Future[object]
    reserve: Reserve
    durable: bool


class Writer:
    """Opens its connection in its own thread with `connect`."""

    def __init__(self, path: Path, connect: Callable[[], sqlite3.Connection], ballast: Ballast) -> None:
        self._path = path
        self._connect = connect
        self._ballast = ballast
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Return when all waiting writes are done."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def write(self, work: Work[T], reserve: Reserve = Reserve.NONE, *, durable: bool = True) -> T:
        """Do `work` in a transaction and return its result. Raises StoreUnavailable, and what `work` raises."""
        future: Future[T] = Future()
        self._queue.put(_Write(work, future, reserve, durable))  # type: ignore[arg-type]
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await asyncio.wait([waiting])  # it will be done: a cancelled caller has to hold its lock on pins until then
            raise
        except sqlite3.DatabaseError as error:
            raise await asyncio.to_thread(write_failure, self._path, error, full=self._is_full(error)) from error

    def _run(self) -> None:
        db = SqliteDb(self._connect())
        synced = True  # as it is opened
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < _WRITES_PER_COMMIT and not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    last = True
                    break
                batch.append(item)
            if synced != (synced := any(write.durable for write in batch)):
                db.connection.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._commit(db, batch)
            if last:
                break
        db.connection.close()

    def _commit(self, db: SqliteDb, batch: Sequence[_Write]) -> None:
        full = _commit(db, batch, self._is_full)
        for part in (Reserve.TURNS, Reserve.DELETIONS):
            if full is None:
                return
            batch = _allowed(batch, part, full)
            if batch and self._ballast.release(part):
                full = _commit(db, batch, self._is_full)
        if full is not None:
            for write in batch:
                write.future.set_exception(full)

    def _is_full(self, error: BaseException) -> bool:
        code = primary_code(error)
        if code == sqlite3.SQLITE_IOERR:  # what SQLite reports if there is no room for its shared-memory file
            return self._ballast.free_bytes < _FULL_BYTES
        return code == sqlite3.SQLITE_FULL


def _allowed(batch: Sequence[_Write], part: Reserve, full: BaseException) -> list[_Write]:
    """The writes that may use a part of the reserve; the others fail."""
    for write in batch:
        if write.reserve < part:
            write.future.set_exception(full)
    return [write for write in batch if write.reserve >= part]


def _commit(db: SqliteDb, batch: Sequence[_Write], is_full: Callable[[BaseException], bool]) -> BaseException | None:
    """Write `batch` in one transaction. Returns the error when the disk was full: nothing was written then."""
    results: list[tuple[object, BaseException | None]] = []
    connection = db.connection
    try:
        connection.execute("BEGIN IMMEDIATE")
        for write in batch:
            results.append(_run(db, write.work, is_full))
        connection.execute("COMMIT")
    except BaseException as error:  # noqa: BLE001 - its callers get it; the thread must not end
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if is_full(error):
            return error
        results = [(None, error)] * len(batch)
    for write, (value, failure) in zip(batch, results, strict=True):
        if failure is None:
            write.future.set_result(value)
        else:
            write.future.set_exception(failure)
    return None


def _run(
    db: SqliteDb, work: Work[object], is_full: Callable[[BaseException], bool]
) -> tuple[object, BaseException | None]:
    connection = db.connection
    connection.execute("SAVEPOINT work")
    try:
        value = finish(work(db))
    except BaseException as error:
        if (
            is_full(error) or not connection.in_transaction
        ):  # the whole batch has failed; SQLite may have rolled it back
            raise
        connection.execute("ROLLBACK TO work")
        connection.execute("RELEASE work")
        return None, error
    connection.execute("RELEASE work")
    return value, None

"""The store's one writer: a thread that puts whatever waits into one transaction, each write under a savepoint.

So a burst of turns costs one commit, and a write that fails costs only itself. When the disk is full, writes that may
use the reserve (`gateway.store.ballast`) are tried again once it has been given up; all others fail.
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
from gateway.store.database import Work
from gateway.store.failures import primary, write_failure

T = TypeVar("T")
_WRITES_PER_COMMIT = 256
_FULL_BYTES = 2**20  # with less free than this, an I/O error is taken for a full disk


class _Write(NamedTuple):
    work: Work[object]
    done: Future[object]
    reserve: Reserve


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
        """Return when everything that waits is written."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def write(self, work: Work[T], reserve: Reserve = Reserve.NONE) -> T:
        """Do `work` in a transaction and return its result. Raises StoreUnavailable, and what `work` raises."""
        done: Future[T] = Future()
        self._queue.put(_Write(work, done, reserve))  # type: ignore[arg-type]
        waiting = asyncio.wrap_future(done)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await asyncio.wait([waiting])  # it will be done: whoever is cancelled holds the lock on its pins until then
            raise
        except sqlite3.DatabaseError as error:
            raise await asyncio.to_thread(write_failure, self._path, error, full=self._is_full(error)) from error

    def _run(self) -> None:
        db = self._connect()
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < _WRITES_PER_COMMIT and not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    last = True
                    break
                batch.append(item)
            self._commit(db, batch)
            if last:
                break
        db.close()

    def _commit(self, db: sqlite3.Connection, batch: Sequence[_Write]) -> None:
        full = _commit(db, batch, self._is_full)
        for part in (Reserve.TURNS, Reserve.DELETIONS):
            if full is None:
                return
            batch = _without(batch, part, full)
            if batch and self._ballast.give_up(part):
                full = _commit(db, batch, self._is_full)
        if full is not None:
            for write in batch:
                write.done.set_exception(full)

    def _is_full(self, error: BaseException) -> bool:
        code = primary(error)
        if code == sqlite3.SQLITE_IOERR:  # so SQLite reports a shared-memory file for which there is no room
            return self._ballast.free_bytes < _FULL_BYTES
        return code == sqlite3.SQLITE_FULL


def _without(batch: Sequence[_Write], part: Reserve, full: BaseException) -> list[_Write]:
    """Those of `batch` that may use up a part of the reserve; the others fail."""
    for write in batch:
        if write.reserve < part:
            write.done.set_exception(full)
    return [write for write in batch if write.reserve >= part]


def _commit(
    db: sqlite3.Connection, batch: Sequence[_Write], is_full: Callable[[BaseException], bool]
) -> BaseException | None:
    """Write `batch` in one transaction. Returns the error when the disk was full: nothing was written then."""
    results: list[tuple[object, BaseException | None]] = []
    try:
        db.execute("BEGIN IMMEDIATE")
        for write in batch:
            results.append(_one(db, write.work, is_full))
        db.execute("COMMIT")
    except BaseException as error:  # noqa: BLE001 - whoever waits gets it; the thread must live on
        if db.in_transaction:
            db.execute("ROLLBACK")
        if is_full(error):
            return error
        results = [(None, error)] * len(batch)
    for write, (value, failure) in zip(batch, results, strict=True):
        if failure is None:
            write.done.set_result(value)
        else:
            write.done.set_exception(failure)
    return None


def _one(
    db: sqlite3.Connection, work: Work[object], is_full: Callable[[BaseException], bool]
) -> tuple[object, BaseException | None]:
    db.execute("SAVEPOINT work")
    try:
        value = work(db)
    except BaseException as error:
        if is_full(error) or not db.in_transaction:  # the whole batch has failed; SQLite may have rolled it back
            raise
        db.execute("ROLLBACK TO work")
        db.execute("RELEASE work")
        return None, error
    db.execute("RELEASE work")
    return value, None

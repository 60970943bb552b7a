"""The writes of a process: whatever waits goes into one transaction, and is tried again where that helps.

`record` and other shared writes hold a lock that others hold at the same time; all others hold it alone, so that each
of them finds what it has read unchanged when it writes, as on SQLite.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import asyncpg

from gateway.store.database import Work
from gateway.store.postgres.connections import Line
from gateway.store.postgres.db import Connection, PostgresDb, Statements, TextsNotLockedError
from gateway.store.postgres.failures import CommitUnknownError, failure, is_lost, may_succeed_again
from gateway.store.types import StoreUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
_WRITES_PER_COMMIT = 256
_ATTEMPTS = 8
_BACKOFF_S = 0.005
_SETTLE_POLL_S = 0.1
_TEXTS = 7_236_802  # the advisory lock; any number that is ours
# The id of the transaction tells later whether it was committed.
_SHARED = f"SELECT CAST(pg_current_xact_id() AS TEXT), pg_advisory_xact_lock_shared({_TEXTS})"
_ALONE = f"SELECT CAST(pg_current_xact_id() AS TEXT), pg_advisory_xact_lock({_TEXTS})"


class _Write(NamedTuple):
    work: Work[object]
    shared: bool
    future: asyncio.Future[object]


class Writer:
    """Runs in the event loop of the store."""

    def __init__(self, line: Line, statements: Statements) -> None:
        self._line = line
        self._statements = statements
        self._where = line.server.where
        self._begin = line.server.begin()
        self._queue: asyncio.Queue[_Write | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(), name="store-writer")

    async def stop(self) -> None:
        """Return when all waiting writes are done."""
        self._queue.put_nowait(None)
        await self._task
        await self._line.close()

    async def write(self, work: Work[T], *, shared: bool) -> T:
        """Do `work` in a transaction and return its result. Raises StoreUnavailable, and what `work` raises."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Write(work, shared, future))  # type: ignore[arg-type]
        return await future

    async def _run(self) -> None:
        while (first := await self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < _WRITES_PER_COMMIT and not self._queue.empty():
                item = self._queue.get_nowait()
                if item is None:
                    last = True
                    break
                batch.append(item)
            await self._write(batch)
            if last:
                break

    async def _write(self, batch: Sequence[_Write]) -> None:
        try:
            results = await self._attempt([one.work for one in batch], alone=not all(one.shared for one in batch))
        except Exception as error:  # noqa: BLE001 - its callers get it
            if len(batch) == 1 or isinstance(error, StoreUnavailable):
                for one in batch:
                    one.future.set_exception(error)
                return
            for one in batch:  # one that fails must not affect the others
                await self._write([one])
        else:
            for one, result in zip(batch, results, strict=True):
                one.future.set_result(result)

    async def _attempt(self, works: Sequence[Work[object]], *, alone: bool) -> list[object]:
        """Write, again if others were in the way, and once again if the connection was lost."""
        lost = False
        for attempt in range(_ATTEMPTS):
            try:
                return await self._transaction(works, alone=alone)
            except TextsNotLockedError:
                alone = True
            except StoreUnavailable:
                raise
            except Exception as error:
                if is_lost(error):
                    self._line.drop()
                if attempt + 1 == _ATTEMPTS or not (may_succeed_again(error) or (is_lost(error) and not lost)):
                    raise failure(self._where, error) from error
                lost = is_lost(error)
                await asyncio.sleep(random.uniform(0, _BACKOFF_S * 2**attempt))  # noqa: S311
        raise AssertionError("unreachable")

    async def _transaction(self, works: Sequence[Work[object]], *, alone: bool) -> list[object]:
        connection = await self._line.connection()
        try:
            await connection.execute(self._begin)
            transaction = str(await connection.fetchval(_ALONE if alone else _SHARED))
            db = PostgresDb(connection, self._statements, alone=alone)
            results = [await work(db) for work in works]
        except BaseException:
            await self._roll_back(connection)
            raise
        await self._commit(connection, transaction)
        return results

    async def _roll_back(self, connection: Connection) -> None:
        try:
            await connection.execute("ROLLBACK")
        except Exception as error:  # noqa: BLE001 - the first one is raised
            log.debug("could not roll back: %s", error)
            self._line.drop()

    async def _commit(self, connection: Connection, transaction: str) -> None:
        """Commit. If the answer does not come, ask on another connection: it must not be done twice."""
        try:
            await connection.execute("COMMIT")
        except Exception as error:
            if not is_lost(error):
                raise
            self._line.drop()
            if not await self.was_committed(transaction):
                raise

    async def was_committed(self, transaction: str) -> bool:
        """Whether a transaction was committed. Raises CommitUnknownError if the server does not say in time."""
        line = Line(self._line.server)  # the writer's may be in use
        try:
            async with asyncio.timeout(line.server.answer_s):
                while (status := await _status(line, transaction)) == "in progress":  # noqa: ASYNC110
                    await asyncio.sleep(_SETTLE_POLL_S)
        except TimeoutError as error:
            raise CommitUnknownError(self._where, transaction) from error
        finally:
            line.drop()
        return status == "committed"


async def _status(line: Line, transaction: str) -> str:
    """What became of a transaction (PostgreSQL, 9.27.8); "in progress" if the server cannot be asked."""
    query = "SELECT pg_xact_status(CAST(CAST($1 AS TEXT) AS xid8))"
    try:
        return await (await line.connection()).fetchval(query, transaction) or "aborted"
    except asyncpg.InvalidParameterValueError:
        return "aborted"  # an id of the future: a standby took over before it heard of it
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is not known
        log.debug("could not ask for transaction %s: %s", transaction, error)
        line.drop()
        return "in progress"

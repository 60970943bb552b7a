"""Reads that may take long, each in one snapshot, on a few connections."""

import asyncio
from typing import TypeVar

from gateway.store.database import Work
from gateway.store.postgres.connections import Line, Server
from gateway.store.postgres.db import Connection, PostgresDb, Statements
from gateway.store.postgres.failures import failure, is_lost, may_succeed_again

T = TypeVar("T")


class Reader:
    """Runs in the event loop of the store."""

    def __init__(self, server: Server, count: int, statements: Statements) -> None:
        self._lines = tuple(Line(server) for _ in range(count))
        self._statements = statements
        self._where = server.where
        self._begin = server.begin(snapshot=True)
        self._free: asyncio.LifoQueue[Line] = asyncio.LifoQueue()
        for line in self._lines:
            self._free.put_nowait(line)

    async def stop(self) -> None:
        """Close the connections, once their reads are done."""
        for _ in self._lines:
            await (await self._free.get()).close()

    async def read(self, work: Work[T]) -> T:
        """Do `work` in a snapshot and return its result. Raises StoreUnavailable, and what `work` raises."""
        line = await self._free.get()
        try:
            return await self._attempt(line, work)
        finally:
            self._free.put_nowait(line)

    async def _attempt(self, line: Line, work: Work[T]) -> T:
        try:
            return await self._snapshot(line, work)
        except Exception as error:
            if not (is_lost(error) or may_succeed_again(error)):
                raise failure(self._where, error) from error
        line.drop()
        try:
            return await self._snapshot(line, work)
        except Exception as error:
            if is_lost(error):
                line.drop()
            raise failure(self._where, error) from error

    async def _snapshot(self, line: Line, work: Work[T]) -> T:
        connection = await line.connection()
        await connection.execute(self._begin)
        try:
            return await work(PostgresDb(connection, self._statements))
        finally:
            await _end(connection)


async def _end(connection: Connection) -> None:
    """There is nothing to commit."""
    try:
        await connection.execute("ROLLBACK")
    except Exception:  # noqa: BLE001 - what the work raised says why
        connection.terminate()

"""The store on PostgreSQL: point reads in the event loop of the requests, everything else in a loop of its own thread.

So transcripts are hashed and parsed beside the requests, as SQLite's threads do. READ COMMITTED everywhere but in slow
reads, which have a snapshot; what has to stay as it was read is locked (`gateway.store.postgres.writer`).
"""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import asyncpg
import uvloop

from gateway.errors import StartError
from gateway.records import Session, Window
from gateway.store.ballast import Reserve
from gateway.store.database import Db, Work
from gateway.store.postgres import point_reads
from gateway.store.postgres.connections import Line, Server
from gateway.store.postgres.db import Statements
from gateway.store.postgres.failures import CommitUnknownError, why_not_opened
from gateway.store.postgres.point_reads import FIRST_LINKS, PointReads
from gateway.store.postgres.reader import Reader
from gateway.store.postgres.schema import migrate
from gateway.store.postgres.writer import Writer
from gateway.store.store import Store
from gateway.store.types import StoreCheck, TurnRecord

T = TypeVar("T")
_READERS = 2
CONNECTIONS = 1 + _READERS + 1
"""Connections of each process: point reads, slow reads and the writer."""


class PostgresStore(Store):
    """The store in a database. Several gateways may use it."""

    reads_wait = True

    def __init__(self, server: Server, *, turns_kept: int, responses_kept: int = 10_000, workers: int = 1) -> None:
        super().__init__(turns_kept=turns_kept, responses_kept=responses_kept)
        self._server = server
        self._workers = workers
        self._statements = Statements()
        self._uncertain: tuple[Sequence[TurnRecord], str] | None = None  # turns, and the transaction they were in
        self.store_id = ""

    async def __aenter__(self) -> "PostgresStore":
        """Bring the schema up to date. Raises StartError."""
        self.store_id = await self._prepare()
        self._points = PointReads(Line(self._server), self._statements)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="store", daemon=True)
        self._thread.start()
        self._writer, self._reader = await self._beside(self._open_beside())
        return self

    async def _prepare(self) -> str:
        try:
            connection = await self._server.connect()
            try:
                return await migrate(connection)
            finally:
                await connection.close()
        except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            reason = why_not_opened(error)
            raise StartError(f"the store {self._server.where} cannot be opened: {reason}") from error

    async def _open_beside(self) -> tuple[Writer, Reader]:
        return Writer(Line(self._server), self._statements), Reader(self._server, _READERS, self._statements)

    async def __aexit__(self, *_: object) -> None:
        await self._beside(self._writer.stop())
        await self._beside(self._reader.stop())
        await self._points.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def _beside(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the store's own event loop. It is done even if the caller is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop)))

    async def run_inline(self, work: Work[T]) -> T:
        return await self._points.run(work)

    async def run_read(self, work: Work[T]) -> T:
        return await self._beside(self._reader.read(work))

    async def run_write(
        self, work: Work[T], reserve: Reserve = Reserve.NONE, *, shared: bool = False, durable: bool = True
    ) -> T:
        future = asyncio.run_coroutine_threadsafe(self._writer.write(work, shared=shared), self._loop)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await asyncio.wait([waiting])  # it will be done: a cancelled caller has to hold its lock on pins until then
            raise

    async def session(self, tenant: str, session_id: str) -> Session | None:
        """See `session_rows.session`."""
        return await self._points.ask(point_reads.sessions, (tenant, session_id))

    async def window(self, tenant: str, name: str) -> Window | None:
        """See `window_rows.window`."""
        return await self._points.ask(point_reads.windows, (tenant, name))

    async def sessions_by_prefix(self, tenant: str, links: Sequence[bytes]) -> tuple[bytes | None, list[Session]]:
        """See `session_rows.sessions_by_prefix`."""
        found = await self._points.ask(point_reads.beginnings, (tenant, links[:FIRST_LINKS]))
        if found[0] is None and len(links) > FIRST_LINKS:
            return await super().sessions_by_prefix(tenant, links[FIRST_LINKS:])
        return found

    async def record(self, records: Sequence[TurnRecord], *, last: bool = False) -> None:
        """See `Store.record`. Turns that may have been recorded before the server was lost are not recorded twice."""
        if self._uncertain is not None and self._uncertain[0] is records:
            if await self._beside(self._writer.was_committed(self._uncertain[1])):
                self._uncertain = None
                return
            self._uncertain = None
        try:
            await super().record(records, last=last)
        except CommitUnknownError as error:
            self._uncertain = records, error.transaction
            raise

    async def numbers_given(self, numbered: Sequence[tuple[str, str]]) -> None:
        """See `Store.numbers_given`: the next ones follow them."""
        for table, column in numbered:
            query = f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), max({column})) FROM {table}"
            await self.run_write(lambda db, query=query: db.value(query))  # type: ignore[misc]

    async def examine(self) -> StoreCheck:
        """See `Store.examine`."""
        return await self.run_read(_examine(self._server.where, self._workers * CONNECTIONS))


def _examine(where: str, needed: int) -> Work[StoreCheck]:
    async def examine(db: Db) -> StoreCheck:
        version = await db.value("SHOW server_version")
        most = int(await db.value("SHOW max_connections")) - int(await db.value("SHOW superuser_reserved_connections"))
        used = await db.value("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
        counted = f"{used} of {most} connections are in use, {needed} by this gateway at most"
        if used + needed > most:
            return StoreCheck(
                "warning", f"the store {where} is running out of connections: {counted}",
                "raise max_connections of the server, or put PgBouncer in front of it",
            )  # fmt: skip
        return StoreCheck("ok", f"PostgreSQL {version} answers; {counted}")

    return examine

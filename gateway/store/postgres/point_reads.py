"""The reads that a request waits for, on one connection: what is asked while another is under way goes together.

A pool would cost more than the read: it resets each connection that comes back, which is a round trip.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

from gateway.records import Session, Window
from gateway.store import session_rows, window_rows
from gateway.store.database import Work
from gateway.store.postgres.connections import Line
from gateway.store.postgres.db import PostgresDb, Statements
from gateway.store.postgres.failures import failure, is_lost, may_succeed_again

K = TypeVar("K")
T = TypeVar("T")
Beginning = tuple[bytes | None, list[Session]]
ForAll = Callable[[PostgresDb, Sequence[Any]], Coroutine[Any, Any, Sequence[Any]]]
FIRST_LINKS = 3  # of a prefix chain, that are asked for together


class _Asked(NamedTuple):
    read: ForAll
    key: Any
    future: asyncio.Future[Any]


class PointReads:
    """Runs in the event loop of the requests."""

    def __init__(self, line: Line, statements: Statements) -> None:
        self._line = line
        self._statements = statements
        self._where = line.server.where
        self._waiting: list[_Asked] = []
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._serve(), name="store-point-reads")

    async def stop(self) -> None:
        """Close the connection."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._line.close()

    async def ask(self, read: Callable[[PostgresDb, Sequence[K]], Coroutine[Any, Any, Sequence[T]]], key: K) -> T:
        """Return what `read` reads for a key, together with the other keys that it is asked for at the moment.

        Raises StoreUnavailable, and what `read` raises.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(read, key, future))
        self._wake.set()
        return await future

    async def run(self, work: Work[T]) -> T:
        """Do `work`, which reads a row or two, and return its result. Raises as `ask`."""
        return await self.ask(_each, work)

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            for read in dict.fromkeys(one.read for one in waiting):
                await self._answer(read, [one for one in waiting if one.read is read and not one.future.done()])

    async def _answer(self, read: ForAll, asked: Sequence[_Asked]) -> None:
        try:
            found = await self._attempt(read, [one.key for one in asked])
        except Exception as error:  # noqa: BLE001 - its callers get it
            for one in asked:
                if not one.future.done():
                    one.future.set_exception(error)
            return
        for one, value in zip(asked, found, strict=True):
            if not one.future.done():
                if isinstance(value, Exception):
                    one.future.set_exception(value)
                else:
                    one.future.set_result(value)

    async def _attempt(self, read: ForAll, keys: Sequence[Any]) -> Sequence[Any]:
        try:
            return await self._read(read, keys)
        except Exception as error:
            if not (is_lost(error) or may_succeed_again(error)):
                raise failure(self._where, error) from error
        self._line.drop()
        try:
            return await self._read(read, keys)
        except Exception as error:
            if is_lost(error):
                self._line.drop()
            raise failure(self._where, error) from error

    async def _read(self, read: ForAll, keys: Sequence[Any]) -> Sequence[Any]:
        return await read(PostgresDb(await self._line.connection(), self._statements), keys)


async def _each(db: PostgresDb, works: Sequence[Work[Any]]) -> list[Any]:
    """The result of each work, or what it raised, unless the connection was lost."""
    results: list[Any] = []
    for work in works:
        try:
            results.append(await work(db))
        except Exception as error:
            if is_lost(error) or may_succeed_again(error):
                raise
            results.append(error)
    return results


async def sessions(db: PostgresDb, keys: Sequence[tuple[str, str]]) -> list[Session | None]:
    """The sessions of these tenants and ids."""
    if len(keys) == 1:
        return [await session_rows.session(db, *keys[0])]
    rows = await db.all(_SESSIONS, [tenant for tenant, _ in keys], [session_id for _, session_id in keys])
    found = {(row[0], row[1]): Session(*row) for row in rows}
    return [found.get(key) for key in keys]


async def windows(db: PostgresDb, keys: Sequence[tuple[str, str]]) -> list[Window | None]:
    """The windows of these tenants and names."""
    if len(keys) == 1:
        return [await window_rows.window(db, *keys[0])]
    rows = await db.all(_WINDOWS, [tenant for tenant, _ in keys], [name for _, name in keys])
    found = {(row[0], row[1]): window_rows.of_row(row) for row in rows}
    return [found.get(key) for key in keys]


async def beginnings(db: PostgresDb, keys: Sequence[tuple[str, Sequence[bytes]]]) -> list[Beginning]:
    """What `session_rows.sessions_by_prefix` returns for each tenant and first links."""
    if len(keys) == 1 and keys[0][1]:
        return [await _beginning(db, *keys[0])]
    links = [(n, tenant, at, link) for n, (tenant, chain) in enumerate(keys) for at, link in enumerate(chain)]
    rows = await db.all(_BEGINNINGS, *([list(column) for column in zip(*links, strict=True)] or ([], [], [], [])))
    found: list[Beginning] = [(None, []) for _ in keys]
    for n, link, *session in rows:
        found[n][1].append(Session(*session))
        found[n] = link, found[n][1]
    return found


async def _beginning(db: PostgresDb, tenant: str, links: Sequence[bytes]) -> Beginning:
    """The same for one request. PostgreSQL plans the statement for many anew each time, which takes longer than it."""
    padded = [*links, *repeat(links[-1], FIRST_LINKS - len(links))]
    rows = await db.all(_BEGINNING, tenant, *padded)
    return (rows[0][0], [Session(*session) for _, *session in rows]) if rows else (None, [])


_SESSIONS = f"""SELECT {session_rows.JOINED_COLUMNS} FROM unnest(?1::text[], ?2::text[]) k (tenant, id)
    JOIN sessions s ON s.tenant = k.tenant AND s.id = k.id"""
_WINDOWS = f"""SELECT {window_rows.JOINED_COLUMNS} FROM unnest(?1::text[], ?2::text[]) k (tenant, name)
    JOIN windows w ON w.tenant = k.tenant AND w.name = k.name"""
_BEGINNINGS = f"""WITH longest AS (
        SELECT DISTINCT ON (k.n) k.n, k.tenant, k.link
        FROM unnest(?1::bigint[], ?2::text[], ?3::bigint[], ?4::bytea[]) k (n, tenant, place, link)
        WHERE EXISTS (SELECT 1 FROM session_prefixes p WHERE p.tenant = k.tenant AND p.link = k.link)
        ORDER BY k.n, k.place)
    SELECT l.n, l.link, s.* FROM longest l CROSS JOIN LATERAL (
        {session_rows.BY_PREFIX.format(tenant="l.tenant", link="l.link", limit=session_rows.CANDIDATES)}) s"""
_BEGINNING = f"""SELECT l.link, s.* FROM (
        SELECT k.link
        FROM (VALUES (1, CAST(?2 AS bytea)), (2, CAST(?3 AS bytea)), (3, CAST(?4 AS bytea))) k (place, link)
        WHERE EXISTS (SELECT 1 FROM session_prefixes p WHERE p.tenant = ?1 AND p.link = k.link)
        ORDER BY k.place LIMIT 1) l CROSS JOIN LATERAL (
        {session_rows.BY_PREFIX.format(tenant="?1", link="l.link", limit=session_rows.CANDIDATES)}) s"""

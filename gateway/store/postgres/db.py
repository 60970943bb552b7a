"""Operations on a connection to PostgreSQL."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
from blake3 import blake3

from gateway.store.database import WordIndex
from gateway.store.postgres import words
from gateway.store.postgres.sql import translated

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection


class TextsNotLockedError(Exception):
    """An operation is about to delete text that others may be adding to. It is run again, alone."""


class Statements:
    """Statements by the text that they were translated from: there are some hundred."""

    def __init__(self) -> None:
        self._translated: dict[str, str] = {}

    def get(self, sql: str) -> str:
        """A statement in PostgreSQL's words."""
        found = self._translated.get(sql)
        if found is None:
            found = self._translated[sql] = translated(sql)
        return found


class PostgresDb:
    """A `gateway.store.database.Db`. `alone`: no other transaction writes until this one is over."""

    __slots__ = ("_alone", "_statements", "connection")

    def __init__(self, connection: Connection, statements: Statements, *, alone: bool = False) -> None:
        self.connection = connection
        self._statements = statements
        self._alone = alone

    @property
    def words(self) -> WordIndex:
        """See `Db.words`."""
        return words

    async def one(self, sql: str, *args: Any) -> Any:
        """See `Db.one`."""
        return await self.connection.fetchrow(self._statements.get(sql), *_bindable(args))

    async def value(self, sql: str, *args: Any) -> Any:
        """See `Db.value`."""
        return await self.connection.fetchval(self._statements.get(sql), *_bindable(args))

    async def all(self, sql: str, *args: Any) -> list[Any]:
        """See `Db.all`."""
        return [tuple(row) for row in await self.connection.fetch(self._statements.get(sql), *_bindable(args))]

    async def run(self, sql: str, *args: Any) -> int:
        """See `Db.run`."""
        status = await self.connection.execute(self._statements.get(sql), *_bindable(args))
        count = status.rpartition(" ")[2]
        return int(count) if count.isdecimal() else 0

    async def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Db.many`."""
        if values := [_bindable(row) for row in rows]:
            await self.connection.executemany(self._statements.get(sql), values)

    async def now(self) -> float:
        """See `Db.now`."""
        return float(await self.connection.fetchval("SELECT extract(epoch FROM clock_timestamp())"))

    async def lock(self, names: Iterable[str]) -> None:
        """See `Db.lock`."""
        if not self._alone:
            keys = sorted({int.from_bytes(blake3(name.encode()).digest(8), signed=True) for name in names})
            await self.connection.execute("SELECT pg_advisory_xact_lock(k) FROM unnest($1::bigint[]) k", keys)

    async def lock_texts(self) -> None:
        """See `Db.lock_texts`."""
        if not self._alone:
            raise TextsNotLockedError


def _bindable(values: Sequence[Any]) -> Sequence[Any]:
    """The values, without what PostgreSQL's text has no room for."""
    if any(type(value) is str and "\0" in value for value in values):
        return [value.replace("\0", "\ufffd") if type(value) is str else value for value in values]
    return values

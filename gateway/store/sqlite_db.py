"""Operations on a connection of SQLite. Every statement is answered at once, so these coroutines never wait."""

import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.store import search_index
from gateway.store.database import WordIndex


class SqliteDb:
    """A `gateway.store.database.Db`. One transaction writes at a time, so nothing has to be locked."""

    __slots__ = ("_execute", "connection")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._execute = connection.execute

    @property
    def words(self) -> WordIndex:
        """See `Db.words`."""
        return search_index

    async def one(self, sql: str, *args: Any) -> Any:
        """See `Db.one`."""
        return self._execute(sql, args).fetchone()

    async def value(self, sql: str, *args: Any) -> Any:
        """See `Db.value`."""
        row = self._execute(sql, args).fetchone()
        return row[0] if row else None

    async def all(self, sql: str, *args: Any) -> list[Any]:
        """See `Db.all`."""
        return self._execute(sql, args).fetchall()

    async def run(self, sql: str, *args: Any) -> int:
        """See `Db.run`."""
        return self._execute(sql, args).rowcount

    async def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Db.many`."""
        self.connection.executemany(sql, rows)

    async def now(self) -> float:
        """See `Db.now`."""
        return time.time()

    async def lock(self, names: Iterable[str]) -> None:
        """See `Db.lock`."""

    async def lock_texts(self) -> None:
        """See `Db.lock_texts`."""

"""Connections to PostgreSQL, each opened when it is needed, and again after it was lost."""

from dataclasses import dataclass
from urllib.parse import urlsplit

import asyncpg

from gateway.store.postgres.db import Connection

_CONNECT_S = 5.0
_CLOSE_S = 2.0
_READ = " ISOLATION LEVEL REPEATABLE READ, READ ONLY"
# After five times PostgreSQL plans a statement for any values (PREPARE, Notes). For a search it then reads the index of
# words not at all, but every message: a rare word and a common one need different plans.
_PLAN = "SET LOCAL plan_cache_mode = force_custom_plan"


@dataclass(frozen=True, slots=True)
class Server:
    """Where the store is. `statement_cache`: prepared statements of each connection.

    A server that does not answer a statement within `answer_s` seconds counts as lost.
    """

    url: str
    statement_cache: int = 200
    answer_s: float = 10.0

    @property
    def where(self) -> str:
        """Its address without user, password and parameters, for messages."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def begin(self, *, snapshot: bool = False) -> str:
        """What begins a transaction. A gateway that stops in the middle of one must not keep the others waiting."""
        limit = f"SET LOCAL idle_in_transaction_session_timeout = {int(self.answer_s * 1000)}"
        return f"BEGIN{_READ}; {limit}; {_PLAN}" if snapshot else f"BEGIN; {limit}"

    async def connect(self) -> Connection:
        """Open a connection. Raises what asyncpg raises, OSError and TimeoutError."""
        return await asyncpg.connect(
            self.url,
            timeout=min(_CONNECT_S, self.answer_s),
            command_timeout=self.answer_s,
            statement_cache_size=self.statement_cache,
            max_cached_statement_lifetime=0,
        )


class Line:
    """One connection, for one piece of work at a time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._connection: Connection | None = None

    async def connection(self) -> Connection:
        """The connection; opened if there is none. Raises as `Server.connect`."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self.server.connect()
        return self._connection

    def drop(self) -> None:
        """End a connection that is of no use any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def close(self) -> None:
        """Say goodbye to the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=_CLOSE_S)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()

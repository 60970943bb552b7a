"""Connections to PostgreSQL, each opened when it is needed, and again after it was lost."""

from dataclasses import dataclass

import asyncpg

from gateway.store.postgres.db import Connection

ANSWER_S = 10.0  # within which a statement is answered; a server that is silent for longer counts as lost
_CONNECT_S = 5.0
_CLOSE_S = 2.0
# A gateway that stops in the middle of a transaction must not keep the others waiting.
BEGIN = f"BEGIN; SET LOCAL idle_in_transaction_session_timeout = {int(ANSWER_S * 1000)}"


@dataclass(frozen=True, slots=True)
class Server:
    """Where the store is. `statement_cache`: prepared statements of each connection."""

    url: str
    statement_cache: int

    async def connect(self) -> Connection:
        """Open a connection. Raises what asyncpg raises, OSError and TimeoutError."""
        return await asyncpg.connect(
            self.url,
            timeout=_CONNECT_S,
            command_timeout=ANSWER_S,
            statement_cache_size=self.statement_cache,
            max_cached_statement_lifetime=0,
        )


class Line:
    """One connection, for one piece of work at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection: Connection | None = None

    async def connection(self) -> Connection:
        """The connection; opened if there is none. Raises as `Server.connect`."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._server.connect()
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

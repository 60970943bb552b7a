"""The connection to a client, for what ASGI does not cover.

With `receive` and `send`, a second task has to wait for `http.disconnect`, and each chunk of a stream is a message of
its own. Both would be most of what the relay costs, so the server puts this into the scope's extensions.
"""

from collections.abc import Callable
from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "gateway.client_connection"


class ClientConnection(Protocol):
    """The connection of the client of one request."""

    @property
    def gone(self) -> bool:
        """Whether the connection is closed."""
        ...

    @property
    def is_chunked(self) -> bool:
        """Whether the response that has begun is sent in HTTP chunks."""
        ...

    def body(self) -> bytes | None:
        """The body of the request if it is complete, None if some of it is still to come."""
        ...

    def watch(self, on_gone: Callable[[], None] | None, on_writable: Callable[[], None] | None) -> None:
        """Call these when the client has disconnected, and when it has caught up."""
        ...

    def write(self, data: bytes, *, hold: bool = False) -> bool:
        """Send bytes as they are, now or (`hold`) with the next ones; return whether the client keeps up."""
        ...


def client_of(scope: Scope) -> ClientConnection:
    """The client of a request."""
    return cast(ClientConnection, scope["extensions"][EXTENSION])

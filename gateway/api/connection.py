"""The connection to a client, for what ASGI does not cover.

Through `receive` and `send`, a second task has to wait for `http.disconnect`, and each chunk of a stream is a message
of its own. Both are most of what the relay would cost, so the server puts this beside them, in the scope's extensions.
"""

from collections.abc import Callable
from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "gateway.client_connection"


class ClientConnection(Protocol):
    """What the server knows of the client of one request."""

    @property
    def gone(self) -> bool:
        """Whether the connection is closed."""
        ...

    @property
    def is_chunked(self) -> bool:
        """Whether the answer that has begun goes out in HTTP chunks."""
        ...

    def body(self) -> bytes | None:
        """The body of the request if all of it is there, None if it must be waited for."""
        ...

    def watch(self, on_gone: Callable[[], None] | None, on_writable: Callable[[], None] | None) -> None:
        """Call these when the client has left, and when it has caught up; None: nobody."""
        ...

    def write(self, data: bytes, *, hold: bool = False) -> bool:
        """Send bytes as they are, now or with what is sent next; return whether the client keeps up."""
        ...


def client_of(scope: Scope) -> ClientConnection:
    """The client of a request."""
    return cast(ClientConnection, scope["extensions"][EXTENSION])

"""Send requests to the gateway's own APIs from within this process."""

import asyncio
from collections.abc import Callable
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Scope

from gateway.api.asgi import Headers
from gateway.api.connection import EXTENSION


class InProcessConnection:
    """The client of a request that comes from this process. See `gateway.api.connection.ClientConnection`."""

    gone = False
    is_chunked = False

    def __init__(self, body: bytes) -> None:
        self._body = body

    def body(self) -> bytes:
        """See `ClientConnection.body`."""
        return self._body

    def watch(self, on_gone: Callable[[], None] | None, on_writable: Callable[[], None] | None) -> None:
        """See `ClientConnection.watch`: it neither leaves nor lags."""

    def write(self, data: bytes, *, hold: bool = False) -> bool:
        """See `ClientConnection.write`."""
        raise NotImplementedError(
            "writing past ASGI is for chunked responses, and in-process responses are not chunked"
        )


async def call_app(app: ASGIApp, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    """Send a body to one of our own doors; return the status and the whole answer."""
    status, pieces = 500, list[bytes]()

    async def take(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        pieces.append(message.get("body", b""))

    await app(scope("POST", path, b"", body, headers), nothing_more, take)
    return status, b"".join(pieces)


def scope(method: str, path: str, query: bytes, body: bytes, headers: Headers) -> Scope:
    """A request of our own; `path` as it is read, not as it is sent."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path, safe="/:").encode(),
        "query_string": query,
        "root_path": "",
        "headers": [*headers, (b"content-length", b"%d" % len(body))],
        "extensions": {EXTENSION: InProcessConnection(body)},
    }


async def nothing_more() -> Message:
    """What comes after the body: nothing, for ever."""
    return await asyncio.Future()

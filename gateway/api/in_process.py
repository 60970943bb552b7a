"""Send requests to the gateway's own APIs from within this process."""

import asyncio
from collections.abc import Callable
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Scope

from gateway.api.connection import EXTENSION
from gateway.engines.connection import Headers


class InProcessConnection:
    """The `ClientConnection` of a request from this process."""

    gone = False
    is_chunked = False

    def __init__(self, body: bytes) -> None:
        self._body = body

    def body(self) -> bytes:
        """The whole body."""
        return self._body

    def watch(self, on_gone: Callable[[], None] | None, on_writable: Callable[[], None] | None) -> None:
        """Do nothing: this client neither disconnects nor lags."""

    def write(self, data: bytes, *, hold: bool = False) -> bool:
        """Raise NotImplementedError: only chunked responses are written past ASGI, and these are not chunked."""
        raise NotImplementedError


async def call_app(app: ASGIApp, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    """Send a body to an application of our own; return the status and the whole answer."""
    status, pieces = 500, list[bytes]()

    async def receive(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        pieces.append(message.get("body", b""))

    await app(scope("POST", path, b"", body, headers), nothing_more, receive)
    return status, b"".join(pieces)


def scope(method: str, path: str, query: bytes, body: bytes, headers: Headers) -> Scope:
    """A request of our own, with the decoded `path`."""
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
    """The message after the body, which never comes."""
    return await asyncio.Future()

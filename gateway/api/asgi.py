"""ASGI helpers: read a body within its limits, and send a small response."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast

import orjson
from starlette.types import Message, Receive, Scope, Send

from gateway.api.connection import ClientConnection, client_of
from gateway.errors import GatewayError
from gateway.settings import Settings
from gateway.validation import json_limits
from gateway.validation.shown import shown

MAX_PARAMETERS = 50
"""Of a query; no route has half as many, even with each tag as a parameter."""


class ClientGone(Exception):
    """The client closed the connection."""


_MIN_RATE = 64 * 1024  # bytes per second on average, after `body_timeout_s`


async def read_body(scope: Scope, receive: Receive, settings: Settings, max_bytes: int | None = None) -> bytes:
    """Read the whole request body, within `max_body_bytes` or a lower limit.

    Raises `payload_too_large`; `request_timeout` if no data arrives for `client_timeout_s`, or not all of it within
    `body_timeout_s` plus 1 s for each 64 KiB; ClientGone.
    """
    limit = min(max_bytes or settings.max_body_bytes, settings.max_body_bytes)
    body = client_of(scope).body()
    if body is not None and len(body) > limit:
        raise _too_large(limit, "max_body_bytes")
    if body is not None:
        return body
    pieces = [piece async for piece in _pieces(scope, receive, settings, limit, "max_body_bytes")]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def stream_body(scope: Scope, receive: Receive, settings: Settings) -> AsyncIterator[bytes]:
    """Read the request body piece by piece, within `max_import_bytes`. Raises as `read_body` does."""
    return _pieces(scope, receive, settings, settings.max_import_bytes, "max_import_bytes")


async def _pieces(scope: Scope, receive: Receive, settings: Settings, limit: int, setting: str) -> AsyncIterator[bytes]:
    """The non-empty parts of a body as they arrive."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if int(declared) > limit:  # httptools has checked that it is a number
        raise _too_large(limit, setting)
    size, more = 0, True
    began = time.monotonic()
    while more:
        message = await _next(receive, settings.client_timeout_s)
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > limit:
            raise _too_large(limit, setting)
        if more and time.monotonic() - began > settings.body_timeout_s + size / _MIN_RATE:
            raise GatewayError("request_timeout", f"the body did not arrive within {settings.body_timeout_s:g} s")
        if piece:
            yield piece


def parse_object(body: bytes, most_values: int) -> dict[str, Any]:
    """Parse a JSON object. Raises `invalid_request`, `too_complex`."""
    try:
        value = json_limits.parse(body, most_values)
    except orjson.JSONDecodeError as error:
        raise GatewayError("invalid_request", f"the body is not JSON: {error}", hint="send a JSON object") from error
    if not isinstance(value, dict):
        message = f"the body is a JSON {type(value).__name__}, not an object"
        raise GatewayError("invalid_request", message, hint="send a JSON object")
    return value


def require_json(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise `invalid_request` unless the headers say that the body is JSON."""
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    if kind.partition(b";")[0].strip().lower() != b"application/json":
        raise GatewayError(
            "invalid_request",
            f"the content type is {shown(kind.decode('latin-1')) if kind else 'missing'}",
            hint="send content-type: application/json",
            details={"field": "content-type"},
        )


async def send_answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send a JSON answer."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


class CancelOnDisconnect:
    """Cancels the block when the client disconnects, and raises ClientGone instead.

    Other cancellations are recognised the way `asyncio.timeout` does it.
    """

    def __init__(self, client: ClientConnection) -> None:
        self._client = client
        self._gone = False
        self.on_writable: Callable[[], None] | None = None

    def __enter__(self) -> "CancelOnDisconnect":
        if self._client.gone:
            raise ClientGone
        self._task = cast("asyncio.Task[None]", asyncio.current_task())  # ASGI always runs in one
        self._cancelling = self._task.cancelling()
        self._client.watch(self._on_gone, self._on_writable)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        self._client.watch(None, None)
        if self._gone and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ClientGone from value

    def _on_gone(self) -> None:
        self._gone = True
        self._task.cancel()

    def _on_writable(self) -> None:
        if self.on_writable is not None:
            self.on_writable()


async def _next(receive: Receive, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError as error:
        raise GatewayError("request_timeout", f"nothing of the body arrived for {timeout_s:g} s") from error
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message


def _too_large(limit: int, setting: str) -> GatewayError:
    return GatewayError("payload_too_large", f"the body is larger than {limit} bytes", hint=f"{setting} sets the limit")


def not_found(path: str) -> GatewayError:
    """The error for a path that no API serves."""
    return GatewayError(
        "not_found", f"nothing is served at {shown(path, 200)}", hint="see /admin/openapi.json and /v1/models"
    )


def bounded_query(query: bytes) -> None:
    """Raise `too_complex` for a query with too many parameters, before it is parsed."""
    if query.count(b"&") >= MAX_PARAMETERS:
        raise GatewayError("too_complex", f"the query has more than {MAX_PARAMETERS} parameters", hint="send fewer")

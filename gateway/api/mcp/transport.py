"""MCP over HTTP, at /mcp, with the key and the limits of every API. Tools call the admin API in this process."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlencode

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import auth, in_process
from gateway.api.asgi import ClientGone, read_body
from gateway.api.endpoint import MAX_JSON_BYTES, error_answer
from gateway.api.mcp.admin_request import AdminRequest, Ask, Json, ReportProgress
from gateway.api.operation import NDJSON
from gateway.errors import GatewayError
from gateway.sessions import client_ids
from gateway.settings import Settings
from gateway.telemetry.trace_context import TRACEPARENT
from gateway.validation import json_limits

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

OverHttp = Callable[[Callable[[Any], Ask], int], "StreamableHTTPSessionManager"]

PATHS = ("/mcp", "/mcp/")
# Bounds on reading a refused body. MCP's own client gives up its connection, and every other call on it, if it is
# still sending when the answer comes and the socket is closed.
_MAX_DRAINED = 2**24
_DRAIN_S = 10.0
_PASSED_ON = frozenset({*auth.KEY_HEADERS, *client_ids.HEADERS, TRACEPARENT, b"x-request-id"})


class McpTransport:
    """Serves MCP. Its library takes 30 MB and most of a second, so the first client loads it."""

    def __init__(self, admin: ASGIApp, settings: Settings) -> None:
        self._admin = admin
        self._settings = settings
        self._limit = min(MAX_JSON_BYTES, settings.max_body_bytes)
        self._opened = asyncio.Event()
        self._loading: asyncio.Task[OverHttp] | None = None
        self._running: asyncio.Task[None] | None = None
        self._manager: StreamableHTTPSessionManager

    async def __aenter__(self) -> "McpTransport":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            body = await self._read(scope, receive)
        except ClientGone:
            return
        except GatewayError as error:
            if error.code == "payload_too_large":
                await _drain(receive)
                error = GatewayError(error.code, error.message, hint="no tool takes so much")
            answer = error_answer(error)
            if error.code == "unauthorized":
                answer.headers["www-authenticate"] = "Bearer"
            if error.code == "method_not_allowed":
                answer.headers["allow"] = "POST"
            await answer(scope, receive, send)
            return
        manager = await self._open()
        await manager.handle_request(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        auth.refuse_foreign(scope["headers"], self._settings.allowed_origins)
        auth.tenant(scope["headers"], self._settings.api_key, self._settings.allowed_origins)
        if scope["method"] != "POST":
            why = "the server starts no streams, and has no sessions to end"
            raise GatewayError("method_not_allowed", f"{scope['method']} is not served here: {why}", hint="use POST")
        body = await read_body(scope, receive, self._settings, MAX_JSON_BYTES)
        with suppress(orjson.JSONDecodeError):  # MCP has its own error for that
            if isinstance(json_limits.parse(body, self._settings.max_json_values), list):
                hint = "send one message in each request"
                raise GatewayError("invalid_request", "batches of JSON-RPC are not served", hint=hint)
        return body

    async def _open(self) -> "StreamableHTTPSessionManager":
        if self._loading is None:
            self._loading = asyncio.create_task(asyncio.to_thread(_load))
        over_http = await asyncio.shield(self._loading)
        if self._running is None:
            self._manager = over_http(self._ask_of, self._limit)
            self._running = asyncio.create_task(self._run(), name="mcp")
        await self._opened.wait()
        return self._manager

    async def _run(self) -> None:
        async with self._manager.run():
            self._opened.set()
            await asyncio.Event().wait()

    def _ask_of(self, ctx: Any) -> Ask:
        headers = [(name, value) for name, value in ctx.request.scope["headers"] if name in _PASSED_ON]

        async def ask(request: AdminRequest, report: ReportProgress) -> Json:
            answer: Json = {}

            async def receive_line(message: Message) -> None:
                """One JSON object in each message that has a body: progress, and at last the result or the error."""
                nonlocal answer
                line = orjson.loads(message.get("body") or b"{}")
                if "progress" in line:
                    await report(line["progress"])
                elif line:
                    answer = line.get("result", line)

            await self._admin(_scope(request, headers), in_process.nothing_more, receive_line)
            return answer

        return ask


def _scope(request: AdminRequest, headers: list[tuple[bytes, bytes]]) -> Scope:
    body = b"" if request.body is None else orjson.dumps(request.body)
    headers = [*headers, (b"accept", NDJSON.encode())]
    if request.traceparent:  # closer to the call than that of the HTTP request
        headers = [one for one in headers if one[0] != TRACEPARENT]
        headers.append((TRACEPARENT, request.traceparent.encode()))
    return in_process.scope(request.method, unquote(request.path), urlencode(request.query).encode(), body, headers)


async def _drain(receive: Receive) -> None:
    """Read and discard the rest of a body, within bounds."""
    left = _MAX_DRAINED
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            more = True
            while more and left > 0:
                message = await receive()
                more = message.get("more_body", False)
                left -= len(message.get("body", b""))


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receive a body that was read already, and then what comes after it."""
    left = [body]

    async def receive_again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return receive_again


def _load() -> OverHttp:
    from gateway.api.mcp.server import over_http  # noqa: PLC0415 - see McpTransport

    return over_http

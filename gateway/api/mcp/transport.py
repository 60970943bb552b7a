"""MCP over HTTP, at /mcp: the key and limits of every API, and tools that call the admin API in this process."""

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
from gateway.api.mcp.parameters import AdminRequest, Ask, Json, Tell
from gateway.api.operation import NDJSON
from gateway.errors import GatewayError
from gateway.settings import Settings
from gateway.validation import json_limits

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

OverHttp = Callable[[Callable[[Any], Ask], int], "StreamableHTTPSessionManager"]

PATH = "/mcp"
# What a client may send in vain. MCP's own client gives up its connection, and every other call on it, when the answer
# comes while it still sends and the socket is closed on it.
_MOST_IN_VAIN = 2**24
_VAIN_S = 10.0


class McpTransport:
    """Serves MCP. Its library costs 30 MB and most of a second, so it is loaded when the first client comes."""

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
            body = await self._let_in(scope, receive)
        except ClientGone:
            return
        except GatewayError as error:
            if error.code == "payload_too_large":
                await _drain(receive)
                error.hint = "no tool takes so much"
            answer = error_answer(error)
            if error.code == "unauthorized":
                answer.headers["www-authenticate"] = "Bearer"
            if error.code == "method_not_allowed":
                answer.headers["allow"] = "POST"
            await answer(scope, receive, send)
            return
        manager = await self._open()
        await manager.handle_request(scope, _again(body, receive), send)

    async def _let_in(self, scope: Scope, receive: Receive) -> bytes:
        auth.refuse_foreign(scope["headers"], self._settings.allowed_origins)
        auth.tenant(scope["headers"], self._settings.api_key, self._settings.allowed_origins)
        if scope["method"] != "POST":
            why = "there are no streams of the server's own, and no sessions to end"
            raise GatewayError("method_not_allowed", f"{scope['method']} is not served here: {why}", hint="use POST")
        body = await read_body(
            scope,
            receive,
            limit=self._limit,
            timeout_s=self._settings.client_timeout_s,
            body_timeout_s=self._settings.body_timeout_s,
        )
        with suppress(orjson.JSONDecodeError):  # MCP has its own words for that
            json_limits.parse(body, self._settings.max_json_values)
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
        keys = [(name, value) for name, value in ctx.request.scope["headers"] if name in auth.KEY_HEADERS]

        async def ask(request: AdminRequest, tell: Tell) -> Json:
            answer = _Answer(tell)
            await self._admin(_scope(request, keys), in_process.nothing_more, answer.take)
            return answer.whole

        return ask


class _Answer:
    """What the admin API sends to a request that watches progress: one JSON object in each message that has a body."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.whole: Json = {}

    async def take(self, message: Message) -> None:
        """Take the next message."""
        if not message.get("body"):
            return
        line = orjson.loads(message["body"])
        if "progress" in line:
            await self._tell(line["progress"])
        else:
            self.whole = line.get("result", line)


def _scope(request: AdminRequest, keys: list[tuple[bytes, bytes]]) -> Scope:
    body = b"" if request.body is None else orjson.dumps(request.body)
    headers = [*keys, (b"accept", NDJSON.encode())]
    return in_process.scope(request.method, unquote(request.path), urlencode(request.query).encode(), body, headers)


async def _drain(receive: Receive) -> None:
    """Read what is left of a body that nobody wants, within bounds."""
    left = _MOST_IN_VAIN
    with suppress(TimeoutError):
        async with asyncio.timeout(_VAIN_S):
            more = True
            while more and left > 0:
                message = await receive()
                more = message.get("more_body", False)
                left -= len(message.get("body", b""))


def _again(body: bytes, receive: Receive) -> Receive:
    """Receive a body that was read already, and then what comes after it."""
    left = [body]

    async def once_more() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return once_more


def _load() -> OverHttp:
    from gateway.api.mcp.server import over_http  # noqa: PLC0415 - see McpDoor

    return over_http

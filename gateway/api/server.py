"""uvicorn as the gateway runs it: no headers of its own, no log line per request, and limits on slow clients."""

import asyncio
import math
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.api import http_parser
from gateway.api.client_connections import Connections, detect_dead_peer
from gateway.api.connection import EXTENSION
from gateway.errors import StartError
from gateway.runtime import open_files
from gateway.runtime.stalls import LostSince, caused_by_own_stall
from gateway.settings import Settings

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the connection pools of the clients we know, so that the client closes first
_USER_TIMEOUT_MARGIN_S = 5.0  # our own limit on a client that reads nothing comes first: it allows for our stalls
_REFUSED_S = 1.0  # how long a client beyond the limit has to send its head and to read the response
_PROBES = frozenset({b"/healthz", b"/readyz"})
MAX_HEAD_BYTES = 64 * 1024  # request line and headers; agents send a few kilobytes
MAX_HEADERS = 200  # of a request; 64 KiB would hold 13,000
MAX_PIPELINED = 16  # requests that wait for the answer before them, on one connection
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class GatheringTransport:
    """Sends everything that is written in one iteration of the event loop at once.

    uvicorn writes the head and each chunk separately, and uvloop makes a system call for each write: that would be most
    of what a chunk costs. The bytes and the HTTP chunks stay the same, in fewer calls.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pending: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write it at the end of this iteration of the loop."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def write_now(self, data: bytes) -> None:
        """Write it at once, after what is pending."""
        self._pending.append(data)
        self._flush()

    def close(self) -> None:
        """Close after everything is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending)
            self._pending.clear()
            # A reset closes it before `connection_lost` is called, and uvloop raises for a write in between, here into
            # a callback of the engine's connection.
            if not self._transport.is_closing():
                self._transport.write(data)


class _Refused(Exception):
    """Ends the parser: the request will not be served."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounds on the head of every request: seconds, bytes, and headers.

    Reading continues while a response is written, to detect that the client disconnects; so what comes then is counted
    too. Trailers are dropped: proxies that filter headers in front of us do not see them (RFC 9110, 6.5.1).
    """

    head_timeout_s: float
    open_connections: Connections
    lost_since: LostSince
    lost = False
    reserved = False  # beyond `max_connections`: only a probe is answered
    refused = False  # further input is dropped
    on_gone: Callable[[], None] | None = None
    on_writable: Callable[[], None] | None = None
    _deadline: asyncio.TimerHandle | None = None
    _unsent: asyncio.TimerHandle | None = None
    _in_head = True  # whether the next byte belongs to a head, or to nothing yet
    _head_bytes = 0
    _message_ended = False  # within the bytes that came last
    _trailer_bytes = 0
    _refusal = http_parser.NO_HTTP

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit a new connection, or put it into the reserve."""
        super().connection_made(transport)
        self.transport = GatheringTransport(transport, self.loop)  # type: ignore[assignment]
        self.parser = http_parser.Http1Parser(self)
        detect_dead_peer(transport.get_extra_info("socket"), self.head_timeout_s + _USER_TIMEOUT_MARGIN_S)
        if self.open_connections.admit(self):
            self._expect_head()
        else:
            self.reserved = True
            self._deadline = self.loop.call_later(_REFUSED_S, self.close_idle)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, bounding those of a head."""
        if self.refused:
            return
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        room = MAX_HEAD_BYTES - self._head_bytes
        if self._in_head and len(data) > room:
            self._feed(memoryview(data)[:room])
            if self._in_head:
                self.refuse(_HEAD_TOO_LARGE)
                return
            data = memoryview(data)[room:]
        self._feed(data)

    def _feed(self, data: bytes | memoryview) -> None:
        """Let the parser read, and count the bytes of an incomplete head."""
        self._message_ended = False
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # no HTTP, or no request that is served
            self.refuse(self._refusal)
        if self._in_head and not self._message_ended:  # else most of it belonged to another message
            self._head_bytes += len(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header, or drop a trailer."""
        if not self._in_head:
            self._trailer_bytes += len(name) + len(value)
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise _Refused
            return
        if len(self.headers) >= MAX_HEADERS:
            self._refusal = _HEAD_TOO_LARGE
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, or refuse it."""
        if self.parser.should_upgrade():
            return  # it will be parsed again, or refused
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused
        if self.reserved and self.url.partition(b"?")[0] not in _PROBES:
            self._refusal = http_parser.TOO_MANY_CONNECTIONS
            raise _Refused
        if not self.reserved:
            self._cancel()
        self._in_head = False
        self._trailer_bytes = 0
        self.open_connections.begin(self)
        super().on_headers_complete()
        if self.reserved:
            self.cycle.keep_alive = False
        self.scope["extensions"] = {EXTENSION: UvicornClient(self, self.cycle)}  # type: ignore[dict-item]

    def on_message_complete(self) -> None:
        """End the request's body."""
        if not self.parser.should_upgrade():
            self._in_head = self._message_ended = True
            self._head_bytes = 0
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """End the request: its response is sent, or in the socket."""
        self.open_connections.end(self)
        super().on_response_complete()

    def close_idle(self) -> None:
        if self.reserved and self.cycle is None:
            self.refuse(http_parser.TOO_MANY_CONNECTIONS)
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        served: Any = _Unframed(app, cycle) if cycle.scope["http_version"] == "1.0" else app
        super()._start_asgi_task(cycle, served)

    def refuse(self, answer: bytes) -> None:
        if self.refused:
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(answer)
            if self.reserved:
                self._linger()
                return
        self.transport.close()

    def pause_writing(self) -> None:
        """Stop writing: the client does not keep up."""
        super().pause_writing()
        self._expect_progress()

    def resume_writing(self) -> None:
        """Continue writing: the client has caught up."""
        self._stop_expecting_progress()
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the client has disconnected."""
        self._cancel()
        self._stop_expecting_progress()
        self.open_connections.release(self)
        self.lost = True
        super().connection_lost(exc)
        if self.on_gone is not None:
            self.on_gone()

    def _expect_progress(self) -> None:
        """Close the connection unless the client reads some of the pending bytes within `head_timeout_s`."""
        pending, since = self.transport.get_write_buffer_size(), time.monotonic()
        self._unsent = self.loop.call_later(self.head_timeout_s, self._check_progress, pending, since)

    def _check_progress(self, before: int, since: float) -> None:
        if self.transport.get_write_buffer_size() < before or caused_by_own_stall(self.lost_since, since):
            self._expect_progress()
        else:
            self.transport.abort()

    def _stop_expecting_progress(self) -> None:
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None

    def _linger(self) -> None:
        """Drop further input until `_deadline`: a reset would lose the response on its way to the client."""
        self.refused = True
        self.open_connections.refused()
        cast(GatheringTransport, self.transport).write_now(b"")
        if not self.transport.is_closing():
            self.transport.write_eof()

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Unframed:
    """Wraps the application for a client of HTTP/1.0, which knows no chunks and reads until the connection closes."""

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; uvicorn then closes the connection."""
        has_length = True

        async def send_unframed(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                self._cycle.chunked_encoding = None if has_length else False
            elif not has_length:
                self._cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_unframed)


class UvicornClient:
    """A `gateway.api.connection.ClientConnection` of uvicorn."""

    __slots__ = ("_cycle", "_protocol")

    def __init__(self, protocol: BoundedProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle

    @property
    def gone(self) -> bool:
        return self._protocol.lost

    @property
    def is_chunked(self) -> bool:
        return bool(self._cycle.chunked_encoding)

    def body(self) -> bytes | None:
        cycle = self._cycle
        if cycle.more_body or cycle.waiting_for_100_continue:
            return None
        cycle.flow.resume_reading()
        cycle.message_event.clear()
        body = bytes(cycle.body)
        cycle.body = bytearray()
        return body

    def watch(self, on_gone: Callable[[], None] | None, on_writable: Callable[[], None] | None) -> None:
        self._protocol.on_gone = on_gone
        self._protocol.on_writable = on_writable

    def write(self, data: bytes, *, hold: bool = False) -> bool:
        transport = cast(GatheringTransport, self._protocol.transport)
        if hold:
            transport.write(data)
        else:
            transport.write_now(data)
        return not self._protocol.flow.write_paused


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket. Raises StartError if the address is in use or not local."""
    sock = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen(_BACKLOG)  # now, not when all is open: until then another process could take the address
    except OSError as error:
        sock.close()
        where = f"{settings.host} port {settings.port}"
        raise StartError(f"cannot listen on {where}: {error.strerror}; set host or port to another") from error
    return sock


def listen_again(sock: socket.socket) -> socket.socket:
    """Open another socket on the address of `sock`; the kernel distributes new connections over all of them.

    With one socket for several workers, connections are distributed unevenly: of 32 one worker took up to 31. `sock`
    itself was bound without SO_REUSEPORT, so that binding another gateway's address still fails. The new one listens
    only when its worker serves, so that no connection waits for a worker that is still starting.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    other = socket.socket(sock.family, sock.type)
    try:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(sock.getsockname())
    except OSError as error:
        other.close()
        raise StartError(f"cannot listen for another worker: {error.strerror}; set workers to 1") from error
    return other


async def serve(app: ASGIApp, settings: Settings, sock: socket.socket, lost_since: LostSince) -> None:
    """Serve `app` on `sock` until SIGINT or SIGTERM."""
    limit = min(settings.max_connections, open_files.clients(open_files.open_files()))
    bounds = {
        "head_timeout_s": settings.client_timeout_s,
        "open_connections": Connections(limit),
        "lost_since": staticmethod(lost_since),
    }
    config = uvicorn.Config(
        app,
        http=type("Protocol", (BoundedProtocol,), bounds),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s),
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again when it is done; by default that would end the process before services close.
        signal.signal(number, lambda *_: None)
    await server.serve(sockets=[sock])
    # Requests that outlived the grace period were cancelled; each still has to hand its turn to the recorder.
    await asyncio.gather(*server.server_state.tasks, return_exceptions=True)

"""One connection to the engine, and the HTTP/1.1 exchange on it."""

import asyncio
from collections.abc import Callable, Sequence
from types import MappingProxyType

import httptools

from gateway.errors import GatewayError
from gateway.runtime.stalls import LostSince, never_lost

Headers = list[tuple[bytes, bytes]]
UNREACHABLE_HINT = "is vLLM running, and is engine_urls its address?"
TIMEOUT_HINT = "the engine may be overloaded: try again later; engine_timeout_s sets how long the gateway waits"
_HINTS = MappingProxyType({"engine_unreachable": UNREACHABLE_HINT, "engine_timeout": TIMEOUT_HINT})
OnChunks = Callable[[Sequence[bytes]], bool]

# vLLM (uvicorn) closes a connection that was idle for 5 s; one that is about to close is not worth the race.
_KEEP_IDLE_S = 4.0
# Bytes that may wait for a slow client before we stop reading from the engine.
_HIGH_WATER = 256 * 1024
_LOW_WATER = 64 * 1024
# Bytes of a response outside its body: head, chunk headers, trailers. vLLM's head has 200.
_MAX_UNFRAMED = 256 * 1024
# A read of this size has filled the buffer (256,000 bytes in uvloop), and libuv would do up to 31 more reads of this
# connection before it serves another one.
_LARGE_READ = 128 * 1024
# What vLLM may stream before it has computed anything: keep-alive comments, and the first two events of a response.
_PREAMBLE = (b":", b"event: response.created", b"event: response.in_progress")


class UpstreamError(Exception):
    """The exchange with the engine failed.

    `began`: the client may have received some of the response; `sent`: the engine may have received the request.
    """

    def __init__(self, code: str, message: str, *, began: bool, sent: bool = True) -> None:
        super().__init__(message)
        self.code = code
        self.began = began
        self.sent = sent


class Connection(asyncio.Protocol):
    """One connection to the engine and the exchange that is on it."""

    status: int
    headers: Headers

    def __init__(
        self, loop: asyncio.AbstractEventLoop, silence_timeout_s: float, lost_since: LostSince = never_lost
    ) -> None:
        self._loop = loop
        self._lost_since = lost_since
        self._silence_timeout_s = silence_timeout_s
        self._transport: asyncio.Transport
        self._closed = False
        self._idle_since = 0.0  # 0 while an exchange is on it
        self._timer: asyncio.TimerHandle | None = None
        self.closed: asyncio.Future[None]  # once it is abandoned
        self._begin("", 0.0)

    def _begin(self, method: str, grace_s: float) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._method = method
        self.status = 0
        self.headers = []
        self._chunks: list[bytes] = []
        self._size = 0
        self._paused = False
        self._framed = False  # the response says where it ends
        self._head_done = False
        self._unframed = 0  # bytes since the last body byte
        self._complete = False
        self._keep_alive = False
        self._surplus = False
        self._answered = False  # the response has begun
        self._replying = False  # the body has begun that depends on computed tokens
        self._grace_s = grace_s
        self._abandoned = False  # the response is no longer wanted
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_chunks: OnChunks | None = None
        self._last_read_at = self._loop.time()

    # Called by the relay.

    async def request(self, method: str, head: bytes, body: bytes, grace_s: float = 0.0) -> None:
        """Write a request and wait for the status and headers of the response. Raises UpstreamError."""
        used = self._idle_since > 0
        self._idle_since = 0.0
        self._begin(method, grace_s)
        if self._closed:
            raise UpstreamError("stale", "connection was closed", began=False)
        self._timer = self._loop.call_later(self._silence_timeout_s, self._on_timer)
        # After all other callbacks that are ready: of requests that come together only the first then wakes the engine,
        # and a wake-up is the most expensive part of a send.
        self._loop.call_soon(self._write, *((head + body,) if len(body) < _LOW_WATER else (head, body)))
        while not self._head_done and self._error is None:
            await self._wait()
        if self._error is not None:
            unanswered = used and not self._answered and self._error.code == "engine_unreachable"
            raise UpstreamError("stale", str(self._error), began=False) if unanswered else self._error

    async def read(self) -> bytes:
        """Return the next chunk of the body as the engine framed it, or b"" at its end. Raises UpstreamError."""
        while not self._chunks:
            if self._complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        chunk = self._chunks.pop(0)
        self._size -= len(chunk)
        if self._size < _LOW_WATER:
            self.resume()
        return chunk

    async def stream_to(self, on_chunks: OnChunks) -> Sequence[bytes]:
        """Call `on_chunks` with all chunks as soon as they come; return those that came with the end.

        Waking a task for each chunk would be much of what a chunk costs. `on_chunks` returns whether the client keeps
        up; if not, no more is read from the engine until `resume`. Raises UpstreamError after the last chunk was
        passed on.
        """
        self._on_chunks = on_chunks
        try:
            while not self._complete and self._error is None:
                self._forward()
                await self._wait()
        finally:
            self._on_chunks = None
        rest = self._take_all()
        if self._error is not None:
            on_chunks(rest)
            raise self._error
        return rest

    def pause(self) -> None:
        """Stop reading from the engine."""
        if not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Continue reading after a pause."""
        if self._paused and not self._closed:
            self._paused = False
            self._last_read_at = self._loop.time()
            self._transport.resume_reading()

    @property
    def exhausted(self) -> bool:
        """Whether the last chunk has been read."""
        return self._complete and not self._chunks

    @property
    def broken(self) -> bool:
        """Whether the exchange failed on the engine's side."""
        return self._error is not None

    def abort(self) -> None:
        """Close at once; the engine sees it and drops the request."""
        self._stop_timer()
        if not self._closed:
            self._closed = True
            self._transport.abort()

    def abort_after_grace(self) -> bool:
        """Close, at once or when the request's grace is over; return whether that is still pending (see `closed`).

        An engine whose KV connector reports two completions for a request that is aborted during its load crashes at
        the second (`gateway.stack.connector`). After the first byte of a reply the load is complete.
        """
        is_over = self._closed or self._complete or self._error is not None
        if is_over or self._replying or not self._grace_s:
            self.abort()
            return False
        self._stop_timer()
        self._abandoned = True
        self.closed = self._loop.create_future()
        self._timer = self._loop.call_later(self._grace_s, self.abort)
        return True

    def reusable(self) -> bool:
        """Whether another exchange may follow on this connection."""
        self._stop_timer()
        if self._closed or self._chunks or self._surplus or not self._keep_alive:
            return False
        self._idle_since = self._loop.time()
        return True

    def is_fresh(self) -> bool:
        """Whether it has not been idle for too long."""
        return not self._closed and self._loop.time() - self._idle_since < _KEEP_IDLE_S

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        # Nothing was requested: these bytes must not become the response to the next request.
        if self._idle_since or self._complete or self._error is not None:
            self.abort()
            return
        self._last_read_at = self._loop.time()
        self._answered = True
        self._unframed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("engine_unreachable", "the engine switched protocols without being asked to")
        except httptools.HttpParserError as error:
            self._fail("engine_unreachable", f"the engine did not speak HTTP: {error}")
        if self._unframed > _MAX_UNFRAMED:
            self._fail("engine_unreachable", f"the engine sent over {_MAX_UNFRAMED >> 10} KiB of headers")
        if self._on_chunks is None or self._complete or self._error is not None:
            self._wake()
        else:
            self._forward()
        if len(data) >= _LARGE_READ and not self._paused and not self._closed:
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._abandoned:
            self._stop_timer()
            self.closed.set_result(None)
        if self._head_done and not self._framed:
            self._complete = True
        elif not self._complete:
            self._fail("engine_unreachable", f"the engine closed the connection{f': {exc}' if exc else ''}")
        self._wake()

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._surplus = self._complete  # an unrequested response: the connection cannot be trusted any more

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._surplus or self._head_done:  # a trailer is dropped (RFC 9110, 6.5.1)
            return
        lower = name.lower()
        if lower in (b"content-length", b"transfer-encoding"):
            self._framed = True
        self.headers.append((lower, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._surplus:
            return
        if status < 200:  # 1xx: the final response follows
            self.headers = []
            return
        self.status = status
        self._head_done = True
        if self._method == "HEAD" or status in (204, 304):
            self._complete = True

    def on_body(self, body: bytes) -> None:
        self._unframed = 0
        if self._surplus:
            return
        if not self._replying:
            self._replying = not body.startswith(_PREAMBLE)
            if self._abandoned:
                if self._replying:
                    self.abort()
                return
        self._chunks.append(body)
        self._size += len(body)
        if self._size > _HIGH_WATER:
            self.pause()

    def on_message_complete(self) -> None:
        if self._head_done and not self._surplus:
            self._complete = True
            # Read here, because the parser resets it with the message. After a HEAD the parser waits for a body that
            # does not come, so this is never reached and the connection is not reused.
            self._keep_alive = bool(self._parser.should_keep_alive())
            if self._abandoned:
                self.abort()

    def _read_on(self) -> None:
        """Continue reading after the other connections were served."""
        if not self._paused and not self._closed:
            self._transport.resume_reading()

    def _write(self, *parts: bytes) -> None:
        if not self._transport.is_closing():
            for part in parts:
                self._transport.write(part)

    def _forward(self) -> None:
        if self._chunks and self._on_chunks is not None:
            if self._on_chunks(self._take_all()):
                self.resume()
            else:
                self.pause()

    def _take_all(self) -> list[bytes]:
        chunks, self._chunks, self._size = self._chunks, [], 0
        return chunks

    def _fail(self, code: str, message: str) -> None:
        if self._error is None and not self._complete:
            self._error = UpstreamError(code, message, began=self._head_done)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _on_timer(self) -> None:
        silent = self._loop.time() - self._last_read_at
        if self._paused:  # the client is slow, not the engine
            silent = 0.0
        if silent >= self._silence_timeout_s:
            # While this process did not run nothing was read, and what has come since is read after the timers.
            silent -= self._lost_since(self._last_read_at)
        if silent < self._silence_timeout_s:
            self._timer = self._loop.call_later(self._silence_timeout_s - silent, self._on_timer)
            return
        self._fail("engine_timeout", f"the engine was silent for {self._silence_timeout_s:g} s")
        self._wake()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def as_gateway_error(error: UpstreamError) -> GatewayError:
    """The error that a client sees."""
    return GatewayError(error.code, str(error), hint=_HINTS.get(error.code, ""))

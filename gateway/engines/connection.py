"""One connection to the engine, and the HTTP/1.1 exchange on it."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import httptools

from gateway.errors import GatewayError
from gateway.runtime.stalls import LostSince, never_lost

Headers = Sequence[tuple[bytes, bytes]]
UNREACHABLE_HINT = "is vLLM running, and is engine_urls its address?"
Take = Callable[[Sequence[bytes]], bool]

# vLLM (uvicorn) closes a connection that was idle for 5 s; one that is about to close is not worth the race.
_KEEP_IDLE_S = 4.0
# Bytes that may wait for a slow client before we stop reading from the engine.
_HIGH_WATER = 256 * 1024
_LOW_WATER = 64 * 1024
# Bytes of an answer that are not of its body: its head, a line between two chunks, trailers. vLLM's head has 200.
_MOST_UNFRAMED = 256 * 1024
# A read of so many bytes has filled the buffer (256,000 in uvloop), and libuv would continue with up to 31 more reads
# of this connection before it serves another one.
_LARGE_READ = 128 * 1024
# What vLLM may stream before it has computed anything: keep-alive comments, and the first two events of a response.
_PREAMBLE = (b":", b"event: response.created", b"event: response.in_progress")


class UpstreamError(Exception):
    """The exchange with the engine failed.

    `began` tells whether the client may have seen a byte of it, `sent` whether the engine may have seen the request.
    """

    def __init__(self, code: str, message: str, *, began: bool, sent: bool = True) -> None:
        super().__init__(message)
        self.code = code
        self.began = began
        self.sent = sent


class Connection(asyncio.Protocol):
    """One connection to the engine and the exchange that is on it."""

    status: int
    headers: list[tuple[bytes, bytes]]

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
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._framed = False  # the answer says where it ends
        self._head_done = False
        self._unframed = 0  # bytes since the last of the body, or since the beginning
        self._complete = False
        self._keep_alive = False
        self._surplus = False
        self._answered = False  # a byte of the answer has come
        self._replying = False  # a byte of the body has come that tells of computed tokens
        self._grace_s = grace_s
        self._abandoned = False  # nobody wants the answer any more
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_chunks: Take | None = None
        self._heard = self._loop.time()

    # What the relay calls.

    async def request(self, method: str, head: bytes, body: bytes, grace_s: float = 0.0) -> None:
        """Write a request and wait for the answer's status and headers. Raises UpstreamError."""
        used = self._idle_since > 0
        self._idle_since = 0.0
        self._begin(method, grace_s)
        if self._closed:
            raise UpstreamError("stale", "connection was closed", began=False)
        self._timer = self._loop.call_later(self._silence_timeout_s, self._on_timer)
        # Not now, but when all that is ready has run: of requests that come together, the engine is then woken by the
        # first only, and a wake-up is the dearest part of a send.
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
        chunk = self._chunks.popleft()
        self._size -= len(chunk)
        if self._size < _LOW_WATER:
            self.resume()
        return chunk

    async def stream_to(self, take: Take) -> Sequence[bytes]:
        """Give `take` all chunks that have come, as soon as they come; return those that came with the end.

        A task that wakes for each chunk would be a good part of what a chunk costs. `take` tells whether the client
        keeps up; if not, nothing more is read from the engine until `resume`. Raises UpstreamError when `take` has had
        all that came.
        """
        self._on_chunks = take
        try:
            while not self._complete and self._error is None:
                self._hand_on()
                await self._wait()
        finally:
            self._on_chunks = None
        rest = self._all()
        if self._error is not None:
            take(rest)
            raise self._error
        return rest

    def pause(self) -> None:
        """Read nothing more from the engine for now."""
        if not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on after a pause."""
        if self._paused and not self._closed:
            self._paused = False
            self._heard = self._loop.time()
            self._transport.resume_reading()

    @property
    def exhausted(self) -> bool:
        """Whether the chunk that was read last ends the answer."""
        return self._complete and not self._chunks

    @property
    def broken(self) -> bool:
        """Whether the exchange failed by the engine's doing."""
        return self._error is not None

    def abort(self) -> None:
        """Close at once; the engine sees it and drops the request."""
        self._stop_timer()
        if not self._closed:
            self._closed = True
            self._transport.abort()

    def abandon(self) -> bool:
        """Close, at once or when the request's grace is over; return whether that is still to come (see `closed`).

        An engine whose KV connector reports two ends for a request that is aborted during its load dies of the second
        (`gateway.stack.connector`). The first byte of a reply tells that the load is over.
        """
        over = self._closed or self._complete or self._error is not None
        if over or self._replying or not self._grace_s:
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

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        # Nothing was requested: these bytes must not become the answer to the next request.
        if self._idle_since or self._complete or self._error is not None:
            self.abort()
            return
        self._heard = self._loop.time()
        self._answered = True
        self._unframed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("engine_unreachable", "the engine switched protocols without being asked to")
        except httptools.HttpParserError as error:
            self._fail("engine_unreachable", f"the engine did not speak HTTP: {error}")
        if self._unframed > _MOST_UNFRAMED:
            self._fail("engine_unreachable", f"the engine sent over {_MOST_UNFRAMED >> 10} KiB of headers")
        if self._on_chunks is None or self._complete or self._error is not None:
            self._wake()
        else:
            self._hand_on()
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

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._surplus = self._complete  # an unrequested answer: the connection cannot be trusted any more

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
        if status < 200:  # 1xx: the answer proper follows
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
            # Asked here, because the parser forgets it with the message. After a HEAD it waits for a body that will not
            # come, so this is never reached and the connection is not used again.
            self._keep_alive = bool(self._parser.should_keep_alive())
            if self._abandoned:
                self.abort()

    def _read_on(self) -> None:
        """Read again, now that the other connections have had their turn."""
        if not self._paused and not self._closed:
            self._transport.resume_reading()

    def _write(self, *parts: bytes) -> None:
        if not self._transport.is_closing():
            for part in parts:
                self._transport.write(part)

    def _hand_on(self) -> None:
        if self._chunks and self._on_chunks is not None:
            if self._on_chunks(self._all()):
                self.resume()
            else:
                self.pause()

    def _all(self) -> list[bytes]:
        chunks = list(self._chunks)
        self._chunks.clear()
        self._size = 0
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
        silent = self._loop.time() - self._heard
        if self._paused:  # it is the client who is slow
            silent = 0.0
        if silent >= self._silence_timeout_s:
            # While we did not run nothing could be heard, and what has come since is read after the timers.
            silent -= self._lost_since(self._heard)
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
    hint = UNREACHABLE_HINT if error.code == "engine_unreachable" else ""
    return GatewayError(error.code, str(error), hint=hint)

"""Relay the engine's response to the client chunk by chunk, and keep a copy for after the request.

Nothing in here waits for anything but the engine and the client. A client that leaves, before the first byte or after
it, closes the engine's connection, which aborts its work; where that could end the engine, only once its reply has
begun (`Upstream.send`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from starlette.types import Send

from gateway.api.asgi import ClientGone, ClientWatch, send_answer
from gateway.api.connection import ClientConnection
from gateway.dialects.base import Dialect
from gateway.dialects.sse import UsageFilter
from gateway.engines.connection import Connection, Headers, UpstreamError, as_gateway_error
from gateway.engines.pool import Route
from gateway.sessions.turn_context import RelayResult

# RFC 9110, 7.6.1: these speak of one connection, not of the message. Length and encoding of the body are set anew.
HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip


# So vLLM 0.32 begins to say that a prompt, with the reply it asks for, has no room (renderers/params.py).
FULL = b"maximum context length is"
HINT_HEADER = b"x-context-hint"
FULL_HINT = (
    "the context is full: freeze the session and ask its window, or begin a new one; "
    "with on_full=successor the gateway goes on by itself"
)
_HINT_BYTES = 500
_CORS = b"access-control-"  # who may read our answers in a browser is not the engine's to say
_REFUSAL_BYTES = 64 * 1024  # what is longer says something else


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as the engine gets it."""

    method: str
    target: bytes
    headers: Headers
    body: bytes
    may_load: bool = False  # it has a salt; what KV there is under it, the gateway knows only in part


class FingerprintCache:
    """What `UsageFilter` has learnt of the engines: the stamp of each, by path and model. The oldest make room."""

    ROOM = 1024  # clients choose the models' names

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes, str], bytes] = {}

    def of(self, engine: str, about: tuple[bytes, str]) -> bytes | None:
        """The stamp of an engine, None if it is not known yet."""
        return self._known.get((engine, *about))

    def learn(self, engine: str, about: tuple[bytes, str], stamp: bytes | None) -> None:
        """Keep a stamp that a stream had, if it came as far."""
        key = (engine, *about)
        if stamp is None or self._known.get(key) == stamp:
            return
        self._known[key] = stamp
        if len(self._known) > self.ROOM:
            del self._known[next(iter(self._known))]


@dataclass(slots=True)
class RelayOptions:
    """How to answer a client, whatever the engine says."""

    dialect: Dialect
    extra_headers: Headers
    limit: int  # bytes of the reply that are kept
    hide_usage: bool = False
    stamps: FingerprintCache = field(default_factory=FingerprintCache)
    about: tuple[bytes, str] = (b"", "")  # path and model, for `stamps`
    may_be_full: bool = False  # the prompt is a conversation's: an engine that has no room for it is told apart
    hold_full: bool = False  # whether that answer is kept in `RelayResult.held`, and not sent
    on_last: Callable[[], None] = lambda: None  # called before a client gets the last event of a stream


class StreamForwarder:
    """What a client gets to see of the chunks that come from the engine, each still an HTTP chunk of its own."""

    def __init__(self, client: ClientConnection, options: RelayOptions, result: RelayResult, engine: str) -> None:
        self._client = client
        self._options = options
        self._result = result
        self.hidden: UsageFilter | None = None
        if result.streamed and options.hide_usage:
            self.hidden = UsageFilter(options.stamps.of(engine, options.about))
        self.mid_event = False  # whether the last byte shown was in the middle of an event
        self._last = options.dialect.last_event if result.streamed else ()

    def write(self, chunks: Sequence[bytes]) -> bool:
        """Pass chunks on; tell whether the client keeps up."""
        shown = self.filter(chunks)
        return self._client.write(_framed(shown)) if shown else True

    def finish(self, chunks: Sequence[bytes]) -> bytes:
        """Pass the last chunks on with what is sent next; return the one of them that the end may go with."""
        shown = self.filter(chunks)
        if len(shown) > 1:
            self._client.write(_framed(shown[:-1]), hold=True)
        return shown[-1] if shown else b""

    def filter(self, chunks: Sequence[bytes]) -> Sequence[bytes]:
        """Keep chunks, and return what may be shown of them."""
        self._result.keep(chunks, self._options.limit)
        if chunks and chunks[-1].startswith(self._last):
            self._options.on_last()
        shown = chunks if self.hidden is None else self.hidden.pass_on(chunks)
        if shown:
            self.mid_event = not shown[-1].endswith(b"\n\n")
        return shown


async def relay(
    route: Route, outgoing: Outgoing, client: ClientConnection, send: Send, options: RelayOptions, result: RelayResult
) -> None:
    """Send `outgoing` to the engine and its answer to the client; `result` tells afterwards how it went."""
    try:
        with ClientWatch(client) as watch:
            connection = await route.send(
                outgoing.method, outgoing.target, outgoing.headers, outgoing.body, may_load=outgoing.may_load
            )
            watch.on_writable = connection.resume
            try:
                await _forward(connection, client, send, options, result, route.engine)
            finally:
                route.release(connection)
    except ClientGone:
        result.outcome = "client_gone"
    except UpstreamError as error:  # nothing was sent yet
        refused = as_gateway_error(error)
        result.outcome = "gateway_error" if error.code == "rate_limited" else "engine_error"
        result.detail, result.status = str(error), refused.status
        await send_answer(send, refused.status, options.dialect.error(refused), options.extra_headers)


async def _forward(
    connection: Connection, client: ClientConnection, send: Send, options: RelayOptions, result: RelayResult,
    engine: str,
) -> None:  # fmt: skip
    kept = [(k, v) for k, v in connection.headers if k not in HOP_BY_HOP and not k.startswith(_CORS)]
    result.status = connection.status
    result.streamed = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in kept)
    if connection.status == 400 and options.may_be_full:
        await _refused(connection, kept, send, options, result)
        return
    await send({"type": "http.response.start", "status": connection.status, "headers": kept + options.extra_headers})
    pipe = StreamForwarder(client, options, result, engine)
    try:
        last = (
            pipe.finish(await connection.stream_to(pipe.write))
            if client.is_chunked
            else await _read(connection, pipe, send)
        )
    except UpstreamError as error:
        result.outcome, result.detail = "engine_cut", str(error)
        if not result.streamed:
            return  # the client sees the connection close before the promised length: that is the truth
        # Half an event may have gone out already; the error must not become its other half.
        end = b"\n\n" if pipe.mid_event else b""
        event = options.dialect.error_event(as_gateway_error(error), result.chunks or ())
        await send({"type": "http.response.body", "body": end + event})
        return
    result.outcome = "completed" if connection.status < 400 else "engine_error"
    if pipe.hidden:
        last += pipe.hidden.flush()
        options.stamps.learn(engine, options.about, pipe.hidden.stamp)
    await send({"type": "http.response.body", "body": last})


async def _refused(
    connection: Connection, kept: Headers, send: Send, options: RelayOptions, result: RelayResult
) -> None:
    """Pass on a refusal as it is, but for one that says that the context is full: that is held, or gets a hint."""
    body = b""
    while (chunk := await connection.read()) and len(body) < _REFUSAL_BYTES:
        body += chunk
    result.keep((body,), options.limit)
    result.outcome = "engine_error"
    if chunk or FULL not in body:
        await send({"type": "http.response.start", "status": 400, "headers": kept + options.extra_headers})
        while chunk:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            body, chunk = chunk, await connection.read()
        await send({"type": "http.response.body", "body": body})
        return
    result.detail = "the context is full"
    result.held = [*kept, *options.extra_headers], body
    if not options.hold_full:
        await send_full(send, result.held, FULL_HINT)


async def send_full(send: Send, held: tuple[Headers, bytes], hint: str) -> None:
    """Send a held answer after all, with a hint that the engine does not give."""
    headers, body = held
    said = " ".join(hint.split()).encode("ascii", "replace")[:_HINT_BYTES]
    await _send_whole(send, 400, [*headers, (HINT_HEADER, said)], body)


async def _send_whole(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(connection: Connection, pipe: StreamForwarder, send: Send) -> bytes:
    """Pass on a body of known length; return the last of it."""
    while chunk := await connection.read():
        (shown,) = pipe.filter((chunk,)) or (b"",)
        if connection.exhausted:
            return shown
        await send({"type": "http.response.body", "body": shown, "more_body": True})
    return b""


def _framed(chunks: Sequence[bytes]) -> bytes:
    return b"".join([b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks])


def request_headers(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Headers:
    """The client's headers without those of the connection, those it names there, and `dropped`."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(part.strip().lower() for part in value.split(b","))
    return [(k, v) for k, v in headers if k not in HOP_BY_HOP and k not in dropped and k not in named]

"""Relay the engine's response to the client chunk by chunk, and keep a copy for after the request.

It waits for the engine and the client only. When a client leaves, before the first byte or after it, the engine's
connection is closed, which aborts its work; if that could crash the engine, only once its reply has begun
(`Connection.abort_after_grace`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct
from starlette.types import Send

from gateway.api.asgi import CancelOnDisconnect, ClientGone, send_answer
from gateway.api.connection import ClientConnection
from gateway.dialects.base import Dialect
from gateway.dialects.sse import UsageFilter
from gateway.engines.connection import Connection, Headers, UpstreamError, as_gateway_error
from gateway.engines.pool import Route
from gateway.sessions.turn_context import RelayResult

# RFC 9110, 7.6.1: these are about one connection, not the message. Length and encoding of the body are set again.
HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip


# In vLLM 0.32's error for a prompt that has no room with the requested reply (renderers/params.py).
FULL = b"maximum context length is"
HINT_HEADER = b"x-context-hint"
FULL_HINT = (
    "the context is full: freeze the session and ask its window, or begin a new one; "
    "with on_full=successor the gateway continues in a successor"
)
_HINT_BYTES = 500
_CORS = b"access-control-"  # the gateway decides which pages may read its answers
_REFUSAL_BYTES = 64 * 1024  # a longer answer is not that refusal


class Outgoing(Struct, frozen=True):
    """A request as the engine gets it."""

    method: str
    target: bytes
    headers: Headers
    body: bytes
    may_load: bool = False  # the engine may load KV for it: it has a salt


class FingerprintCache:
    """The stamps that `UsageFilter` found, by engine, path and model. The oldest are dropped."""

    MAX = 1024  # clients choose the models' names

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes, str], bytes] = {}

    def of(self, engine: str, about: tuple[bytes, str]) -> bytes | None:
        """The stamp of an engine, None if it is not known yet."""
        return self._known.get((engine, *about))

    def learn(self, engine: str, about: tuple[bytes, str], stamp: bytes | None) -> None:
        """Keep the stamp of a stream, if it came that far."""
        key = (engine, *about)
        if stamp is None or self._known.get(key) == stamp:
            return
        self._known[key] = stamp
        if len(self._known) > self.MAX:
            del self._known[next(iter(self._known))]


@dataclass(slots=True)
class RelayOptions:
    """How to answer a client."""

    dialect: Dialect
    extra_headers: Headers
    limit: int  # of bytes of the reply that are kept
    hide_usage: bool = False
    stamps: FingerprintCache = field(default_factory=FingerprintCache)
    about: tuple[bytes, str] = (b"", "")  # path and model, for `stamps`
    may_be_full: bool = False  # the prompt is a conversation: the refusal of one that is too long gets a hint
    hold_refusal: bool = False  # that refusal is not sent, but kept in `RelayResult.refusal`
    on_last: Callable[[], None] = lambda: None  # called before a client gets the last event of a stream


class StreamForwarder:
    """Passes the engine's chunks on to a client, each as an HTTP chunk of its own."""

    def __init__(self, client: ClientConnection, options: RelayOptions, result: RelayResult, engine: str) -> None:
        self._client = client
        self._options = options
        self._result = result
        self.hidden: UsageFilter | None = None
        if result.streamed and options.hide_usage:
            self.hidden = UsageFilter(options.stamps.of(engine, options.about))
        self.mid_event = False  # the last byte sent was in the middle of an event
        self._last = options.dialect.last_event if result.streamed else ()

    def write(self, chunks: Sequence[bytes]) -> bool:
        """Pass chunks on; return whether the client keeps up."""
        shown = self.filter(chunks)
        return self._client.write(_framed(shown)) if shown else True

    def finish(self, chunks: Sequence[bytes]) -> bytes:
        """Pass the last chunks on, held until the next send; return the very last one, to be sent with the end."""
        shown = self.filter(chunks)
        if len(shown) > 1:
            self._client.write(_framed(shown[:-1]), hold=True)
        return shown[-1] if shown else b""

    def filter(self, chunks: Sequence[bytes]) -> Sequence[bytes]:
        """Keep chunks, and return those that the client gets."""
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
    """Send `outgoing` to the engine and its answer to the client; `result` has the outcome afterwards."""
    try:
        with CancelOnDisconnect(client) as watch:
            connection = await route.send(
                outgoing.method, outgoing.target, outgoing.headers, outgoing.body, may_load=outgoing.may_load
            )
            watch.on_writable = connection.resume
            try:
                await _forward(connection, client, send, options, result, route.engine)
            finally:
                route.release_or_abort(connection)
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
    result.streamed = dict(kept).get(b"content-type", b"").startswith(b"text/event-stream")
    if connection.status == 400 and options.may_be_full:
        await _forward_refusal(connection, kept, send, options, result)
        return
    await send({"type": "http.response.start", "status": connection.status, "headers": kept + options.extra_headers})
    forwarder = StreamForwarder(client, options, result, engine)
    try:
        last = (
            forwarder.finish(await connection.stream_to(forwarder.write))
            if client.is_chunked
            else await _read(connection, forwarder, send)
        )
    except UpstreamError as error:
        result.outcome, result.detail = "engine_cut", str(error)
        if not result.streamed:
            return  # the client sees the connection close before the promised length: that is the truth
        # Half an event may have gone out already; the error must not become its other half.
        end = b"\n\n" if forwarder.mid_event else b""
        event = options.dialect.error_event(as_gateway_error(error), result.chunks or ())
        await send({"type": "http.response.body", "body": end + event})
        return
    result.outcome = "completed" if connection.status < 400 else "engine_error"
    if forwarder.hidden:
        last += forwarder.hidden.flush()
        options.stamps.learn(engine, options.about, forwarder.hidden.stamp)
    await send({"type": "http.response.body", "body": last})


async def _forward_refusal(
    connection: Connection, kept: Headers, send: Send, options: RelayOptions, result: RelayResult
) -> None:
    """Pass on a refusal; one that says that the context is full gets a hint, or is held."""
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
    result.refusal = [*kept, *options.extra_headers], body
    if not options.hold_refusal:
        await send_refusal(send, result.refusal, FULL_HINT)


async def send_refusal(send: Send, refusal: tuple[Headers, bytes], hint: str) -> None:
    """Send the refusal of a full context, with a hint that the engine does not give."""
    headers, body = refusal
    value = " ".join(hint.split()).encode("ascii", "replace")[:_HINT_BYTES]
    await send({"type": "http.response.start", "status": 400, "headers": [*headers, (HINT_HEADER, value)]})
    await send({"type": "http.response.body", "body": body})


async def _read(connection: Connection, forwarder: StreamForwarder, send: Send) -> bytes:
    """Pass on a body of known length; return its last chunk."""
    while chunk := await connection.read():
        (shown,) = forwarder.filter((chunk,)) or (b"",)
        if connection.exhausted:
            return shown
        await send({"type": "http.response.body", "body": shown, "more_body": True})
    return b""


def _framed(chunks: Sequence[bytes]) -> bytes:
    if len(chunks) == 1:
        return b"%x\r\n%b\r\n" % (len(chunks[0]), chunks[0])
    return b"".join([b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks])


def request_headers(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Headers:
    """The client's headers without those of the connection, those it names there, and `dropped`."""
    hop_by_hop: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            hop_by_hop.update(part.strip().lower() for part in value.split(b","))
    return [(k, v) for k, v in headers if k not in HOP_BY_HOP and k not in dropped and k not in hop_by_hop]

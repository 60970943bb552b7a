"""The way of bytes: the engine's answer to the client, chunk for chunk, and a copy for after the request.

Nothing in here waits for anything but the engine and the client. A client that leaves, before the first byte or after
it, closes the engine's connection, which aborts its work; where that could end the engine, only once its reply has
begun (`Upstream.send`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from starlette.types import Send

from gateway.api.asgi import ClientGone, ClientWatch, Headers, send_answer
from gateway.api.connection import ClientConnection
from gateway.dialects.base import Dialect
from gateway.dialects.sse import UsageFilter
from gateway.engines.connection import Connection, UpstreamError, as_gateway_error
from gateway.engines.pool import Route
from gateway.records import Outcome

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
class Answer:
    """How to answer, and afterwards how it went. `chunks` is a copy of it, None once it is over `limit` bytes."""

    dialect: Dialect
    extra_headers: Headers
    limit: int
    hide_usage: bool = False
    stamps: FingerprintCache = field(default_factory=FingerprintCache)
    about: tuple[bytes, str] = (b"", "")  # path and model, for `stamps`
    status: int = 0
    streamed: bool = False
    chunks: list[bytes] | None = field(default_factory=list)
    size: int = 0
    outcome: Outcome = "gateway_error"
    detail: str = ""
    may_be_full: bool = False  # the prompt is a conversation's: an engine that has no room for it is told apart
    hold_full: bool = False  # whether that answer is kept in `held`, and not sent
    held: tuple[Headers, bytes] | None = None
    on_last: Callable[[], None] = lambda: None  # called before a client gets the last event of a stream

    def keep(self, chunks: Sequence[bytes]) -> None:
        """Keep chunks, or nothing at all once it is too much."""
        if self.chunks is None:
            return
        self.size += sum(map(len, chunks))
        if self.size <= self.limit:
            self.chunks += chunks
        else:
            self.chunks = None
            self.detail = "the reply was larger than max_reply_bytes and was not kept"


class StreamForwarder:
    """What a client gets to see of the chunks that come from the engine, each still an HTTP chunk of its own."""

    def __init__(self, client: ClientConnection, answer: Answer, engine: str) -> None:
        self._client = client
        self._answer = answer
        self.hidden: UsageFilter | None = None
        if answer.streamed and answer.hide_usage:
            self.hidden = UsageFilter(answer.stamps.of(engine, answer.about))
        self.mid_event = False  # whether the last byte shown was in the middle of an event
        self._last = answer.dialect.last_event if answer.streamed else ()

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
        self._answer.keep(chunks)
        if chunks and chunks[-1].startswith(self._last):
            self._answer.on_last()
        shown = chunks if self.hidden is None else self.hidden.pass_on(chunks)
        if shown:
            self.mid_event = not shown[-1].endswith(b"\n\n")
        return shown


async def relay(route: Route, outgoing: Outgoing, client: ClientConnection, send: Send, answer: Answer) -> None:
    """Send `outgoing` to the engine and its answer to the client; `answer` tells afterwards how it went."""
    try:
        with ClientWatch(client) as watch:
            connection = await route.send(
                outgoing.method, outgoing.target, outgoing.headers, outgoing.body, may_load=outgoing.may_load
            )
            watch.on_writable = connection.resume
            try:
                await _forward(connection, client, send, answer, route.engine)
            finally:
                route.release(connection)
    except ClientGone:
        answer.outcome = "client_gone"
    except UpstreamError as error:  # nothing was sent yet
        refused = as_gateway_error(error)
        answer.outcome = "gateway_error" if error.code == "rate_limited" else "engine_error"
        answer.detail, answer.status = str(error), refused.status
        await send_answer(send, refused.status, answer.dialect.error(refused), answer.extra_headers)


async def _forward(connection: Connection, client: ClientConnection, send: Send, answer: Answer, engine: str) -> None:
    kept = [(k, v) for k, v in connection.headers if k not in HOP_BY_HOP and not k.startswith(_CORS)]
    answer.status = connection.status
    answer.streamed = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in kept)
    if connection.status == 400 and answer.may_be_full:
        await _refused(connection, kept, send, answer)
        return
    await send({"type": "http.response.start", "status": connection.status, "headers": kept + answer.extra_headers})
    pipe = StreamForwarder(client, answer, engine)
    try:
        last = (
            pipe.finish(await connection.stream_to(pipe.write))
            if client.is_chunked
            else await _read(connection, pipe, send)
        )
    except UpstreamError as error:
        answer.outcome, answer.detail = "engine_cut", str(error)
        if not answer.streamed:
            return  # the client sees the connection close before the promised length: that is the truth
        # Half an event may have gone out already; the error must not become its other half.
        end = b"\n\n" if pipe.mid_event else b""
        event = answer.dialect.error_event(as_gateway_error(error), answer.chunks or ())
        await send({"type": "http.response.body", "body": end + event})
        return
    answer.outcome = "completed" if connection.status < 400 else "engine_error"
    if pipe.hidden:
        last += pipe.hidden.flush()
        answer.stamps.learn(engine, answer.about, pipe.hidden.stamp)
    await send({"type": "http.response.body", "body": last})


async def _refused(connection: Connection, kept: Headers, send: Send, answer: Answer) -> None:
    """Pass on a refusal as it is, but for one that says that the context is full: that is held, or gets a hint."""
    body = b""
    while (chunk := await connection.read()) and len(body) < _REFUSAL_BYTES:
        body += chunk
    answer.keep((body,))
    answer.outcome = "engine_error"
    if chunk or FULL not in body:
        await send({"type": "http.response.start", "status": 400, "headers": kept + answer.extra_headers})
        while chunk:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            body, chunk = chunk, await connection.read()
        await send({"type": "http.response.body", "body": body})
        return
    answer.detail = "the context is full"
    answer.held = [*kept, *answer.extra_headers], body
    if not answer.hold_full:
        await send_full(send, answer.held, FULL_HINT)


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

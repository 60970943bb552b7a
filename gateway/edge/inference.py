"""The inference door: `/v1/*`, and the same under `/s/{session_id}` and `/w/{window}`, before the engine.

What `TURNS` has is a turn of a session: read once, salted, relayed, and handed to `gateway.turns` when it is over.
Everything else passes through, without what a client may not send, and with a salt where it makes the engine keep KV.
"""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

from gateway import identity, normalise, transcripts
from gateway.dialects.chat import ChatDialect
from gateway.dialects.completions import CompletionsDialect
from gateway.dialects.contract import (
    INHERITED_FIELDS,
    Call,
    Dialect,
    is_clean,
    sanitise,
    with_fields,
    write_json,
)
from gateway.dialects.messages import MessagesDialect
from gateway.dialects.responses import ResponsesDialect
from gateway.edge import auth, responses
from gateway.edge.client import client_of
from gateway.edge.http import ClientGone, Headers, not_found, parse_object, read_body, send_answer
from gateway.edge.relay import Answer, Outgoing, Stamps, relay, request_headers, send_full
from gateway.ended import Ended
from gateway.engine import Model
from gateway.errors import GatewayError
from gateway.parts import Parts
from gateway.records import Front, Session, StoredResponse, check_session_id, check_window_name
from gateway.sessions import Place
from gateway.windows import branch
from gateway.windows.resume import resume
from gateway.windows.successor import Onward, Successors
from gateway.windows.thaw import usable

log = logging.getLogger(__name__)

SYSTEM_HEADER = b"x-window-system"
WINDOW_HEADER = b"x-window"
_CHAT = ChatDialect()
_MESSAGES = MessagesDialect()
TURNS: dict[bytes, Dialect] = {
    b"/v1/chat/completions": _CHAT,
    b"/v1/completions": CompletionsDialect(),
    b"/v1/responses": ResponsesDialect(),
    b"/v1/messages": _MESSAGES,
}
_COUNT = b"/v1/messages/count_tokens"

# Endpoints that take a `cache_salt` and leave KV behind (vllm 0.32), though they are no turns of a session here.
SALTED = frozenset(
    {
        b"/v1/chat/completions/batch",
        b"/v1/embeddings",
        b"/v1/rerank",
        b"/v1/score",
        b"/v1/systemone",
    }
)

# What vLLM has beside `/v1` and clients ask for: no KV comes of it.
BESIDE = (b"/tokenize", b"/detokenize")

# The engine gets its own host, length and key; a compressed answer could not be read afterwards; sessions and priority
# are between the client and us.
_DROPPED = frozenset(
    {
        b"host",
        b"content-length",
        b"accept-encoding",
        b"expect",
        SYSTEM_HEADER,
        WINDOW_HEADER,
        b"x-vllm-priority",
        *identity.HEADERS,
    }
)


@dataclass(frozen=True, slots=True)
class Base:
    """What the base URL says: the engine's path, and the session or the window that all under it belongs to."""

    path: bytes
    session_id: str | None = None
    window: str | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as it came: from whom, for which session, and how to answer it."""

    scope: Scope
    receive: Receive
    send: Send
    tenant: str
    base: "Base"
    body: bytes

    @property
    def target(self) -> bytes:
        """Path and query."""
        query: bytes = self.scope["query_string"]
        return self.base.path + b"?" + query if query else self.base.path

    def header(self, name: bytes) -> bytes | None:
        """The first header of that name."""
        return next((v for k, v in self.scope["headers"] if k == name), None)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn before it is relayed; in a successor, `dropped` messages were left out, which window `ancestor` has."""

    incoming: Incoming
    dialect: Dialect
    call: Call
    place: Place
    model: Model | None
    normalised: tuple[str, ...]
    arrived: float
    ancestor: str = ""
    dropped: int = 0


class Inference:
    """The ASGI application of the inference door."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        settings = parts.settings
        own_key = bool(settings.api_key or settings.engine_api_key)
        self._dropped = _DROPPED | frozenset(auth.KEY_HEADERS) if own_key else _DROPPED
        key = settings.engine_api_key
        self._stamps = Stamps()
        self._successors = Successors(parts)
        self._rules = frozenset(settings.normalise)
        self._added: Headers = [(b"authorization", f"Bearer {key}".encode())] if key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            incoming = await self._read(scope, receive, send)
            dialect = TURNS.get(incoming.base.path)
            if dialect and scope["method"] == "POST":
                await self._turn(incoming, dialect)
            elif incoming.base.path == _COUNT and scope["method"] == "POST":
                await self._count(incoming)
            elif kept := await responses.serve(self._parts, incoming.tenant, scope["method"], incoming.target):
                await send_answer(send, 200, kept)
            else:
                await self._pass(incoming)
        except GatewayError as error:
            await send_answer(send, error.status, _spoken(scope).error(error))
        except ClientGone:
            return
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            failure = GatewayError("internal", "the gateway failed; its log says why")
            with suppress(RuntimeError):  # the answer had begun: uvicorn closes the connection
                await send_answer(send, failure.status, _spoken(scope).error(failure))

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> Incoming:
        settings = self._parts.settings
        tenant = auth.tenant(scope["headers"], settings.api_key)
        base = _route(scope)
        body = await read_body(scope, receive, limit=settings.max_body_bytes, timeout_s=settings.client_timeout_s)
        return Incoming(scope, receive, send, tenant, base, body)

    async def _turn(self, incoming: Incoming, dialect: Dialect) -> None:
        """Relay a turn of a session, and hand it over when it is over, however it ended."""
        parts, arrived = self._parts, time.monotonic()
        body, normalised = normalise.in_body(parse_object(incoming.body), incoming.base.path, self._rules)
        named = identity.given(incoming.scope["headers"], body, incoming.base.session_id)
        call = dialect.read(body, b"" if normalised else incoming.body)
        model = await self._model(call.model)
        if model and not call.model:  # the engine takes its own; a freeze will have to ask for it by name
            call = replace(call, model=model.id)
        call, before = await responses.resume(parts, incoming.tenant, call)
        place = await self._place(incoming, named, call, before)
        if call.storage and call.storage.conversation:
            place = await self._successors.newest(place)
        call = await self._continue(call, place.session, incoming)
        turn = _Turn(incoming, dialect, call, place, model, normalised, arrived)
        if onward := await self._successors.onward(place, call):
            turn = _onward(turn, onward)
        answer = await self._relayed(turn)
        if answer.held is not None and answer.hold_full:
            await self._go_on(turn, answer.held)

    async def _go_on(self, turn: "_Turn", held: tuple[Headers, bytes]) -> None:
        """A full session goes on in its successor; where it cannot, the client gets the engine's answer."""
        arrived = time.monotonic()
        try:
            onward = await self._successors.of(turn.place, turn.call, turn.model)
        except GatewayError as error:
            log.warning("session %s is full and does not go on: %s", turn.place.session.id, error.message)
            await send_full(turn.incoming.send, held, "; ".join(filter(None, (error.message, error.hint))))
            return
        await self._relayed(replace(_onward(turn, onward), arrived=arrived), hold_full=False)

    async def _relayed(self, turn: "_Turn", *, hold_full: bool = True) -> Answer:
        """Relay a turn, and hand it over when it is over; return how it went."""
        parts, incoming, dialect, call, model = self._parts, turn.incoming, turn.dialect, turn.call, turn.model
        session = turn.place.session
        await resume(parts, session)
        fingerprint = model.fingerprint if model else ""
        salt = parts.salts.of(session.tenant, session.lineage, fingerprint, call.client_salt)
        outgoing = self._outgoing(incoming, dialect.write(call, salt))
        answer = Answer(
            dialect,
            _headers(turn),
            parts.settings.max_reply_bytes,
            call.hide_usage,
            self._stamps,
            (incoming.base.path, call.model),
            may_be_full=True,
            hold_full=hold_full and parts.settings.on_full == "successor",
        )
        started_at, clock = time.time(), time.monotonic()
        await parts.turns.enter(turn.place)
        route = parts.engines.route(session.lineage, session.engine, call.model)
        try:
            await relay(route, outgoing, client_of(incoming.scope), incoming.send, answer)
        finally:
            parts.turns.finish(
                Ended(
                    place=turn.place,
                    fingerprint=fingerprint,
                    salt=salt,
                    dialect=dialect,
                    call=call,
                    outcome=answer.outcome,
                    status=answer.status,
                    started_at=started_at,
                    duration_ms=(time.monotonic() - clock) * 1000,
                    streamed=answer.streamed,
                    chunks=answer.chunks,
                    detail=answer.detail,
                    normalised=turn.normalised,
                    engine=route.engine,
                    overhead_s=clock - turn.arrived,
                )
            )
        return answer

    async def _place(
        self, incoming: Incoming, named: identity.Given | None, call: Call, before: StoredResponse | None
    ) -> Place:
        """Say which session the turn belongs to."""
        parts, tenant = self._parts, incoming.tenant
        key = named.id if named and named.kind == "key" else ""
        seed = identity.seed(call.body, key, call.client_salt)
        if before is not None:
            return await responses.place(parts, before, named, seed)
        if incoming.base.window is None or not call.messages:
            return await parts.sessions.place(tenant, named, call.messages, seed, parts.turns.settle)
        asked = branch.Asked(tenant, incoming.base.window, named, call.messages, _system_rule(incoming))
        return await branch.place(parts, asked, seed)

    async def _pass(self, incoming: Incoming) -> None:
        """Relay what is no turn."""
        engines, session_id = self._parts.engines, incoming.base.session_id
        if len(engines.members) > 1 and incoming.base.path == b"/v1/models" and incoming.scope["method"] == "GET":
            extra: Headers = [(identity.SESSION_HEADER, session_id.encode())] if session_id else []
            await send_answer(incoming.send, 200, write_json({"object": "list", "data": engines.cards()}), extra)
            return
        body, session, model = incoming.body, None, ""
        if body and b"json" in (incoming.header(b"content-type") or b"json").lower():
            body, session, model = await self._sanitised(incoming)
        elif len(engines.members) > 1:
            session = await self._session_of(incoming, {})
        await self._relay(incoming, body, session, model)

    async def _count(self, incoming: Incoming) -> None:
        """Relay the question how many tokens a turn would have: with what the engine would get in front of it."""
        parts = self._parts
        body, normalised = normalise.in_body(parse_object(incoming.body), incoming.base.path, self._rules)
        session = await self._session_of(incoming, body)
        call = _MESSAGES.read(body, b"" if normalised else incoming.body)
        if session and session.window_transcript is not None:
            call = await self._continue(call, session, incoming)
        elif incoming.base.window is not None and call.messages:
            window = await usable(parts, incoming.tenant, incoming.base.window)
            history = await parts.store.messages(window.transcript)
            front = transcripts.missing(history, call.messages, _system_rule(incoming))
            call = await self._inheriting(call, front, window.frame)
        if session and (onward := await self._successors.onward(Place(session, "", b""), call)):
            call = onward.call
        await self._relay(incoming, _MESSAGES.question(call), session, call.model)

    async def _relay(self, incoming: Incoming, body: bytes, session: Session | None, model: str) -> None:
        session_id, engines = incoming.base.session_id, self._parts.engines
        route = engines.route(session.lineage, session.engine, model) if session else engines.route("", model=model)
        extra: Headers = [(identity.SESSION_HEADER, session_id.encode())] if session_id else []
        answer = Answer(_spoken(incoming.scope), extra, limit=0)
        await relay(route, self._outgoing(incoming, body), client_of(incoming.scope), incoming.send, answer)

    async def _sanitised(self, incoming: Incoming) -> tuple[bytes, Session | None, str]:
        """The body as the engine gets it, and whose it is and for which model, as far as that is of use."""
        body, normalised = normalise.in_body(parse_object(incoming.body), incoming.base.path, self._rules)
        raw = incoming.body if is_clean(body) and not normalised else b""
        client_salt = sanitise(body)
        sent = body.get("model")
        named = sent if isinstance(sent, str) else ""
        salted = incoming.base.path in SALTED
        several = len(self._parts.engines.members) > 1
        session = await self._session_of(incoming, body) if salted or several else None
        if not salted:
            return raw or write_json(body), session, named
        model = await self._model(named)
        lineage, fingerprint = session.lineage if session else "", model.fingerprint if model else ""
        salt = self._parts.salts.of(incoming.tenant, lineage, fingerprint, client_salt)
        return with_fields(raw, body, {"cache_salt": salt}), session, named

    async def _session_of(self, incoming: Incoming, body: dict[str, Any]) -> Session | None:
        given = identity.given(incoming.scope["headers"], body, incoming.base.session_id)
        return await self._parts.sessions.open(incoming.tenant, given.id) if given else None

    async def _continue(self, call: Call, session: Session, incoming: Incoming) -> Call:
        """Put in front of what is new what the client need not send: the window's transcript, or the conversation's."""
        if not call.messages:
            return call
        front = call.front or await self._missing(call, session, incoming)
        return await self._inheriting(call, front, None if session.window_transcript is None else session.frame)

    async def _inheriting(self, call: Call, front: Front | None, frame_id: bytes | None) -> Call:
        """The call with `front`, and with what of a window's frame the client left out."""
        if front is None:
            return call
        if frame_id is None:
            return replace(call, front=front)
        frame = await self._parts.store.frame(frame_id)
        inherited = {name: frame[name] for name in INHERITED_FIELDS if name in frame and name not in call.frame}
        return replace(call, front=replace(front, frame=inherited))

    async def _missing(self, call: Call, session: Session, incoming: Incoming) -> Front | None:
        conversed = call.storage is not None and call.storage.conversation
        history = session.transcript if conversed else session.window_transcript
        if history is None:
            return None
        rule = _system_rule(incoming) or ("replace" if conversed else "")
        return transcripts.missing(await self._parts.store.messages(history), call.messages, rule)

    async def _model(self, name: str) -> Model | None:
        """The model as the engine serves it; None when it does not (the engine then says so itself)."""
        return self._parts.engines.known(name) or await self._parts.engines.look_up(name)

    def _outgoing(self, incoming: Incoming, body: bytes) -> Outgoing:
        headers = request_headers(incoming.scope["headers"], self._dropped) + self._added
        return Outgoing(incoming.scope["method"], incoming.target, headers, body)


def _route(scope: Scope) -> Base:
    """Read the base URL, and what a header says in its place."""
    raw: bytes = scope["raw_path"]
    session_id = window = None
    if raw.startswith((b"/s/", b"/w/")):
        _, kind, part, rest = raw.split(b"/", 3) if raw.count(b"/") >= 3 else (b"", raw[1:2], raw[3:], b"")
        name = unquote(part.decode("latin-1"))
        if kind == b"s":
            session_id = check_session_id(name, "session id in the URL")
        else:
            window = check_window_name(name, "window name in the URL")
        raw = b"/" + rest
    # The engine routes by the decoded path: however a client spells it, a completion must not get past its salt.
    path = unquote(raw.decode("latin-1")).encode()
    if not (path.startswith(b"/v1/") or path in BESIDE) or b".." in path.split(b"/"):
        raise not_found(scope["path"])
    known = path.rstrip(b"/")
    if known in TURNS or known in SALTED or known == _COUNT:
        raw = known
    if window is None:
        sent = next((v for k, v in scope["headers"] if k == WINDOW_HEADER), None)
        window = check_window_name(sent.decode("latin-1"), "X-Window") if sent is not None else None
    return Base(raw, session_id, window)


def _spoken(scope: Scope) -> Dialect:
    """The dialect whose errors the client of a path can read, whatever else is wrong with the request."""
    path: str = scope["path"]
    if path.startswith(("/s/", "/w/")):
        path = "/" + path.split("/", 3)[-1]
    return _MESSAGES if path.startswith("/v1/messages") else _CHAT


def _system_rule(incoming: Incoming) -> transcripts.SystemRule:
    sent = (incoming.header(SYSTEM_HEADER) or b"").strip().lower()
    if sent == b"keep":
        return "keep"
    if sent == b"replace":
        return "replace"
    if sent:
        raise GatewayError("invalid_request", f"X-Window-System is {sent!r:.50}", hint="use keep or replace")
    return ""


def _onward(turn: _Turn, onward: Onward) -> _Turn:
    """The turn in a successor."""
    dropped = turn.dropped + onward.dropped
    return replace(turn, call=onward.call, place=onward.place, ancestor=onward.window, dropped=dropped)


def _headers(turn: _Turn) -> Headers:
    session, model = turn.place.session, turn.model
    headers: Headers = [
        (identity.SESSION_HEADER, session.id.encode()),
        (b"x-context-tokens", b"%d" % session.token_count),
    ]
    if model and model.context_limit:
        headers.append((b"x-context-limit", b"%d" % model.context_limit))
    if turn.ancestor:
        headers.append((b"x-context-ancestor", turn.ancestor.encode()))
        headers.append((b"x-context-dropped-messages", b"%d" % turn.dropped))
    return headers

"""The inference API: `/v1/*`, and the same under `/s/{session_id}` and `/w/{window}`, in front of the engine.

A turn of a session (`TURNS`) is read once, salted, relayed, and given to the recorder when it is over
(`gateway.sessions.recorder`). Other allowed requests (`passthrough_routes`) pass through (`passthrough`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from msgspec import structs
from starlette.types import Message, Receive, Scope, Send

from gateway.api import auth
from gateway.api.asgi import ClientGone, not_found, parse_object, read_body, require_json, send_answer
from gateway.api.connection import client_of
from gateway.api.inference import history, stored_responses
from gateway.api.inference.passthrough import Passthrough
from gateway.api.inference.passthrough_routes import COUNT, Routes
from gateway.api.inference.relay import FingerprintCache, Outgoing, RelayOptions, relay, request_headers, send_refusal
from gateway.api.inference.request import (
    SYSTEM_HEADER,
    TURNS,
    WINDOW_HEADER,
    InferenceRequest,
    error_dialect,
    read_target,
    route_name,
)
from gateway.dialects import prompt_filters
from gateway.dialects.base import Call, Dialect
from gateway.engines.connection import Headers
from gateway.errors import GatewayError
from gateway.runtime.offload import HEAVY_MESSAGES, is_heavy
from gateway.sessions import client_ids, prefix_chain
from gateway.sessions.session_match import SessionMatch
from gateway.sessions.turn_context import RelayResult, TurnContext
from gateway.telemetry.trace_context import TRACEPARENT, Span, current, name_request
from gateway.windows import branch
from gateway.windows.context import Services
from gateway.windows.overflow import Overflow, SuccessorTurn
from gateway.windows.restore import restore_for_turn

log = logging.getLogger(__name__)

# The engine gets its own host, length and key; a compressed answer could not be read afterwards; sessions and priority
# are for the gateway only.
_DROPPED = frozenset(
    {
        b"host",
        b"content-length",
        b"accept-encoding",
        b"expect",
        SYSTEM_HEADER,
        WINDOW_HEADER,
        b"x-vllm-priority",
        b"x-data-parallel-rank",
        *client_ids.HEADERS,
    }
)


class Inference:
    """The ASGI application of the inference API."""

    def __init__(self, services: Services) -> None:
        self._services = services
        settings = services.settings
        own_key = bool(settings.api_key or settings.engine_api_key)
        self._dropped = _DROPPED | frozenset(auth.KEY_HEADERS) if own_key else _DROPPED
        key = settings.engine_api_key
        self._stamps = FingerprintCache()
        self._overflow = Overflow(services)
        self._rules = frozenset(settings.normalise)
        self._added: Headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        self._routes = Routes(settings.extra_paths)
        self._passthrough = Passthrough(services, self._overflow, self._outgoing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            await self._serve(scope, receive, send)
        except GatewayError as error:
            await send_answer(send, error.status, error_dialect(scope).error(error))
        except ClientGone:
            return
        except Exception:
            log.exception("%s %.200r failed", scope["method"], scope["path"])
            failure = GatewayError("internal", "internal error; see the gateway's log")
            with suppress(RuntimeError):  # the answer had begun: uvicorn closes the connection
                await send_answer(send, failure.status, error_dialect(scope).error(failure))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._services.settings
        tenant = auth.tenant(scope["headers"], settings.api_key, settings.allowed_origins)
        base = read_target(scope)
        route = self._routes.check(scope["method"], base.known)
        if route.needs_json:
            require_json(scope["headers"])
        body = await read_body(scope, receive, settings)
        if current() is not None:
            name_request(scope["method"], route_name(scope, self._routes.pattern(base.known)))
        incoming = InferenceRequest(scope, receive, send, tenant, base, body)
        if dialect := TURNS.get(base.path):
            await self._turn(incoming, dialect)
        elif base.path == COUNT:
            await self._passthrough.count(incoming)
        elif not route.from_store:
            await self._passthrough.serve(incoming, route)
        elif answer := await stored_responses.serve(self._services, tenant, scope["method"], incoming.target):
            await send_answer(send, 200, answer)
        else:
            raise not_found(scope["path"])

    async def _turn(self, incoming: InferenceRequest, dialect: Dialect) -> None:
        """Serve a turn of a session."""
        services, arrived = self._services, time.monotonic()
        turn = await services.offload.run(incoming.heavy, self._read_turn, incoming, dialect, arrived)
        turn.model = model = await services.engines.look_up(turn.call.model)
        if turn.call.storage is not None:
            await self._read_stored(incoming, turn)
        call = turn.call
        if model and not call.model:  # the engine uses its own; a freeze has to request it by name
            call = structs.replace(call, model=model.id)
        let_next_in = await services.sessions.enter(turn)
        turn.admitted_at = time.monotonic()
        try:
            await self._find_session(incoming, turn, call)
            await self._relay_turn(incoming, turn, let_next_in)
        finally:
            let_next_in()

    async def _find_session(self, incoming: InferenceRequest, turn: TurnContext, call: Call) -> None:
        """Find the session of a turn, or its successor, and what the client left out of the conversation."""
        services = self._services
        turn.match = await self._match(incoming, turn)
        turn.call = await history.prepend_session_history(services, call, turn.match.session, incoming)
        if turn.match.session.successor and history.leaves_history(turn.call):
            turn.match = await self._overflow.newest(turn.match)
            turn.call = await history.prepend_session_history(services, call, turn.match.session, incoming)
        if followed := await self._overflow.successor_turn_for(turn.match, turn.call):
            _follow(turn, followed)
        turn.identified_at = time.monotonic()

    async def _read_stored(self, incoming: InferenceRequest, turn: TurnContext) -> None:
        """Read the stored items and the stored response that a turn refers to."""
        call = await stored_responses.insert_items(self._services, incoming.tenant, turn.call, turn.dialect)
        if call is not turn.call:
            turn.prompt = self._prompt(incoming, call, turn.client_id)
        turn.call, turn.previous = await stored_responses.resume(self._services, incoming.tenant, call)

    async def _retry_in_successor(
        self, incoming: InferenceRequest, full: TurnContext, refusal: tuple[Headers, bytes]
    ) -> None:
        """Continue a full session in its successor; if that is impossible, the client gets the engine's refusal."""
        arrived = time.monotonic()
        try:
            followed = await self._overflow.continue_in_successor(full.match, full.call, full.model)
        except GatewayError as error:
            log.warning("session %s is full and cannot continue: %s", full.match.session.id, error.message)
            await send_refusal(incoming.send, refusal, "; ".join(filter(None, (error.message, error.hint))))
            return
        turn = replace(full, arrived=arrived, admitted_at=arrived, identified_at=arrived, result=RelayResult())
        _follow(turn, followed)
        await self._relay_turn(incoming, turn, hold_refusal=False)

    async def _relay_turn(
        self, incoming: InferenceRequest, turn: TurnContext, on_begin: Callable[[], None] = lambda: None,
        *, hold_refusal: bool = True,
    ) -> None:  # fmt: skip
        """Relay a turn, and give it to the recorder when it is over, however it ended."""
        services, dialect, call = self._services, turn.dialect, turn.call
        session = turn.match.session
        placed = await restore_for_turn(services, session, call.model)
        turn.fingerprint = turn.model.fingerprint if turn.model else ""
        turn.salt = salt = services.salts.of(session.tenant, session.lineage, turn.fingerprint, call.client_salt)
        heavy = turn.heavy_body or (call.front is not None and is_heavy(call.front.history))
        written = await services.offload.run(heavy, dialect.write_with_salt, call, salt)
        turn.span = services.traces.child("chat", kind="client")
        outgoing = self._outgoing(incoming, written, turn.span, may_load=True)
        options = RelayOptions(
            dialect,
            _headers(turn),
            services.settings.max_reply_bytes,
            call.hide_usage,
            self._stamps,
            (incoming.base.path, call.model),
            may_be_full=True,
            hold_refusal=hold_refusal and services.settings.on_full == "successor",
            on_last=partial(services.recorder.mark_reply_sent, turn),
        )
        turn.started_at, clock = time.time(), time.monotonic()
        turn.overhead_s = clock - turn.arrived
        services.recorder.begin(turn)
        on_begin()
        seen = services.turns.seen_by_others()
        send = incoming.send if seen is None else _after(seen, incoming.send)
        route = services.engines.route(
            session.lineage, session.engine, call.model, tokens=session.token_count, placed=placed
        )
        note = services.salt_notes.begin(session, salt)
        try:
            await relay(route, outgoing, client_of(incoming.scope), send, options, turn.result)
        finally:
            services.salt_notes.withdraw(note)  # the record comes as soon as the note would
            turn.duration_ms, turn.engine = (time.monotonic() - clock) * 1000, route.engine
            if turn.heavy_body and turn.result.refusal is None:
                # A large body would take memory until the turn is recorded, and is not needed for that.
                turn.call = structs.replace(call, raw=b"", body={})
            services.recorder.enqueue(turn)
        if turn.result.refusal is not None and options.hold_refusal:
            await self._retry_in_successor(incoming, turn, turn.result.refusal)

    async def _match(self, incoming: InferenceRequest, turn: TurnContext) -> SessionMatch:
        services, window, messages = self._services, incoming.base.window, turn.prompt.messages
        if turn.previous is None and window is not None and messages:
            at_turn = incoming.base.at_turn
            return await branch.resolve_in_window(services, turn, window, incoming.system_rule, at_turn)
        if turn.previous is None and len(messages) > HEAVY_MESSAGES:
            await services.offload.run(True, turn.prompt.prepare, turn.client_id)
        return await services.sessions.resolve(turn)

    def _read_turn(self, incoming: InferenceRequest, dialect: Dialect, arrived: float) -> TurnContext:
        """Parse a request. Raises `invalid_request`, `invalid_session_id`, `too_complex`."""
        settings = self._services.settings
        parsed = parse_object(incoming.body, settings.max_json_values)
        body, normalised = prompt_filters.in_body(parsed, incoming.base.path, self._rules)
        client_id = client_ids.read_client_session_id(incoming.scope["headers"], body, incoming.base.session_id)
        call = dialect.read(body, b"" if normalised else incoming.body)
        prompt = self._prompt(incoming, call, client_id)
        return TurnContext(incoming.tenant, dialect, call, client_id, prompt, normalised, incoming.heavy, arrived)

    def _prompt(
        self, incoming: InferenceRequest, call: Call, client_id: client_ids.ClientSessionId | None
    ) -> prefix_chain.Prompt:
        limit = self._services.settings.max_messages
        if len(call.messages) > limit:
            message = f"the request holds {len(call.messages)} messages; at most {limit} are allowed"
            raise GatewayError("too_complex", message, hint="max_messages sets the limit")
        key = client_id.id if client_id and client_id.kind == "key" else ""
        prompt = prefix_chain.Prompt(call.messages, prefix_chain.seed(call.body, key, call.client_salt), call.frame)
        if incoming.heavy:
            prompt.prepare(client_id)
        return prompt

    def _outgoing(
        self, incoming: InferenceRequest, body: bytes, span: Span | None = None, *, may_load: bool = False
    ) -> Outgoing:
        headers = request_headers(incoming.scope["headers"], self._dropped) + self._added
        if span is not None:
            headers.append((TRACEPARENT, span.header))
        return Outgoing(incoming.scope["method"], incoming.target, headers, body, may_load)


def _follow(turn: TurnContext, followed: SuccessorTurn) -> None:
    turn.call, turn.match, turn.ancestor = followed.call, followed.match, followed.window
    turn.dropped += followed.dropped


def _after(seen: Callable[[], Awaitable[None]], send: Send) -> Send:
    """Send nothing before `seen`."""
    first = asyncio.Lock()
    done = False

    async def send_after(message: Message) -> None:
        nonlocal done
        async with first:
            if not done:
                await seen()
                done = True
        await send(message)

    return send_after


def _headers(turn: TurnContext) -> Headers:
    session, model = turn.match.session, turn.model
    headers: Headers = [
        (client_ids.SESSION_HEADER, session.id.encode()),
        (b"x-session-match", turn.match.header.encode()),
        (b"x-context-tokens", b"%d" % session.token_count),
    ]
    if model and model.context_limit:
        headers.append((b"x-context-limit", b"%d" % model.context_limit))
    front = turn.call.front
    if front and front.origin:
        doubt = b"; ambiguous" if front.unsure else b""
        headers.append((b"x-context-history", front.origin.encode() + doubt))
        headers.append((b"x-context-added-messages", b"%d" % len(front.history)))
    if turn.ancestor:
        headers.append((b"x-context-ancestor", turn.ancestor.encode()))
        headers.append((b"x-context-dropped-messages", b"%d" % turn.dropped))
    return headers

"""Pass through requests that are not session turns: strip private fields, and add a salt where KV is stored."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from msgspec import structs

from gateway.api.asgi import parse_object, send_answer
from gateway.api.connection import client_of
from gateway.api.inference import history
from gateway.api.inference.passthrough_routes import ROUTES, Route
from gateway.api.inference.relay import Outgoing, RelayOptions, relay
from gateway.api.inference.request import MESSAGES, InferenceRequest, error_dialect
from gateway.dialects import prompt_filters
from gateway.dialects.base import Call, is_clean, model_of, sanitise, with_fields, write_json
from gateway.engines.connection import Headers
from gateway.records import Session
from gateway.sessions import client_ids
from gateway.sessions.session_match import SessionMatch
from gateway.sessions.turn_context import RelayResult
from gateway.store.types import SaltNote
from gateway.telemetry import genai
from gateway.telemetry.trace_context import Span
from gateway.telemetry.traces import clean
from gateway.windows.context import Services
from gateway.windows.overflow import Overflow

MakeOutgoing = Callable[[InferenceRequest, bytes, Span | None], Outgoing]
_ANONYMOUS = "anonymous/"  # begins the lineage of a request without a session; no session id has a slash


class Passthrough:
    """Relays requests that are not turns; `outgoing` makes the engine's request from the client's and a body."""

    def __init__(self, services: Services, overflow: Overflow, outgoing: MakeOutgoing) -> None:
        self._services = services
        self._overflow = overflow
        self._outgoing = outgoing
        self._rules = frozenset(services.settings.normalise)

    async def serve(self, incoming: InferenceRequest, route: Route) -> None:
        """Relay a request."""
        engines = self._services.engines
        if len(engines.members) > 1 and incoming.base.path == b"/v1/models" and incoming.scope["method"] == "GET":
            cards = write_json({"object": "list", "data": engines.cards()})
            await send_answer(incoming.send, 200, cards, _session_header(incoming))
            return
        body, session, model = incoming.body, None, ""
        note: SaltNote | None = None
        if body and b"json" in (incoming.header(b"content-type") or b"json").lower():
            body, session, model, note = await self._sanitise_and_salt(incoming, route)
        elif len(engines.members) > 1:
            session = await self._session_of(incoming, {})
        with self._making_kv(note) if note else nullcontext():
            await self._relay(incoming, body, session, model, may_load=route.salted)

    async def count(self, incoming: InferenceRequest) -> None:
        """Relay a request to count the tokens of a turn, with the history that the engine would get in front of it."""
        services = self._services
        body, call = await services.offload.run(incoming.heavy, self._read, incoming)
        session = await self._session_of(incoming, body)
        if session and session.window_transcript is not None:
            call = await history.prepend_session_history(services, call, session, incoming)
        elif incoming.base.window is not None and call.messages:
            call = await history.prepend_window_history(services, call, incoming.base.window, incoming)
        if session and (followed := await self._overflow.successor_turn_for(SessionMatch(session, "", b""), call)):
            call = followed.call
        await self._relay(incoming, MESSAGES.question(call), session, call.model)

    @contextmanager
    def _making_kv(self, note: SaltNote) -> Iterator[None]:
        """In the block the engine computes KV that is not recorded with a turn; it may be stored a while later."""
        services = self._services
        services.salt_notes.add(note)
        try:
            with services.turns.protect_lineage(note.tenant, note.lineage):
                yield
        finally:
            services.salt_notes.add(note)  # with the time of now: KV that is stored late is searched for again

    def _read(self, incoming: InferenceRequest) -> tuple[dict[str, Any], Call]:
        body, normalised = self._parsed(incoming)
        return body, MESSAGES.read(body, b"" if normalised else incoming.body)

    def _parsed(self, incoming: InferenceRequest) -> tuple[dict[str, Any], tuple[str, ...]]:
        parsed = parse_object(incoming.body, self._services.settings.max_json_values)
        return prompt_filters.in_body(parsed, incoming.base.path, self._rules)

    async def _relay(
        self, incoming: InferenceRequest, body: bytes, session: Session | None, model: str, *, may_load: bool = False
    ) -> None:
        engines = self._services.engines
        route = engines.route(session.lineage, session.engine, model) if session else engines.route("", model=model)
        options = RelayOptions(error_dialect(incoming.scope), _session_header(incoming), limit=0)
        span = self._services.traces.child(_span_name(incoming, model), kind="client")
        outgoing = structs.replace(self._outgoing(incoming, body, span), may_load=may_load)
        result = RelayResult()
        with nullcontext() if span is None else self._services.traces.opened(span):
            await relay(route, outgoing, client_of(incoming.scope), incoming.send, options, result)
            if span is not None:
                _describe(span, result, model, route.engine)

    async def _sanitise_and_salt(
        self, incoming: InferenceRequest, route: Route
    ) -> tuple[bytes, Session | None, str, SaltNote | None]:
        """The body for the engine, its session and model if they are needed, and the note of its salt."""
        body, normalised = await self._services.offload.run(incoming.heavy, self._parsed, incoming)
        raw = incoming.body if is_clean(body) and not normalised else b""
        client_salt = sanitise(body)
        model_name = model_of(body)
        salted = route.salted
        several = len(self._services.engines.members) > 1
        session = await self._session_of(incoming, body) if salted or several else None
        if not salted:
            return raw or write_json(body), session, model_name, None
        model = await self._services.engines.look_up(model_name)
        # Without a session no KV is shared: nothing shows that the next request is from the same client.
        lineage = session.lineage if session else f"{_ANONYMOUS}{secrets.token_hex(16)}"
        salt = self._services.salts.of(incoming.tenant, lineage, model.fingerprint if model else "", client_salt)
        note = SaltNote(salt, incoming.tenant, lineage, session.id if session else "")
        return with_fields(raw, body, {"cache_salt": salt}), session, model_name, note

    async def _session_of(self, incoming: InferenceRequest, body: dict[str, Any]) -> Session | None:
        client_id = client_ids.read_client_session_id(incoming.scope["headers"], body, incoming.base.session_id)
        return await self._services.sessions.open(incoming.tenant, client_id.id) if client_id else None


def _span_name(incoming: InferenceRequest, model: str) -> str:
    """Of an engine's operation with a name in the conventions, that and the model; else the path."""
    known = incoming.base.known
    if known == b"/v1/embeddings":
        return f"embeddings {clean(model)}".strip()
    method: str = incoming.scope["method"]
    return f"{method} {known.decode()}" if known in ROUTES else method


def _describe(span: Span, result: RelayResult, model: str, engine: str) -> None:
    parts = urlsplit(engine)
    span.attributes |= {genai.PROVIDER_NAME: genai.PROVIDER, genai.STATUS: result.status, genai.OUTCOME: result.outcome}
    if span.name.startswith("embeddings"):
        span.attributes[genai.OPERATION] = "embeddings"
    if model:
        span.attributes[genai.MODEL] = clean(model)
    if parts.hostname:
        span.attributes |= {genai.SERVER: parts.hostname, genai.PORT: parts.port or 80}
    if result.status >= 400:
        span.error = str(result.status)


def _session_header(incoming: InferenceRequest) -> Headers:
    session_id = incoming.base.session_id
    return [(client_ids.SESSION_HEADER, session_id.encode())] if session_id else []

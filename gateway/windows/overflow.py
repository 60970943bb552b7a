"""Context overflow (`on_full = successor`): freeze the session, and continue its conversation in a successor.

The engine says that a prompt does not fit, before it computes anything. Then:

1. The full session is frozen into a window that keeps all of it, and can be asked.
2. The oldest turns are left out, whole ones only, until half of the context is free: what is kept stays the same from
   turn to turn, so that its KV is found, until the successor is full too.
3. The successor, in the same lineage and so under the same salt, has the system messages and the turns that are kept.

A client goes on as if nothing had happened, with all of its history and under the old id: what was left out is
recognised by its hash, and left out again (`onward`). A history that was edited there is another conversation.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from gateway.dialects import text_transcripts, transcripts
from gateway.dialects.base import Call
from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.records import AUTO_TAG, Front, Message, Session, Succession
from gateway.sessions import prefix_chain
from gateway.sessions.resolver import new_id
from gateway.sessions.session_match import SessionMatch
from gateway.windows.autofreeze import rules
from gateway.windows.context import Services
from gateway.windows.freeze import Naming
from gateway.windows.naming import freeze_automatically

log = logging.getLogger(__name__)

SOURCE = "successor"  # how a successor says that it was recognised
TAGS = (AUTO_TAG, "full")
_NAMES = "full-{session_id}-{timestamp}"
_KEPT = 0.5  # of the context limit, at most, is kept of the old turns
_NAME_ROOM = 120
_ROOM_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class SuccessorTurn:
    """Where a turn goes on: its session, what the engine gets of it, and what was left out on the way."""

    match: SessionMatch
    call: Call
    window: str  # that holds all that was left out
    dropped: int  # messages


class Overflow:
    """Gives full sessions a successor, each one once in this process; the store sees to the others."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._locks: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}

    async def successor_turn_for(self, match: SessionMatch, call: Call) -> SuccessorTurn | None:
        """Where a turn of a session that has a successor, or is one, goes on; None if it stays as it is."""
        session = match.session
        if session.successor is None and session.source != SOURCE:
            return None
        chain = await self._services.store.successions(session.tenant, session.id)
        system, rest = transcripts.split(call.whole)
        dropped, last = 0, None
        for step in chain:
            if _begins_with(rest, step):
                rest, dropped, last = rest[step.dropped :], dropped + step.dropped, step
        if last is None:
            return None
        successor = await self._services.sessions.open(session.tenant, last.successor)
        return SuccessorTurn(_moved(match, successor), _cut(call, system, rest), last.window, dropped)

    async def newest(self, match: SessionMatch) -> SessionMatch:
        """The match of the last of a session's successors, for a client that leaves its history to us."""
        session = match.session
        if session.successor is None:
            return match
        chain = await self._services.store.successions(session.tenant, session.id)
        return _moved(match, await self._services.sessions.open(session.tenant, chain[-1].successor))

    async def continue_in_successor(self, match: SessionMatch, call: Call, model: Model | None) -> SuccessorTurn:
        """Freeze a full session and begin its successor, or go on in the one that it has.

        `call` is what did not fit. Raises what a freeze raises, and `invalid_request` where nothing can be left out.
        """
        session = match.session
        async with self._alone(session.tenant, session.id):
            await self._services.recorder.flush()  # the turn before may not be recorded yet
            now = await self._services.store.session(session.tenant, session.id)
            if (
                now is not None
                and now.successor
                and (there := await self.successor_turn_for(replace(match, session=now), call))
            ):
                return there
            if now is None or now.transcript is None:
                raise _cannot("even its first turn does not fit", "send less of it")
            if model is None or not model.context_limit:
                raise _cannot("the engine does not say how much fits", "see max_model_len of GET /v1/models")
            system, rest = transcripts.split(call.whole)
            count = await self._too_many(now, call, model, system, rest)
            window, warnings = await freeze_automatically(self._services, session.tenant, session.id, _naming(now))
            for warning in warnings:
                log.warning("window %s of the full session %s: %s", window.name, session.id, warning)
            if window.transcript != now.transcript:
                raise _cannot("it continued while it was being frozen", "send the turn again")
            step = Succession(
                tenant=session.tenant,
                session_id=session.id,
                successor=await self._new_id(session),
                window=window.name,
                dropped=count,
                link=_link(rest[:count]),
            )
            successor = Session(
                session.tenant, step.successor, session.lineage, session.model, source=SOURCE, parent=session.id,
                engine=session.engine, window=window.name, window_transcript=now.window_transcript, frame=now.frame,
                created_at=time.time(), last_active_at=time.time(),
            )  # fmt: skip
            step = await self._services.store.succeed(step, successor, full=now)
            log.info("session %s is full: frozen as %s, continues as %s", session.id, step.window, step.successor)
        there = await self.successor_turn_for(replace(match, session=replace(now, successor=step.successor)), call)
        if there is None:  # another worker was faster, with a history that this is not
            raise _cannot("it already has a successor, with another history", "continue that one")
        return there

    async def _too_many(
        self, session: Session, call: Call, model: Model, system: list[Message], rest: list[Message]
    ) -> int:
        """How many of the messages after the system's have to be left out: none that the session does not hold.

        Raises `invalid_request`.
        """
        if text_transcripts.kind(call.whole):
            raise _cannot("a text or a list of token ids has no turns", "send messages to /v1/chat/completions")
        _, history = transcripts.split(await self._services.store.messages(session.transcript or b""))
        held = transcripts.common(rest, history)  # what the client has changed since is in no window
        starts = [i for i, message in enumerate(rest[: held + 1]) if i and message.get("role") == "user"]
        if not starts:
            raise _cannot("it does not begin with a whole turn of the session", "send less, or the history as it was")
        most = min(int(model.context_limit * _KEPT), model.context_limit - _room(call) - 1)
        engine = self._services.engines.for_lineage(session.lineage, session.engine)
        for start in starts:
            kept = [*system, *rest[start:]]
            guess = self._services.estimator.estimate(model.id, kept, call.whole_frame).tokens
            last = start == starts[-1]
            if guess > most * 1.25 and not last:
                continue  # far too long to ask the engine about
            count = len(await engine.render(model.id, call.whole_frame, kept))
            if count <= most or (last and count + _room(call) < model.context_limit):
                return start
        raise _cannot("its last turn alone does not fit", "send less at once")

    async def _new_id(self, session: Session) -> str:
        chain = await self._services.store.successions(session.tenant, session.id)
        first = chain[0].session_id if chain else session.id
        named = f"{first[:_NAME_ROOM]}.{len(chain) + 2}"
        taken = await self._services.store.session(session.tenant, named)
        return new_id() if taken or self._services.turns.has_turn_in_flight(session.tenant, named) else named

    @asynccontextmanager
    async def _alone(self, *key: str) -> AsyncIterator[None]:
        tenant, session_id = key
        lock, waiting = self._locks.get((tenant, session_id), (asyncio.Lock(), 0))
        self._locks[tenant, session_id] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._locks[tenant, session_id]
            if waiting == 1:
                del self._locks[tenant, session_id]
            else:
                self._locks[tenant, session_id] = lock, waiting - 1


def _naming(session: Session) -> Naming:
    name = rules.window_name(_NAMES, session.id, session.turn_count, time.time())
    return Naming(name, rules.description("its context was full"), TAGS)


def _begins_with(messages: Sequence[Message], step: Succession) -> bool:
    return len(messages) > step.dropped and _link(messages[: step.dropped]) == step.link


def _link(messages: Sequence[Message]) -> bytes:
    return prefix_chain.chain(messages, b"")[-1]


def _moved(match: SessionMatch, session: Session) -> SessionMatch:
    return SessionMatch(session, match.source, match.seed)


def _cut(call: Call, system: list[Message], rest: list[Message]) -> Call:
    """The call with nothing but these messages."""
    body = call.body | {name: [] for name in ("messages", "input") if name in call.body}
    frame = call.front.frame if call.front else {}
    return replace(call, body=body, raw=b"", messages=[], front=Front(system, rest, frame))


def _room(call: Call) -> int:
    """Tokens that the reply may have."""
    asked = (call.body.get(name) for name in _ROOM_FIELDS)
    return next((value for value in asked if isinstance(value, int) and value > 0), 1)


def _cannot(why: str, hint: str) -> GatewayError:
    return GatewayError("invalid_request", f"the context is full, and nothing can be left out: {why}", hint=hint)

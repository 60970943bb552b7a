"""Context overflow (`on_full = successor`): freeze a full session, and continue its conversation in a successor.

The engine reports that a prompt does not fit before it computes anything. Then:

1. The full session is frozen into a window that keeps all of it, and can be asked.
2. The oldest whole turns are dropped until half of the context is free. What is kept stays the same from turn to turn,
   so that its KV is found, until the successor is full too.
3. The successor, in the same lineage and so with the same salt, has the system messages and the turns that are kept.

The client continues as if nothing had happened, with all of its history and the old id: what was dropped is recognised
by its hash, and dropped again (`successor_turn_for`). A history that was edited there is a different conversation.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from msgspec import structs

from gateway.dialects import text_transcripts, transcripts
from gateway.dialects.base import Call
from gateway.engines.client import TOO_LONG, EngineClient, Model
from gateway.errors import GatewayError
from gateway.records import AUTO_TAG, Front, Message, Session, Succession
from gateway.sessions import prefix_chain
from gateway.sessions.resolver import new_id
from gateway.sessions.session_match import SessionMatch
from gateway.windows.autofreeze import rules
from gateway.windows.context import OperationContext, Services
from gateway.windows.freeze import Naming, freeze_automatically

log = logging.getLogger(__name__)

SOURCE = "successor"  # how a successor was recognised
TAGS = (AUTO_TAG, "full")
_WINDOW_NAME = "full-{session_id}-{timestamp}"
_KEPT = 0.5  # of the context limit: how much of the old turns is kept at most
_MAX_STEM = 120  # characters of a session id that its successors' ids begin with
_REPLY_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class SuccessorTurn:
    """Where a turn continues: its session, what the engine gets of it, and what was dropped on the way."""

    match: SessionMatch
    call: Call
    window: str  # that holds everything dropped
    dropped: int  # messages


class Overflow:
    """Gives full sessions a successor, one call at a time in this process; the store excludes other processes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()  # while in use

    async def successor_turn_for(self, match: SessionMatch, call: Call) -> SuccessorTurn | None:
        """Where a turn of a session that has a successor, or is one, continues; None if in the session itself."""
        session = match.session
        if session.successor is None and session.source != SOURCE:
            return None
        system, rest = transcripts.split(call.whole)
        dropped, last = 0, None
        for step in await self._services.store.successions(session.tenant, session.id):
            if _begins_with(rest, step):
                rest, dropped, last = rest[step.dropped :], dropped + step.dropped, step
        if last is None:
            return None
        successor = await self._services.sessions.open(session.tenant, last.successor)
        return SuccessorTurn(_moved(match, successor), _cut(call, system, rest), last.window, dropped)

    async def newest(self, match: SessionMatch) -> SessionMatch:
        """The match of a session's last successor, for a client that leaves its history to the gateway."""
        session = match.session
        if session.successor is None:
            return match
        chain = await self._services.store.successions(session.tenant, session.id)
        return _moved(match, await self._services.sessions.open(session.tenant, chain[-1].successor))

    async def continue_in_successor(self, match: SessionMatch, call: Call, model: Model | None) -> SuccessorTurn:
        """Freeze a full session and begin its successor, or continue in the one that it has.

        `call` is what did not fit. Raises what a freeze raises, and `invalid_request` if nothing can be dropped.
        """
        tenant, session_id = match.session.tenant, match.session.id
        async with self._locks.setdefault((tenant, session_id), asyncio.Lock()):
            await self._services.turns.settle(tenant, session_id)
            await self._services.recorder.flush()  # the previous turn may not be recorded yet
            session = await self._services.store.session(tenant, session_id)
            if session is not None and session.successor:
                existing = await self.successor_turn_for(structs.replace(match, session=session), call)
                if existing is not None:
                    return existing
            if session is None or session.transcript is None:
                raise _cannot("its first turn is already too long for the context", "shorten the request")
            if model is None or not model.context_limit:
                raise _cannot("the engine does not say how much fits", "see max_model_len of GET /v1/models")
            successor = await self._begin_successor(session, call, model)
        match = structs.replace(match, session=structs.replace(session, successor=successor))
        turn = await self.successor_turn_for(match, call)
        if turn is None:  # another process was faster, with a different history
            raise _cannot("it already has a successor, with another history", "continue that one")
        return turn

    async def _begin_successor(self, session: Session, call: Call, model: Model) -> str:
        """Freeze a session and add its successor, or find the one that another process has added; return its id."""
        services = self._services
        system, rest = transcripts.split(call.whole)
        dropped = await self._messages_to_drop(session, call, model, system, rest)
        ctx = OperationContext(services, session.tenant)
        window, warnings = await freeze_automatically(ctx, session.id, _naming(session))
        for warning in warnings:
            log.warning("window %s of the full session %s: %s", window.name, session.id, warning)
        if window.transcript != session.transcript:
            raise _cannot("it continued while it was being frozen", "send the turn again")
        new_id, now = await self._new_id(session), time.time()
        step = Succession(session.tenant, session.id, new_id, window.name, dropped, _hash(rest[:dropped]))
        successor = Session(
            session.tenant, new_id, session.lineage, session.model, source=SOURCE, parent=session.id,
            engine=session.engine, window=window.name, window_transcript=session.window_transcript, frame=session.frame,
            created_at=now, last_active_at=now, title=session.title,
        )  # fmt: skip
        step = await services.store.succeed(step, successor, full=session)
        log.info("session %s is full: frozen as %s, continues as %s", session.id, step.window, step.successor)
        return step.successor

    async def _messages_to_drop(
        self, session: Session, call: Call, model: Model, system: list[Message], rest: list[Message]
    ) -> int:
        """How many of the messages after the system's to drop: whole turns, and only what the session holds.

        Raises `invalid_request`.
        """
        if text_transcripts.kind(call.whole):
            raise _cannot("a text or a list of token ids has no turns", "send messages to /v1/chat/completions")
        _, history = transcripts.split(await self._services.store.messages(session.transcript or b""))
        recorded = transcripts.common(rest, history)  # what the client has changed since is in no window
        starts = [i for i, message in enumerate(rest[: recorded + 1]) if i and message.get("role") == "user"]
        if not starts:
            raise _cannot("the request does not begin with a recorded turn", "send less, or the history as it was")
        reply = _reply_tokens(call)
        limit = min(int(model.context_limit * _KEPT), model.context_limit - reply - 1)
        engine = self._services.engines.for_lineage(session.lineage, session.engine)
        for start in starts:
            kept, is_last = [*system, *rest[start:]], start == starts[-1]
            estimate = self._services.estimator.estimate(model.id, kept, call.whole_frame).tokens
            if estimate > limit * 1.25 and not is_last:
                continue  # far too long to ask the engine
            count = await _rendered(engine, model, call.whole_frame, kept)
            if count <= limit or (is_last and count + reply < model.context_limit):
                return start
        raise _cannot("its last turn alone does not fit", "send less at once")

    async def _new_id(self, session: Session) -> str:
        chain = await self._services.store.successions(session.tenant, session.id)
        first = chain[0].session_id if chain else session.id
        numbered = f"{first[:_MAX_STEM]}.{len(chain) + 2}"
        taken = await self._services.store.session(session.tenant, numbered) is not None
        taken = taken or await self._services.turns.has_turn_in_flight(session.tenant, numbered)
        return new_id() if taken else numbered


async def _rendered(engine: EngineClient, model: Model, frame: Mapping[str, Any], messages: Sequence[Message]) -> int:
    """How many tokens these messages are; the context's limit if the engine refuses to render as many."""
    try:
        return len(await engine.render(model.id, frame, messages))
    except GatewayError as error:
        if error.code != "invalid_request" or TOO_LONG not in error.message:
            raise
        return model.context_limit


def _naming(session: Session) -> Naming:
    name = rules.window_name(_WINDOW_NAME, session.id, session.turn_count, time.time())
    return Naming(name, rules.description("its context was full"), TAGS)


def _begins_with(messages: Sequence[Message], step: Succession) -> bool:
    return len(messages) > step.dropped and _hash(messages[: step.dropped]) == step.link


def _hash(messages: Sequence[Message]) -> bytes:
    return prefix_chain.chain(messages, b"")[-1]


def _moved(match: SessionMatch, session: Session) -> SessionMatch:
    return SessionMatch(session, match.source, match.seed)


def _cut(call: Call, system: list[Message], rest: list[Message]) -> Call:
    """The call with only these messages."""
    body = call.body | {name: [] for name in ("messages", "input") if name in call.body}
    frame = call.front.frame if call.front else {}
    return structs.replace(call, body=body, raw=b"", messages=[], front=Front(system, rest, frame))


def _reply_tokens(call: Call) -> int:
    """How long the reply may be."""
    limits = (call.body.get(name) for name in _REPLY_LIMITS)
    return next((value for value in limits if isinstance(value, int) and value > 0), 1)


def _cannot(why: str, hint: str) -> GatewayError:
    return GatewayError("invalid_request", f"the context is full, and nothing can be left out: {why}", hint=hint)

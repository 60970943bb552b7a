"""A finished turn: what its reply says, and the record that the store keeps of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.dialects.base import Reply
from gateway.errors import GatewayError
from gateway.records import Message, StoredResponse, Trace, Turn
from gateway.sessions import prefix_chain
from gateway.sessions.prefix_chain import ConversationPrefix, Prompt
from gateway.sessions.turn_context import TurnContext
from gateway.store.types import TurnRecord

log = logging.getLogger(__name__)

_MAX_DETAIL = 1000  # an engine repeats what it refuses


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A turn with its reply. `whole` is what was asked, `messages` the conversation with the reply, None without one.

    Without the reply the next turn's prompt is not known, so the transcript stays where it was.
    """

    turn: TurnContext
    reply: Reply
    whole: Sequence[Message]
    messages: Sequence[Message] | None


@dataclass(frozen=True, slots=True)
class Review:
    """What was to be expected of a turn's prompt, see `gateway.sessions.cache_review`."""

    estimated: int | None = None
    expected: int | None = None
    miss: str = ""


def parse(ended: TurnContext) -> ParsedTurn:
    """Parse what was recorded of the reply."""
    is_turn = bool(ended.call.messages or ended.call.front)
    whole = ended.call.whole if is_turn else []
    try:
        reply = _reply(ended)
        messages = ended.call.followed_by(reply.message) if reply.message and is_turn else None
    except Exception:
        # An engine may send anything; one odd reply must not cost the other turns of the batch.
        log.exception("could not read a reply of session %s", ended.match.session.id)
        return ParsedTurn(ended, Reply(None, None, "the reply could not be read"), whole, None)
    return ParsedTurn(ended, reply, whole, messages)


def to_record(turn: ParsedTurn, review: Review) -> TurnRecord:
    """What the store is to keep of a turn."""
    ended, reply, session = turn.turn, turn.reply, turn.turn.match.session
    response = _response(turn)
    return TurnRecord(
        turn=Turn(
            tenant=session.tenant,
            session_id=session.id,
            # What the engine does not serve is a client's own text, as long as it likes.
            model=ended.call.model if ended.fingerprint or reply.message else "",
            outcome="engine_error" if reply.error else "completed" if reply.message else ended.result.outcome,
            status=ended.result.status,
            started_at=ended.started_at,
            duration_ms=ended.duration_ms,
            usage=reply.usage,
            detail=(ended.result.detail or reply.error)[:_MAX_DETAIL],
            source=_recognised(ended),
            engine=ended.engine,
            estimated_tokens=review.estimated,
            expected_tokens=review.expected,
            miss=review.miss,
        ),
        session=session,
        fingerprint=ended.fingerprint,
        salt=ended.salt,
        messages=turn.messages,
        frame=ended.call.whole_frame,
        trace=_trace(turn),
        normalised=" ".join(ended.normalised),
        response=response,
        request_input=ended.call.storage.items if ended.call.storage and response else (),
    )


def _recognised(ended: TurnContext) -> str:
    """How the session was found, and what of it was put in front of the request."""
    front, source = ended.call.front, ended.match.source
    if front is None or not front.origin:
        return source
    doubt = ", the client may have meant otherwise" if front.unsure else ""
    return f"{source}; follows what the {front.origin} holds{doubt}"


def _response(turn: ParsedTurn) -> StoredResponse | None:
    """The answer to keep, where its API keeps answers and the client did not say otherwise."""
    storage, answer, session = turn.turn.call.storage, turn.reply.answer, turn.turn.match.session
    if storage is None or not storage.keep or answer is None or not isinstance(answer.get("id"), str):
        return None
    return StoredResponse(
        tenant=session.tenant,
        id=answer["id"],
        session_id=session.id,
        lineage=session.lineage,
        created_at=turn.turn.started_at,
        answer={**answer, "previous_response_id": storage.previous, "store": True},
        instructed=turn.whole[:1] == [{"role": "system", "content": storage.instructions}],
    )


def _trace(turn: ParsedTurn) -> Trace:
    match = turn.turn.match
    try:
        return prefix_chain.trace(
            match.seed, turn.whole, turn.reply.message, _beginning(turn), match.session.first_message_hash
        )
    except GatewayError:
        # Who names the session need not send messages that can be told apart.
        return Trace(b"", b"", None)


def _beginning(turn: ParsedTurn) -> ConversationPrefix | None:
    """The beginning that the turn is: made anew where more was put in front than was known when its session was."""
    request = turn.turn.match.request
    if request is None or request.messages == turn.whole:
        return request
    return ConversationPrefix.of(Prompt(turn.whole, request.seed, request.frame))


def _reply(ended: TurnContext) -> Reply:
    if ended.result.chunks is None or ended.result.outcome not in ("completed", "client_gone"):
        return Reply(None, None)
    if ended.result.outcome == "completed":
        return ended.dialect.reply(ended.result.chunks, streamed=ended.result.streamed)
    # Codex closes the connection at the last event, before the stream has ended: it has had its answer.
    reply = ended.dialect.reply(ended.result.chunks, streamed=True) if ended.result.streamed else Reply(None, None)
    return reply if reply.message and not reply.error else Reply(None, None)

"""A completed turn: its parsed reply, and the record that the store keeps of it."""

import logging
from collections.abc import Sequence

from msgspec import Struct

from gateway.dialects import transcripts
from gateway.dialects.base import Reply
from gateway.dialects.responses import instructions_message
from gateway.errors import GatewayError
from gateway.records import Message, StoredResponse, Trace, Turn
from gateway.sessions import prefix_chain
from gateway.sessions.prefix_chain import ConversationPrefix, Prompt
from gateway.sessions.turn_context import TurnContext
from gateway.store.types import TurnRecord

log = logging.getLogger(__name__)

_MAX_DETAIL = 1000  # an engine repeats what it refuses


class ParsedTurn(Struct, frozen=True):
    """A turn with its reply. `whole` is the request's conversation, `messages` the same with the reply.

    Without a reply `messages` is None: the next turn's prompt is not known, so the transcript stays as it was.
    """

    turn: TurnContext
    reply: Reply
    whole: Sequence[Message]
    messages: Sequence[Message] | None


class Review(Struct, frozen=True):
    """How a turn's prompt compares with what was expected, see `gateway.sessions.cache_review`."""

    estimated: int | None = None
    expected: int | None = None
    miss: str = ""


def parse(turn: TurnContext) -> ParsedTurn:
    """Parse the recorded reply."""
    is_turn = bool(turn.call.messages or turn.call.front)
    whole = turn.call.whole if is_turn else []
    try:
        reply = _reply(turn)
        messages = None
        if reply.message and is_turn:
            messages = transcripts.followed(whole, reply.message, echoes=turn.call.echoes)
    except Exception:
        # An engine may send anything; one odd reply must not cost the other turns of the batch.
        log.exception("could not read a reply of session %s", turn.match.session.id)
        return ParsedTurn(turn, Reply(None, None, "the reply could not be read"), whole, None)
    return ParsedTurn(turn, reply, whole, messages)


def _reply(turn: TurnContext) -> Reply:
    result = turn.result
    if result.chunks is not None and result.outcome == "completed":
        return turn.dialect.reply(result.chunks, streamed=result.streamed)
    if result.chunks is not None and result.outcome == "client_gone" and result.streamed:
        # Codex closes the connection at the last event, before the stream has ended: it has its whole reply.
        reply = turn.dialect.reply(result.chunks, streamed=True)
        if reply.message and not reply.error:
            return reply
    return Reply(None, None)


def to_record(parsed: ParsedTurn, review: Review) -> TurnRecord:
    """The record that the store keeps of a turn."""
    turn, reply, session = parsed.turn, parsed.reply, parsed.turn.match.session
    response = _stored_response(parsed)
    return TurnRecord(
        turn=Turn(
            tenant=session.tenant,
            session_id=session.id,
            # A name that the engine does not serve is a client's own text, however long.
            model=turn.call.model if turn.fingerprint or reply.message else "",
            outcome="engine_error" if reply.error else "completed" if reply.message else turn.result.outcome,
            status=turn.result.status,
            started_at=turn.started_at,
            duration_ms=turn.duration_ms,
            usage=reply.usage,
            detail=(turn.result.detail or reply.error)[:_MAX_DETAIL],
            source=_source(turn),
            engine=turn.engine,
            estimated_tokens=review.estimated,
            expected_tokens=review.expected,
            miss=review.miss,
            first_token_ms=turn.first_token_ms(reply.usage.completion) if reply.usage else None,
        ),
        session=session,
        fingerprint=turn.fingerprint,
        salt=turn.salt,
        messages=parsed.messages,
        frame=turn.call.whole_frame,
        trace=_trace(parsed),
        normalised=" ".join(turn.normalised),
        displaces=turn.match.displaces,
        response=response,
        request_input=turn.call.storage.items if turn.call.storage and response else (),
    )


def _source(turn: TurnContext) -> str:
    """How the session was found, and which history was put in front of the request."""
    front, source = turn.call.front, turn.match.source
    if front is None or not front.origin:
        return source
    doubt = ", the client may have meant otherwise" if front.unsure else ""
    return f"{source}; follows what the {front.origin} holds{doubt}"


def _stored_response(parsed: ParsedTurn) -> StoredResponse | None:
    """The response to store, if its API stores responses and the client did not opt out."""
    turn, answer, session = parsed.turn, parsed.reply.answer, parsed.turn.match.session
    storage = turn.call.storage
    if storage is None or not storage.keep or answer is None or not isinstance(answer.get("id"), str):
        return None
    return StoredResponse(
        tenant=session.tenant,
        id=answer["id"],
        session_id=session.id,
        lineage=session.lineage,
        created_at=turn.started_at,
        answer={**answer, "previous_response_id": storage.previous, "store": True},
        instructed=parsed.whole[:1] == [instructions_message(storage.instructions)],
    )


def _trace(parsed: ParsedTurn) -> Trace:
    match, whole = parsed.turn.match, parsed.whole
    request = match.request
    try:
        if request is not None and request.messages != whole:  # history was put in front since
            request = ConversationPrefix.of(Prompt(whole, request.seed, request.frame))
        return prefix_chain.trace(match.seed, whole, parsed.reply.message, request, match.session.first_message_hash)
    except GatewayError:
        # With a session id from the client, messages may be such as cannot be hashed.
        return Trace(b"", b"", None)

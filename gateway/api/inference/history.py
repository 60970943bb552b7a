"""Prepend the history that a client need not send: that of a window or of a session."""

from collections.abc import Sequence
from dataclasses import replace

from msgspec import structs

from gateway.api.inference.request import InferenceRequest
from gateway.dialects import transcripts
from gateway.dialects.base import INHERITED_FIELDS, Call
from gateway.dialects.transcripts import SystemRule
from gateway.records import Front, Message, Session
from gateway.runtime.offload import is_heavy
from gateway.sessions.resolver import session_not_found
from gateway.windows.at_turn import text_at
from gateway.windows.catalog import get_usable_window
from gateway.windows.context import Services


async def prepend_session_history(services: Services, call: Call, session: Session, incoming: InferenceRequest) -> Call:
    """The call with its session's history in front of the new messages: that of a window, or of a conversation."""
    front = call.front
    if front is None and call.messages:
        front = await _missing(services, call, session, incoming)
    if front is None:
        return call
    return await _with_front(services, call, front, None if session.window_transcript is None else session.frame)


def leaves_history(call: Call) -> bool:
    """Whether the client leaves its history to the gateway: then a session continues in its successor, if any."""
    conversed = call.storage is not None and call.storage.conversation
    return conversed or (call.front is not None and call.front.origin == "session")


async def prepend_window_history(services: Services, call: Call, name: str, incoming: InferenceRequest) -> Call:
    """The call as the first of a new branch of a window. Raises `window_not_found`, and what `text_at` raises."""
    window = await get_usable_window(services, incoming.tenant, name)
    window = await text_at(services, window, incoming.base.at_turn)
    history = (await services.store.text(window)).messages
    front = await _lacking(services, call, history, incoming.system_rule)
    return call if front is None else await _with_front(services, call, front, window.frame)


async def _missing(services: Services, call: Call, session: Session, incoming: InferenceRequest) -> Front | None:
    if call.storage is not None and call.storage.conversation:
        if session.transcript is None:
            return None
        history = await _messages(services, session, session.transcript)
        return await _lacking(services, call, history, incoming.system_rule or "replace")
    if session.window_transcript is None:
        return None
    window = await _messages(services, session, session.window_transcript)
    heavy = is_heavy(window) or is_heavy(call.messages)
    whole = await services.offload.run(heavy, transcripts.is_whole, window, call.messages)
    return await _lacking(
        services, call, window, incoming.system_rule, None if whole else await _current(services, session)
    )


async def _lacking(
    services: Services,
    call: Call,
    history: Sequence[Message],
    rule: SystemRule,
    current: Sequence[Message] | None = None,
) -> Front | None:
    heavy = is_heavy(history) or is_heavy(call.messages)
    return await services.offload.run(heavy, transcripts.missing, history, call.messages, rule, current)


async def _messages(services: Services, session: Session, transcript: bytes) -> list[Message]:
    """The messages of a session's transcript. Raises `session_not_found` if it was deleted just now, rather than send
    the new messages without their history."""
    messages = await services.store.messages(transcript)
    if not messages:
        raise session_not_found(session.id)
    return messages


async def _current(services: Services, session: Session) -> list[Message] | None:
    """A thawed session's transcript, with the turn that has just ended; None if it is still the window's."""
    if await services.turns.has_turn_in_flight(session.tenant, session.id):
        await services.turns.settle(session.tenant, session.id)
        await services.recorder.flush()
    # A turn may have been recorded between the first read of the session and this.
    session = await services.sessions.open(session.tenant, session.id)
    if session.transcript is None or session.transcript == session.window_transcript:
        return None
    return await _messages(services, session, session.transcript)


async def _with_front(services: Services, call: Call, front: Front, frame_id: bytes | None) -> Call:
    """The call with `front`, and with the fields of a window's frame that the client left out."""
    if frame_id is None:
        return structs.replace(call, front=front)
    frame = await services.store.frame(frame_id)
    inherited = {name: frame[name] for name in INHERITED_FIELDS if name in frame and name not in call.frame}
    return structs.replace(call, front=replace(front, frame=inherited))

"""What a client need not send: the beginning of its conversation that a window or the store has, put in front."""

from dataclasses import replace

from gateway import transcripts
from gateway.dialects.contract import INHERITED_FIELDS, Call
from gateway.edge.incoming import Incoming
from gateway.parts import Parts
from gateway.records import Front, Session
from gateway.sessions import no_session
from gateway.windows.thaw import usable


async def continued(parts: Parts, call: Call, session: Session, incoming: Incoming) -> Call:
    """The call with what its session has in front of what is new: the window's transcript, or the conversation's."""
    if not call.messages:
        return call
    front = call.front or await _missing(parts, call, session, incoming)
    return await _inheriting(parts, call, front, None if session.window_transcript is None else session.frame)


async def begun(parts: Parts, call: Call, name: str, incoming: Incoming) -> Call:
    """The call as the first of a new branch of a window. Raises `window_not_found`."""
    window = await usable(parts, incoming.tenant, name)
    history = (await parts.store.text(window)).messages
    front = transcripts.missing(history, call.messages, incoming.system_rule)
    return await _inheriting(parts, call, front, window.frame)


async def _missing(parts: Parts, call: Call, session: Session, incoming: Incoming) -> Front | None:
    conversed = call.storage is not None and call.storage.conversation
    history = session.transcript if conversed else session.window_transcript
    if history is None:
        return None
    rule = incoming.system_rule or ("replace" if conversed else "")
    held = await parts.store.messages(history)
    if not held:  # it was deleted just now: what is new would go to the engine without what it goes on from
        raise no_session(session.id)
    return transcripts.missing(held, call.messages, rule)


async def _inheriting(parts: Parts, call: Call, front: Front | None, frame_id: bytes | None) -> Call:
    """The call with `front`, and with what of a window's frame the client left out."""
    if front is None:
        return call
    if frame_id is None:
        return replace(call, front=front)
    frame = await parts.store.frame(frame_id)
    inherited = {name: frame[name] for name in INHERITED_FIELDS if name in frame and name not in call.frame}
    return replace(call, front=replace(front, frame=inherited))

"""A conversation under a window's base URL (`/w/NAME/v1`, `X-Window`): each new one is a branch of its own.

It begins where the window ends, or under `/w/NAME@TURN/v1` at that turn.

The client need not know the window's transcript: it sends the whole conversation, or only what is new. Either way its
chain is that of the whole conversation, seeded with the window, so that the next turn finds its branch again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import structs

from gateway.dialects import transcripts
from gateway.dialects.transcripts import SystemRule
from gateway.errors import GatewayError
from gateway.records import Message, Session, Window, subconversation_id, subconversation_source
from gateway.runtime.offload import is_heavy
from gateway.sessions import prefix_chain
from gateway.sessions.client_ids import ClientSessionId
from gateway.sessions.prefix_chain import ConversationPrefix, Prompt
from gateway.sessions.session_match import PrefixMatch, SessionMatch, was_answered
from gateway.sessions.turn_context import TurnContext
from gateway.windows.at_turn import text_at
from gateway.windows.catalog import get_usable_window
from gateway.windows.context import OperationContext, Services
from gateway.windows.thaw import thaw

_AT_ONCE = 2  # times that a branch is begun meanwhile: that of the agent, and that of its side conversation


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where branches begin: a window, what it holds up to the turn, and that turn; None is its end."""

    window: Window
    early: Window
    at_turn: int | None

    def has(self, session: Session) -> bool:
        """Whether a session is a branch of it."""
        if session.window != self.window.name:
            return False
        return self.at_turn is None or session.window_transcript == self.early.transcript

    def seed(self, *before: str) -> bytes:
        """The seed of its branches' prefix chains."""
        turn = () if self.at_turn is None else (str(self.at_turn),)
        return prefix_chain.seed({}, " ".join((*before, self.window.name, str(self.window.created_at), *turn)), "")

    def __str__(self) -> str:
        name = f"window {self.window.name!r}"
        return name if self.at_turn is None else f"turn {self.at_turn} of {name}"


async def resolve_in_window(
    services: Services, turn: TurnContext, name: str, rule: SystemRule, at_turn: int | None = None
) -> SessionMatch:
    """Return the branch of window `name` that a turn belongs to, thawed now if it is new.

    Raises `window_not_found`, `window_system_conflict`, `model_mismatch`, and `invalid_request` for the id of a session
    that does not come from this window, and for a turn that the window has not.
    """
    window = await get_usable_window(services, turn.tenant, name)
    origin = _Origin(window, await text_at(services, window, at_turn), at_turn)
    client_id, prompt = turn.client_id, turn.prompt
    if client_id and client_id.kind != "key":
        return await _resolve_id(services, turn, client_id, origin)
    history = (await services.store.text(origin.early)).messages
    seed = origin.seed(prompt.seed.hex())
    heavy = is_heavy(history) or is_heavy(prompt.messages)
    request = await services.offload.run(heavy, _whole_conversation, history, prompt, seed, rule)
    found = await services.sessions.look_up(turn.tenant, request)
    if found.session and not found.forks and not _is_first_again(history, request, found):
        return SessionMatch(found.session, found.how, seed, request)
    ctx = OperationContext(services, turn.tenant)
    branch = await thaw(
        ctx, window.name, new_session_id=None, warm="none", source="window", window=window, at_turn=at_turn
    )
    return SessionMatch(branch.session, "window", seed, request, is_new=True)


def _is_first_again(history: Sequence[Message], request: ConversationPrefix, found: PrefixMatch) -> bool:
    """Whether a request is the first of a branch, word for word, and that was answered.

    Then it may be of another client, and only a reply since the window would show that it is of the same.
    """
    replies = sum(message.get("role") == "assistant" for message in history)
    return len(request.replies) <= replies and was_answered(request, found)


def _whole_conversation(
    history: Sequence[Message], prompt: Prompt, seed: bytes, rule: SystemRule
) -> ConversationPrefix:
    """The prefix of the whole conversation, whether or not the client sent the window's part of it."""
    sent = prompt.messages
    front = transcripts.missing(history, sent, rule)
    return ConversationPrefix.of(Prompt(sent if front is None else transcripts.merged(front, sent), seed, prompt.frame))


async def _resolve_id(
    services: Services, turn: TurnContext, client_id: ClientSessionId, origin: _Origin
) -> SessionMatch:
    """The branch of a client's id, which another request under that id may begin at the same time."""
    for _ in range(_AT_ONCE):
        try:
            return await _find_or_begin(services, turn, client_id, origin)
        except GatewayError as error:
            if error.code != "session_already_exists":
                raise
    return await _find_or_begin(services, turn, client_id, origin)


async def _find_or_begin(
    services: Services, turn: TurnContext, client_id: ClientSessionId, origin: _Origin
) -> SessionMatch:
    """The branch of a client's id, thawed now if it is new. Raises `session_already_exists`: it is not any more."""
    # The session that has the id already may be of the same client's conversation without the window.
    match = await services.sessions.resolve(turn, may_displace=False)
    if client_id.kind == "agent" and not match.is_new and not origin.has(match.session):
        match = await _agent_branch(services, turn, match, origin)
    session = match.session
    if match.is_new:
        ctx = OperationContext(services, turn.tenant)
        branch = await thaw(
            ctx,
            origin.window.name,
            new_session_id=session.id,
            warm="none",
            source=session.source,
            first_message_hash=session.first_message_hash,
            at_turn=origin.at_turn,
        )
        return SessionMatch(branch.session, match.source, turn.prompt.seed, is_new=True)
    if not origin.has(session):
        raise GatewayError(
            "invalid_request",
            f"session {session.id!r} does not come from {origin}",
            hint="send it to /v1, or omit its id to begin a branch of the window",
            details={"session_id": session.id, "window_name": session.window},
        )
    return match


async def _agent_branch(services: Services, turn: TurnContext, match: SessionMatch, origin: _Origin) -> SessionMatch:
    """The branch of an agent that had a session before it was sent to the window, and cannot omit that session's id."""
    branch_id = subconversation_id(match.session.id, origin.seed())
    source = subconversation_source(match.source, match.session.id)
    session = await services.sessions.open(turn.tenant, branch_id, source)
    is_new = not session.created_at
    return SessionMatch(
        structs.replace(session, first_message_hash=turn.prompt.head) if is_new else session,
        match.source,
        match.seed,
        is_new=is_new,
    )

"""A conversation under a window's base URL (`/w/NAME/v1`, `X-Window`): every new one is a branch of its own.

The client need not know the window's transcript: it sends what is new, or all of it. Either way the chain is that of
the whole conversation, begun with the window itself, so that the next turn finds its branch again.
"""

from collections.abc import Sequence
from dataclasses import replace

from gateway.dialects import transcripts
from gateway.dialects.transcripts import SystemRule
from gateway.errors import GatewayError
from gateway.records import Message, Window
from gateway.runtime.offload import is_heavy
from gateway.sessions import prefix_chain
from gateway.sessions.prefix_chain import ClientSessionId, ConversationPrefix, Prompt
from gateway.sessions.session_match import SessionMatch
from gateway.sessions.turn_context import TurnContext
from gateway.windows.catalog import get_usable_window
from gateway.windows.context import Services
from gateway.windows.thaw import thaw


async def resolve(services: Services, turn: TurnContext, name: str, rule: SystemRule) -> SessionMatch:
    """Return the branch of window `name` that a turn belongs to, thawed just now if it is new.

    Raises `window_not_found`, `window_system_conflict`, `model_mismatch`, and `invalid_request` for the id of a session
    that does not come from this window.
    """
    window = await get_usable_window(services, turn.tenant, name)
    client_id, prompt = turn.client_id, turn.prompt
    if client_id and client_id.kind != "key":
        return await _by_id(services, turn, client_id, window)
    history = (await services.store.text(window)).messages
    seed = prefix_chain.seed({}, f"{prompt.seed.hex()} {window.name} {window.created_at}", "")
    heavy = is_heavy(history) or is_heavy(prompt.messages)
    request = await services.offload.run(heavy, _beginning, history, prompt, seed, rule)
    verdict = await services.sessions.look_up(turn.tenant, request)
    if verdict.session and not verdict.forks:
        return SessionMatch(verdict.session, verdict.how, seed, request)
    session, _, _ = await thaw(
        services, window.tenant, window.name, new_session_id=None, warm="none", source="window", seen=window
    )
    return SessionMatch(session, "window", seed, request, is_new=True)


def _beginning(history: Sequence[Message], prompt: Prompt, seed: bytes, rule: SystemRule) -> ConversationPrefix:
    """The beginning of the whole conversation, whether or not the client sent the window's part of it."""
    sent = prompt.messages
    front = transcripts.missing(history, sent, rule)
    return ConversationPrefix.of(Prompt(sent if front is None else transcripts.merged(front, sent), seed, prompt.frame))


async def _by_id(services: Services, turn: TurnContext, client_id: ClientSessionId, window: Window) -> SessionMatch:
    match = await services.sessions.resolve(turn)
    if client_id.kind == "agent" and not match.is_new and match.session.window != window.name:
        match = await _of_agent(services, turn, match, window)
    if match.is_new:
        session, _, _ = await thaw(
            services, turn.tenant, window.name, new_session_id=match.session.id, warm="none", source=match.source,
            first_message_hash=match.session.first_message_hash,
        )  # fmt: skip
        return SessionMatch(session, match.source, turn.prompt.seed, is_new=True)
    if match.session.window != window.name:
        raise GatewayError(
            "invalid_request",
            f"session {match.session.id!r} does not come from window {window.name!r}",
            hint="send it to /v1, or omit its id to begin a branch of the window",
            details={"session_id": match.session.id, "window_name": match.session.window},
        )
    return match


async def _of_agent(services: Services, turn: TurnContext, match: SessionMatch, window: Window) -> SessionMatch:
    """The branch of an agent that had its session before it was sent to the window: it cannot leave its id away, as a
    person can."""
    branch_id = prefix_chain.subconversation_id(
        match.session.id, prefix_chain.seed({}, f"{window.name} {window.created_at}", "")
    )
    session = await services.sessions.open(turn.tenant, branch_id)
    is_new = not session.created_at
    return SessionMatch(
        replace(session, first_message_hash=turn.prompt.head) if is_new else session,
        match.source,
        match.seed,
        is_new=is_new,
    )

"""A conversation under a window's base URL (`/w/NAME/v1`, `X-Window`): every new one is a branch of its own.

The client need not know the window's transcript: it sends what is new, or all of it. Either way the chain is that of
the whole conversation, begun with the window itself, so that the next turn finds its branch again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.dialects import transcripts
from gateway.dialects.transcripts import SystemRule
from gateway.errors import GatewayError
from gateway.records import Message, Session, Window
from gateway.runtime.offload import is_heavy
from gateway.sessions import prefix_chain
from gateway.sessions.prefix_chain import ClientSessionId, ConversationPrefix, Prompt
from gateway.sessions.resolver import SessionMatch
from gateway.windows.catalog import get_usable_window
from gateway.windows.context import Services
from gateway.windows.thaw import thaw


@dataclass(frozen=True, slots=True)
class Asked:
    """A request under a window: `prompt` has the messages as the client sent them, never none."""

    tenant: str
    window: str
    named: ClientSessionId | None
    prompt: Prompt
    rule: SystemRule


async def place(services: Services, asked: Asked) -> SessionMatch:
    """Return the branch that the request belongs to, thawed just now if it is new.

    Raises `window_not_found`, `window_system_conflict`, `model_mismatch`, and `invalid_request` for the id of a session
    that does not come from this window.
    """
    window = await get_usable_window(services, asked.tenant, asked.window)
    named = asked.named
    if named and named.kind != "key":
        return await _named(services, asked, named, window)
    history = (await services.store.text(window)).messages
    seed = prefix_chain.seed({}, f"{asked.prompt.seed.hex()} {window.name} {window.created_at}", "")
    heavy = is_heavy(history) or is_heavy(asked.prompt.messages)
    request = await services.offload.run(heavy, _beginning, history, asked, seed)
    verdict = await services.sessions.look_up(asked.tenant, request, services.recorder.flush)
    if verdict.session and not verdict.forks:
        return SessionMatch(verdict.session, verdict.how, seed, request)
    return SessionMatch(await _new(services, window), "window", seed, request, is_new=True)


def _beginning(history: Sequence[Message], asked: Asked, seed: bytes) -> ConversationPrefix:
    """The beginning of the whole conversation, whether or not the client sent the window's part of it."""
    sent = asked.prompt.messages
    front = transcripts.missing(history, sent, asked.rule)
    return ConversationPrefix.of(
        Prompt(sent if front is None else transcripts.merged(front, sent), seed, asked.prompt.frame)
    )


async def _named(services: Services, asked: Asked, named: ClientSessionId, window: Window) -> SessionMatch:
    known = await services.sessions.resolve(asked.tenant, named, asked.prompt, services.recorder.flush)
    if named.kind == "agent" and not known.is_new and known.session.window != asked.window:
        known = await _beside(services, asked, known, window)
    if known.is_new:
        head = known.session.head
        session, _, _ = await thaw(
            services, asked.tenant, asked.window, new_session_id=known.session.id, warm="none", source=known.source,
            head=head,
        )  # fmt: skip
        return SessionMatch(session, known.source, asked.prompt.seed, is_new=True)
    if known.session.window != asked.window:
        raise GatewayError(
            "invalid_request",
            f"session {known.session.id!r} does not come from window {asked.window!r}",
            hint="send it to /v1, or leave its id away to begin a branch of the window",
            details={"session_id": known.session.id, "window_name": known.session.window},
        )
    return known


async def _beside(services: Services, asked: Asked, known: SessionMatch, window: Window) -> SessionMatch:
    """The branch of an agent that had its session before it was sent to the window: it cannot leave its id away, as a
    person can."""
    branch_id = prefix_chain.subconversation_id(
        known.session.id, prefix_chain.seed({}, f"{window.name} {window.created_at}", "")
    )
    session = await services.sessions.open(asked.tenant, branch_id)
    is_new = not session.created_at
    return SessionMatch(
        replace(session, head=asked.prompt.head) if is_new else session, known.source, known.seed, is_new=is_new
    )


async def _new(services: Services, window: Window) -> Session:
    session, _, _ = await thaw(
        services, window.tenant, window.name, new_session_id=None, warm="none", source="window", seen=window
    )
    return session

"""Where a thaw goes: into a new session, or into an existing one, which is taken back to the window.

A session that is taken back keeps its id, so a client that knows nothing of it goes on with the window's history. It
has to be of the window's lineage: a session's salt is made of its lineage, so under another one it would not find the
KV.

1. Wait until the session is in no turn, and read it.
2. When everything else is done, freeze what it has, if asked to (`keep_as`).
3. Replace its text by the window's, in one transaction that checks whether it is still as it was read.

A turn that was begun before 3 and ends after it is recorded, but leaves the session where it is
(`gateway.store.record_rows.record`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.dialects import text_transcripts, transcripts
from gateway.dialects.turns import Turns
from gateway.errors import GatewayError
from gateway.records import Message, Session, Window
from gateway.sessions.resolver import session_not_found
from gateway.windows.catalog import session_exists, session_id_for
from gateway.windows.context import OperationContext
from gateway.windows.freeze import Naming, freeze, window_name_taken


@dataclass(frozen=True, slots=True)
class Rewound:
    """An existing session to be taken back, and the window that keeps what it has."""

    session_id: str
    keep_as: str | None = None


@dataclass(frozen=True, slots=True)
class Replaced:
    """What a session had before it was taken back: `turns_dropped` are not in what it has now.

    `kept_in` is a window that has all of it; None if there is none.
    """

    turns_dropped: int
    token_count: int
    kept_in: str | None


@dataclass(frozen=True, slots=True)
class Target:
    """The session that a thaw goes into; `before` is an existing one as it was read, `keep_as` as in `Rewound`."""

    session_id: str
    before: Session | None = None
    keep_as: str | None = None


class Placed(NamedTuple):
    """The session as it is in the store, what it had before, and warnings about that."""

    session: Session
    replaced: Replaced | None = None
    warnings: tuple[str, ...] = ()


async def target(ctx: OperationContext, window: Window, new_session_id: str | None, rewound: Rewound | None) -> Target:
    """Check that a window can go into a session. Raises `session_already_exists` for a new one, and for an existing one
    `session_not_found`, `session_busy`, `window_already_exists`, `invalid_request` if it is of another lineage."""
    store = ctx.services.store
    if rewound is None:
        session_id = new_session_id or session_id_for(window.name)
        if await store.session(ctx.tenant, session_id):
            raise session_exists(session_id)
        return Target(session_id)
    await _wait_until_idle(ctx, rewound.session_id)
    session = await store.session(ctx.tenant, rewound.session_id)
    if session is None:
        raise _no_session(rewound.session_id)
    if session.lineage != window.lineage:
        raise _other_lineage(session, window)
    if rewound.keep_as and await store.window(ctx.tenant, rewound.keep_as):
        raise window_name_taken(rewound.keep_as)
    return Target(session.id, session, rewound.keep_as)


async def place(ctx: OperationContext, into: Target, session: Session, source: Window) -> Placed:
    """Add `session`, or take an existing one back to what `session` has of the window `source`.

    Raises `window_not_found` if the window has been deleted since it was read, `window_corrupted`; for a new session
    `session_already_exists`; for an existing one `session_not_found`, `session_busy` if it has continued, and with
    `keep_as` what a freeze raises. If that window was made, the error says so.
    """
    if into.before is None:
        if await ctx.services.store.add_sessions([session], source=source):
            raise session_exists(session.id)
        return Placed(session)
    kept: Window | None = None
    warnings: tuple[str, ...] = ()
    await _wait_until_idle(ctx, session.id)
    if into.keep_as:
        kept, warnings = await freeze(ctx, session.id, Naming(into.keep_as))
    try:
        placed = await _take_back(ctx, session, into.before, source)
    except GatewayError as error:
        raise _with_kept(error, kept) from error
    return placed._replace(warnings=(*warnings, *placed.warnings))


async def _take_back(ctx: OperationContext, session: Session, before: Session, source: Window) -> Placed:
    services, store = ctx.services, ctx.services.store
    had = await store.messages(before.transcript) if before.transcript else []
    has = await store.messages(session.transcript) if session.transcript else []
    dropped = await asyncio.to_thread(_turns_dropped, had, has)
    if await services.turns.has_turn_in_flight(session.tenant, session.id):
        raise _continued(session.id)
    rewound = await store.rewind_session(session, before=before, source=source)
    if rewound is None:
        now = await store.session(session.tenant, session.id)
        raise _no_session(session.id) if now is None else _continued(session.id)
    replaced = Replaced(dropped, before.token_count, rewound.kept_in)
    return Placed(rewound.session, replaced, _lost(before, replaced))


async def _wait_until_idle(ctx: OperationContext, session_id: str) -> None:
    services = ctx.services
    await services.recorder.flush()
    await services.turns.wait_until_idle(ctx.tenant, session_id, services.settings.busy_wait_s)


def _turns_dropped(before: Sequence[Message], now: Sequence[Message]) -> int:
    """How many turns, an open one included, a conversation has that are not in another one."""
    if text_transcripts.kind(before) or text_transcripts.kind(now):
        return 0
    turns, shared = Turns.of(before), transcripts.common(before, now)
    return sum(end > shared for end in turns.ends) + (turns.open and len(before) > shared)


def _lost(before: Session, replaced: Replaced) -> tuple[str, ...]:
    """A warning if the session had something that nothing holds any more."""
    if replaced.kept_in is not None or before.transcript is None:
        return ()
    count = replaced.turns_dropped
    what = f"{count} turns" if count > 1 else "1 turn" if count else "the text"
    return (f"dropped from session {before.id!r}, and in no window: {what}",)


def _no_session(session_id: str) -> GatewayError:
    error = session_not_found(session_id)
    hint = f"{error.hint}; `new_session_id` thaws into a new one"
    return GatewayError(error.code, error.message, hint=hint, details=error.details)


def _other_lineage(session: Session, window: Window) -> GatewayError:
    return GatewayError(
        "invalid_request",
        f"session {session.id!r} is not of the lineage of window {window.name!r}: it could not find the window's KV",
        hint="thaw the window into a new session (`new_session_id`); or take back a session that the window was frozen "
        "from, was thawed into, or that was forked from such a one",
        details={"field": "into_session", "session_id": session.id, "window_name": window.name},
    )


def _continued(session_id: str) -> GatewayError:
    return GatewayError(
        "session_busy",
        f"session {session_id!r} continued while the window was thawed: it was left as it is",
        hint="try again when its reply is complete",
    )


def _with_kept(error: GatewayError, kept: Window | None) -> GatewayError:
    """The error, which says that the window of `keep_as` was made before it."""
    if kept is None:
        return error
    message = f"{error.message}; what it had before is frozen in window {kept.name!r}"
    return GatewayError(error.code, message, hint=error.hint, details={**error.details, "kept_as": kept.name})

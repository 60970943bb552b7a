"""The SQL of taking a session back to a window. The caller owns the transaction."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import structs

from gateway.records import Session, Window
from gateway.store import autofreeze_rows, session_rows, successor_rows, text_rows, transcript_rows
from gateway.store.database import Db


@dataclass(frozen=True, slots=True)
class RewoundSession:
    """The session as it is now, and a window that has all that it had before, None if there is none."""

    session: Session
    kept_in: str | None


async def rewind_session(db: Db, new: Session, *, before: Session, source: Window) -> RewoundSession | None:
    """Give a session the text and the salt of `new`, which begins with the text of the window `source`.

    None if the session is not as it was read (`before`), or was deleted. Raises `window_not_found` unless the window is
    still there, the same one and not another of its name, and `window_corrupted` if its text is gone.
    """
    await text_rows.check_text(db, source)
    now = await session_rows.session(db, before.tenant, before.id)
    if now is None or _history(now) != _history(before):
        return None
    rewound = structs.replace(
        new,
        turn_count=now.turn_count,
        created_at=now.created_at,
        frozen_at=now.frozen_at,
        source=now.source,
        parent=now.parent,
        engine=now.engine,
        first_message_hash=now.first_message_hash,
        rewinds=now.rewinds + 1,
    )
    kept_in = await _kept_in(db, now, source)
    await successor_rows.forget(db, now.tenant, now.id)
    await session_rows.replace_session(db, rewound)
    await _release(db, now)
    await autofreeze_rows.lower_covered_tokens(db, rewound)
    await autofreeze_rows.keep_auto_windows(db, now)
    return RewoundSession(rewound, kept_in)


def _history(session: Session) -> Sequence[object]:
    return session.created_at, session.transcript, session.turn_count, session.rewinds


async def _kept_in(db: Db, session: Session, source: Window) -> str | None:
    if session.transcript is None:
        return None
    query = "SELECT name FROM windows WHERE transcript = ? AND tenant = ? ORDER BY created_at DESC LIMIT 1"
    row = await db.one(query, session.transcript, session.tenant)
    if row:
        return str(row[0])
    return source.name if await text_rows.begins_with(db, source, session.transcript) else None


async def _release(db: Db, before: Session) -> None:
    """Delete what only the session needed of its text."""
    await transcript_rows.release(db, before.transcript)
    await transcript_rows.release(db, before.window_transcript)
    await transcript_rows.release_content(db, before.frame)

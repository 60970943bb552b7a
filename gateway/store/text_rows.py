"""The SQL of what has a transcript: sessions and windows, added only with it. The caller owns the transaction.

What an operation has read may have changed when it writes. So each of these functions is told what was read, and looks
whether it still holds, in the transaction that writes.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from gateway.errors import GatewayError
from gateway.records import Manifest, Session, Succession, Window
from gateway.store import salt_rows, session_rows, successor_rows, transcript_rows, window_rows
from gateway.store.types import Text


def snapshot(db: sqlite3.Connection, tenant: str, session_id: str) -> tuple[Session, Text] | None:
    """Return the session and its text, both from one moment; None if there is no such session."""
    found = session_rows.session(db, tenant, session_id)
    if found is None:
        return None
    messages = transcript_rows.messages(db, found.transcript) if found.transcript else []
    return found, Text(messages, transcript_rows.frame(db, found.frame) if found.frame else None)


def text(db: sqlite3.Connection, of: Window) -> Text:
    """Return a window's text.

    Raises `window_not_found` when the window has just been deleted, and `window_corrupted` where it is there
    without its text.
    """
    _check_text(db, of)
    frame = transcript_rows.frame(db, of.frame) if of.frame else None
    return Text(transcript_rows.messages(db, of.transcript), frame)


def check_there(db: sqlite3.Connection, seen: Window) -> None:
    """Raise `window_not_found` unless the window is still there, the same one and not another of its name."""
    now = window_rows.window(db, seen.tenant, seen.name)
    if now is None or (now.manifest, now.created_at) != (seen.manifest, seen.created_at):
        raise GatewayError(
            "window_not_found",
            f"window {seen.name!r} was just deleted",
            hint="`GET /admin/windows` lists them",
            details={"window_name": seen.name},
        )


def windows_without_text(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """Return tenant and name of windows whose text is gone: no window of today, but older versions left some."""
    return db.execute(
        """SELECT tenant, name FROM windows w WHERE NOT EXISTS (SELECT 1 FROM links WHERE links.id = w.transcript)
        OR (w.frame IS NOT NULL AND NOT EXISTS (SELECT 1 FROM contents WHERE contents.id = w.frame))
        ORDER BY tenant, name"""
    ).fetchall()


def add_session(db: sqlite3.Connection, session: Session, *, source: Window | None = None) -> bool:
    """Add a session; False if its id is taken. See `add_sessions`."""
    return add_sessions(db, [session], source=source) is None


def add_sessions(db: sqlite3.Connection, sessions: Sequence[Session], *, source: Window | None = None) -> str | None:
    """Add all of these sessions of one tenant, or none where an id is taken: then return that id.

    With `source` they begin with that window's text. Raises `window_not_found` unless the window is still there,
    the same one and not another of its name, and `window_corrupted` where its text is gone.
    """
    if source is not None:
        _check_text(db, source)
    return session_rows.add_sessions(db, sessions)


def add_window(
    db: sqlite3.Connection,
    new: Window,
    manifest: Manifest,
    text: Text,
    *,
    seen: Session | None = None,
    wanted: bool = True,
) -> Window | None:
    """Commit a window with its manifest and its text; return it as it was committed, None if its name is taken.

    The window's own `transcript` and `frame` do not count: they become those of `text`, which is added unless the
    store has it already. `seen` is the session that was frozen, as it was read. It becomes `frozen` unless it has
    gone on since. Where it was deleted meanwhile, the window is committed all the same if it is `wanted`; else
    `session_not_found` is raised.
    """
    if window_rows.window(db, new.tenant, new.name):
        return None
    frame = None if text.frame is None else transcript_rows.add_content(db, text.frame)
    new = replace(new, transcript=transcript_rows.add(db, text.messages) or b"", frame=frame)
    if seen is not None:
        new = replace(new, parent=_frozen(db, seen, new, wanted=wanted))
    window_rows.add_window(db, new, manifest)
    return new


def _frozen(db: sqlite3.Connection, seen: Session, new: Window, *, wanted: bool) -> str | None:
    """Mark the session that was frozen into `new`; return the window that it came from."""
    now = session_rows.session(db, seen.tenant, seen.id)
    if now is not None and now.created_at == seen.created_at:
        session_rows.set_frozen(db, seen, new.created_at)
        return now.window
    if not wanted:
        raise GatewayError("session_not_found", f"session {seen.id!r} was deleted while it was being frozen")
    # Nobody has let go of what the freeze had the engine compute since the session went.
    salt_rows.mark_orphaned(db, new.salt, new.tenant, new.lineage)
    parent = window_rows.window(db, seen.tenant, seen.window) if seen.window else None
    # Another window may have its name since.
    return parent.name if parent and parent.created_at <= seen.created_at else None


def copy_window(db: sqlite3.Connection, copy: Window, source: Window, manifest: Manifest | None) -> Window | None:
    """Commit a copy of `source`, with a manifest of its own or with that of its source; None if its name is taken.

    Raises `window_not_found` unless the source is still there, the same one and not another of its name, and
    `window_corrupted` where its text is gone.
    """
    _check_text(db, source)
    if window_rows.window(db, copy.tenant, copy.name):
        return None
    window_rows.add_window(db, copy, manifest)
    return copy


def succeed(db: sqlite3.Connection, step: Succession, new: Session, *, seen: Session) -> Succession:
    """Add a full session's successor, unless it has one already; return what is so then.

    Raises `session_busy` where the full session is not as it was `seen`, where its window has gone, or where the
    successor's id was taken meanwhile.
    """
    if there := successor_rows.successor(db, step):
        return there
    now = session_rows.session(db, seen.tenant, seen.id)
    if now is None or (now.created_at, now.transcript) != (seen.created_at, seen.transcript):
        raise _went_on(seen, "it continued, or was deleted, while its successor was created")
    window = window_rows.window(db, step.tenant, step.window)
    if window is None or window.transcript != seen.transcript:
        raise _went_on(seen, f"its window {step.window!r} was deleted while its successor was created")
    if not session_rows.add_session(db, new):
        raise _went_on(seen, f"another session took the id {new.id!r} of its successor")
    successor_rows.add(db, step)
    return step


def _went_on(session: Session, why: str) -> GatewayError:
    return GatewayError("session_busy", f"session {session.id!r} has no successor: {why}", hint="send the turn again")


def _check_text(db: sqlite3.Connection, of: Window) -> None:
    """Raise `window_not_found` unless the window is there as it was read, `window_corrupted` if its text is not."""
    check_there(db, of)
    if not transcript_rows.is_there(db, of.transcript, of.frame):
        raise GatewayError(
            "window_corrupted",
            f"the text of window {of.name!r} is gone: an older version lost it",
            hint="import an export of it, or freeze its session again, under another name; then delete this one",
            details={"window_name": of.name},
        )

"""The SQL of what has a transcript: sessions and windows, added only with it. The caller owns the transaction.

What an operation has read may have changed by the time it writes. So each of these functions takes the record that was
read, and checks in its own transaction that it is still current.
"""

from collections.abc import Sequence
from dataclasses import replace

from gateway.dialects.titles import title_of
from gateway.errors import GatewayError
from gateway.records import Manifest, Session, Succession, Window
from gateway.store import manifest_rows, salt_rows, session_rows, successor_rows, transcript_rows, window_rows
from gateway.store.database import Db
from gateway.store.types import Text


async def snapshot(db: Db, tenant: str, session_id: str) -> tuple[Session, Text] | None:
    """Return the session and its text, read together; None if there is no such session."""
    session = await session_rows.session(db, tenant, session_id)
    return None if session is None else (session, await _text(db, session.transcript, session.frame))


async def text(db: Db, window: Window) -> Text:
    """Return a window's text.

    Raises `window_not_found` if the window has just been deleted, and `window_corrupted` if its text is gone.
    """
    await check_text(db, window)
    return await _text(db, window.transcript, window.frame)


async def transcript_until(db: Db, window: Window, count: int) -> bytes:
    """Return the id of the first `count` messages of a window's text. Raises as `text` does."""
    await check_text(db, window)
    found = await transcript_rows.prefix(db, window.transcript, count)
    if found is None:
        raise _text_is_gone(window)
    return found


async def begins_with(db: Db, window: Window, transcript: bytes | None) -> bool:
    """Whether a window's text is this transcript, or continues it."""
    return transcript is not None and await transcript_rows.begins_with(db, window.transcript, transcript)


async def _text(db: Db, transcript: bytes | None, frame: bytes | None) -> Text:
    messages = await transcript_rows.messages(db, transcript) if transcript else []
    return Text(messages, await transcript_rows.frame(db, frame) if frame else None)


async def check_exists(db: Db, window: Window) -> None:
    """Raise `window_not_found` unless the window is still there, the same one and not another of its name."""
    now = await window_rows.window(db, window.tenant, window.name)
    if now is None or (now.manifest, now.created_at) != (window.manifest, window.created_at):
        raise GatewayError(
            "window_not_found",
            f"window {window.name!r} was just deleted",
            hint="`GET /admin/windows` lists them",
            details={"window_name": window.name},
        )


async def windows_without_text(db: Db) -> list[tuple[str, str]]:
    """Return tenant and name of windows whose text is gone: older versions left some, this one leaves none."""
    return await db.all(
        """SELECT tenant, name FROM windows w WHERE NOT EXISTS (SELECT 1 FROM links WHERE links.id = w.transcript)
        OR (w.frame IS NOT NULL AND NOT EXISTS (SELECT 1 FROM contents WHERE contents.id = w.frame))
        ORDER BY tenant, name"""
    )


async def add_sessions(db: Db, sessions: Sequence[Session], *, source: Window | None = None) -> str | None:
    """Add all of these sessions of one tenant, or none if an id is taken: then return that id.

    With `source` they begin with that window's text. Raises `window_not_found` unless the window is still there,
    the same one and not another of its name, and `window_corrupted` if its text is gone.
    """
    if source is not None:
        await check_text(db, source)
    for new in sessions:
        if await session_rows.session(db, new.tenant, new.id):
            return new.id
    for new in sessions:
        await session_rows.add_session(db, new)
    return None


async def add_window(
    db: Db, new: Window, manifest: Manifest, text: Text, *, session: Session | None = None, wanted: bool = True
) -> Window | None:
    """Commit a window with its manifest and its text; return it as it was committed, None if its name is taken.

    The window's `transcript` and `frame` are replaced by those of `text`, which is added unless the store has it, and
    its `title` by that of the session, or of the text.
    `session` is the session that was frozen, as it was read: it becomes `frozen` unless it has had a turn since. If it
    has been deleted, the window is committed all the same if it is `wanted`; else `session_not_found` is raised.
    """
    if await window_rows.window(db, new.tenant, new.name):
        return None
    frame = None if text.frame is None else await transcript_rows.add_content(db, text.frame)
    title = (session.title if session else None) or title_of(text.messages)
    new = replace(new, transcript=await transcript_rows.add(db, text.messages) or b"", frame=frame, title=title)
    if session is not None:
        new = replace(new, parent=await _freeze(db, session, new, wanted=wanted))
    await window_rows.add_window(db, new, manifest)
    return new


async def _freeze(db: Db, session: Session, new: Window, *, wanted: bool) -> str | None:
    """Mark the session that was frozen into `new`; return the window that it was thawed from."""
    now = await session_rows.session(db, session.tenant, session.id)
    if now is not None and now.created_at == session.created_at:
        await session_rows.set_frozen(db, session, new.created_at)
        return now.window if now.rewinds == session.rewinds else await _parent(db, session)
    if not wanted:
        raise GatewayError("session_not_found", f"session {session.id!r} was deleted while it was being frozen")
    # The session's salts were released before the engine computed more KV for this freeze.
    await salt_rows.mark_orphaned(db, new.salt, new.tenant, new.lineage)
    return await _parent(db, session)


async def _parent(db: Db, session: Session) -> str | None:
    """The window that a session was thawed from when it was read; None if it is gone."""
    parent = await window_rows.window(db, session.tenant, session.window) if session.window else None
    if parent is None:
        return None
    # Another window may have its name since; a session that was taken back may be older than its window.
    same = parent.created_at <= session.created_at or await begins_with(db, parent, session.window_transcript)
    return parent.name if same else None


async def copy_window(db: Db, copy: Window, source: Window, manifest: Manifest | None) -> Window | None:
    """Commit a copy of `source`, or of its beginning; None if its name is taken.

    `manifest` is None if the copy has its source's; one without objects gets those of the copy's chunks from there.
    Raises `window_not_found` unless the source is still there, the same one and not another of its name, and
    `window_corrupted` if its text is gone.
    """
    await check_text(db, source)
    if await window_rows.window(db, copy.tenant, copy.name):
        return None
    await window_rows.add_window(db, copy, manifest)
    if manifest is not None:
        await manifest_rows.share(db, manifest.id, source.manifest, copy.chunk_count * copy.world_size)
    return copy


async def succeed(db: Db, step: Succession, new: Session, *, full: Session) -> Succession:
    """Add a full session's successor; return the step to it, or the existing one if it has a successor.

    Raises `session_busy` if the full session is not as it was read, if its window is gone, or if the successor's id was
    taken meanwhile.
    """
    if existing := await successor_rows.successor(db, step):
        return existing
    now = await session_rows.session(db, full.tenant, full.id)
    if now is None or (now.created_at, now.transcript) != (full.created_at, full.transcript):
        raise _no_successor(full, "it continued, or was deleted, while its successor was created")
    window = await window_rows.window(db, step.tenant, step.window)
    if window is None or window.transcript != full.transcript:
        raise _no_successor(full, f"its window {step.window!r} was deleted while its successor was created")
    if not await session_rows.add_session(db, new):
        raise _no_successor(full, f"another session took the id {new.id!r} of its successor")
    await successor_rows.add(db, step)
    return step


def _no_successor(session: Session, why: str) -> GatewayError:
    return GatewayError("session_busy", f"session {session.id!r} has no successor: {why}", hint="send the turn again")


async def check_text(db: Db, window: Window) -> None:
    """Raise `window_not_found` unless the window is as it was read, `window_corrupted` if its text is gone."""
    await check_exists(db, window)
    if not await transcript_rows.exists(db, window.transcript, window.frame):
        raise _text_is_gone(window)


def _text_is_gone(window: Window) -> GatewayError:
    return GatewayError(
        "window_corrupted",
        f"the text of window {window.name!r} is gone: an older version lost it",
        hint="import an export of it, or freeze its session again, under another name; then delete this one",
        details={"window_name": window.name},
    )

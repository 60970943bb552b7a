"""The SQL of sessions and their turns: plain functions that take a connection. The caller owns the transaction."""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

from gateway.records import Alias, Known, Session, SessionState, Turn, Usage
from gateway.store import response_rows, salt_rows, successor_rows, transcript_rows
from gateway.store.types import TurnRecord

T = TypeVar("T")
_SESSION_COLUMNS = tuple(f.name for f in fields(Session))
_session_values = attrgetter(*_SESSION_COLUMNS)
_SESSION = f"SELECT {', '.join(_SESSION_COLUMNS)} FROM sessions"
_TURN_COLUMNS = tuple(f.name for f in fields(Turn) if f.name != "usage")
_turn_values = attrgetter(*_TURN_COLUMNS)
_CANDIDATES = 4  # sessions that share a beginning; the verdict needs to know whether there is more than one
_NAMESAKES = 32  # replies that share a further name; where there are more, it says nothing
_VARIABLES = 500  # per statement; SQLite's own limit is higher, its parser is not faster for it


def session(db: sqlite3.Connection, tenant: str, session_id: str) -> Session | None:
    """Return the session, or None."""
    row = db.execute(f"{_SESSION} WHERE tenant = ? AND id = ?", (tenant, session_id)).fetchone()
    return Session(*row) if row else None


def list_sessions(
    db: sqlite3.Connection, tenant: str, *, state: SessionState | None, model: str | None, limit: int, offset: int,
    expired_by: float = 0.0,
) -> tuple[list[Session], int]:  # fmt: skip
    """Return one page of sessions, last active first, and how many there are in all.

    Those that were last active before `expired_by` count as `expired`, whatever they were until then. One whose
    every request was refused is no conversation, and is left out.
    """
    where, values = (
        """WHERE tenant = ? AND (? IS NULL OR CASE WHEN last_active_at < ? THEN 'expired' ELSE state END = ?)
        AND (? IS NULL OR model = ?)
        AND (turn_count > 0 OR transcript IS NOT NULL OR coalesce((
            SELECT min(t.outcome IN ('engine_error', 'gateway_error')) FROM turns t
            WHERE t.tenant = sessions.tenant AND t.session_id = sessions.id), 0) = 0)""",
        (tenant, state, expired_by, state, model, model),
    )
    (total,) = db.execute(f"SELECT count(*) FROM sessions {where}", values).fetchone()
    page = db.execute(f"{_SESSION} {where} ORDER BY last_active_at DESC, id LIMIT ? OFFSET ?", (*values, limit, offset))
    return [Session(*row) for row in page], total


def add_session(db: sqlite3.Connection, new: Session) -> bool:
    """Add a session; where it stands already, others may go on from there."""
    added = _insert(db, new)
    if added and new.tip is not None:
        db.execute("INSERT OR IGNORE INTO beginnings VALUES (?, ?, ?)", (new.tenant, new.tip, new.id))
    if added:
        salt_rows.use(db, new.tenant, new.id, [new.salt])
    return added


def _insert(db: sqlite3.Connection, new: Session) -> bool:
    marks = ", ".join("?" * len(_SESSION_COLUMNS))
    cursor = db.execute(
        f"INSERT OR IGNORE INTO sessions ({', '.join(_SESSION_COLUMNS)}) VALUES ({marks})", _session_values(new)
    )
    return cursor.rowcount == 1


def add_sessions(db: sqlite3.Connection, new: Sequence[Session]) -> str | None:
    taken = next((one.id for one in new if session(db, one.tenant, one.id)), None)
    if taken is None:
        for one in new:
            add_session(db, one)
    return taken


def set_frozen(db: sqlite3.Connection, seen: Session, at: float) -> None:
    """Mark a session frozen, unless it has gone on since it was `seen` or another one has its id."""
    db.execute(
        """UPDATE sessions SET state = 'frozen', frozen_at = ?
        WHERE tenant = ? AND id = ? AND created_at = ? AND turn_count = ? AND transcript IS ?""",
        (at, seen.tenant, seen.id, seen.created_at, seen.turn_count, seen.transcript),
    )


def delete_session(db: sqlite3.Connection, tenant: str, session_id: str, *, idle_since: float | None = None) -> bool:
    """Delete the session, its turns and its kept answers; False if there is none.

    Windows stay, its salts are loose. With `idle_since` only if it was not active since then.
    """
    gone = session(db, tenant, session_id)
    if idle_since is not None and (gone is None or gone.last_active_at >= idle_since):
        return False
    db.execute("DELETE FROM turns WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    response_rows.delete_of_session(db, tenant, session_id)
    if gone is None:
        return False
    db.execute("DELETE FROM beginnings WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    db.execute("DELETE FROM ends WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    db.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", (tenant, session_id))
    salt_rows.leave(db, tenant, session_id, gone.lineage)
    successor_rows.forget(db, tenant, session_id)
    transcript_rows.release(db, gone.transcript)
    transcript_rows.release(db, gone.window_transcript)
    transcript_rows.release_content(db, gone.frame)
    response_rows.delete_of_session(db, tenant, session_id)
    return True


def forget_idle(db: sqlite3.Connection, keep: int, at_once: int) -> int:
    (count,) = db.execute("SELECT count(*) FROM sessions").fetchone()
    excess = min(at_once, count - keep)
    if excess <= 0:
        return 0
    oldest = db.execute("SELECT tenant, id FROM sessions ORDER BY last_active_at LIMIT ?", (excess,)).fetchall()
    for tenant, session_id in oldest:
        delete_session(db, tenant, session_id)
    return len(oldest)


def idle_sessions(db: sqlite3.Connection, since: float, limit: int) -> list[tuple[str, str]]:
    """Return sessions (tenant, id) that were not active since then, idle longest first."""
    return db.execute(
        "SELECT tenant, id FROM sessions WHERE last_active_at < ? ORDER BY last_active_at LIMIT ?", (since, limit)
    ).fetchall()


def lineage_in_use(db: sqlite3.Connection, tenant: str, lineage: str) -> bool:
    """Whether a session of the lineage is still going on (active or thawed)."""
    row = db.execute(
        "SELECT 1 FROM sessions WHERE tenant = ? AND lineage = ? AND state IN ('active', 'thawed') LIMIT 1",
        (tenant, lineage),
    ).fetchone()
    return row is not None


def sessions_by_prefix(
    db: sqlite3.Connection, tenant: str, links: Sequence[bytes]
) -> tuple[bytes | None, list[Session]]:
    """Return the first of `links` that is known, and sessions that have been there.

    Those that are there now come first, then those that asked it last, then those that have had a turn (a thawed
    session is where its window was), then the last active ones.
    """
    found = _longest(db, tenant, links)
    if found is None:
        return None, []
    columns = ", ".join(f"s.{name}" for name in _SESSION_COLUMNS)
    rows = db.execute(
        f"""SELECT {columns} FROM beginnings b JOIN sessions s ON s.tenant = b.tenant AND s.id = b.session_id
        WHERE b.tenant = ?1 AND b.link = ?2
        ORDER BY s.tip IS ?2 DESC, s.asked IS ?2 DESC, s.turn_count > 0 DESC, s.last_active_at DESC LIMIT ?3""",
        (tenant, found, _CANDIDATES),
    )
    return found, [Session(*row) for row in rows]


def sessions_by_reply_alias(db: sqlite3.Connection, tenant: str, names: Sequence[Alias]) -> list[Known]:
    """Return sessions that have a reply which goes by these names, whatever is left out.

    Where there are many, some of them; those whose last reply it is come first, then the last active ones.
    """
    said, alone = names[0], names[-1]
    before = said if said.history else alone  # see `gateway.sessions.reply_aliases.is_named`
    columns = ", ".join(f"s.{name}" for name in _SESSION_COLUMNS)
    rows = db.execute(
        f"""SELECT e.link, e.history, e.question, e.marks, e.tip IS s.tip AS current, {columns}
        FROM (
            SELECT * FROM (SELECT * FROM ends WHERE tenant = ?1 AND link = ?2 AND history = ?4 AND question = ?5
                LIMIT ?6)
            UNION SELECT * FROM (SELECT * FROM ends WHERE tenant = ?1 AND link = ?3 AND history = ?4 LIMIT ?6)
            UNION SELECT * FROM (SELECT * FROM ends WHERE tenant = ?1 AND link = ?7 LIMIT ?6)
        ) e JOIN sessions s ON s.tenant = e.tenant AND s.id = e.session_id
        ORDER BY current DESC, s.last_active_at DESC""",
        (tenant, said.link, before.link, said.history, said.question, _NAMESAKES, alone.link),
    )
    named = len(Alias._fields)
    return [Known(Session(*row[named + 1 :]), Alias(*row[:named]), bool(row[named])) for row in rows]


def _longest(db: sqlite3.Connection, tenant: str, links: Sequence[bytes]) -> bytes | None:
    """The first of `links` that is known. Nearly always it is among the first three."""
    for batch in (links[:3], *_batches(links[3:])):
        marks = ", ".join("?" * len(batch))
        found = db.execute(
            f"SELECT DISTINCT link FROM beginnings WHERE tenant = ? AND link IN ({marks})", (tenant, *batch)
        )
        known = {link for (link,) in found}
        if known:
            return next(link for link in batch if link in known)
    return None


def record(db: sqlite3.Connection, finished: Sequence[TurnRecord], turns_kept: int) -> None:
    by_session: dict[tuple[str, str], list[TurnRecord]] = {}
    for item in finished:
        by_session.setdefault((item.turn.tenant, item.turn.session_id), []).append(item)
    for items in by_session.values():
        is_new = _move_on(db, items)
        for item in items:
            _add_turn(db, item.turn)
            _add_beginnings(db, item)
        if not is_new or len(items) > turns_kept:
            _prune_turns(db, items[-1].turn, turns_kept)


def _move_on(db: sqlite3.Connection, items: Sequence[TurnRecord]) -> bool:
    """Bring a session to its last turn whose reply is known; the transcripts between are part of that one or gone.

    Tells whether it is new.
    """
    turn = items[0].turn
    moving = [item for item in items if item.messages is not None]
    transcript = transcript_rows.add(db, moving[-1].messages or ()) if moving else None
    frame = transcript_rows.add_content(db, moving[-1].frame) if moving else None
    values = _seen(items) | (_moved(moving, transcript, frame) if moving else {})
    query = "SELECT transcript, frame, salt FROM sessions WHERE tenant = ? AND id = ?"
    held = db.execute(query, (turn.tenant, turn.session_id)).fetchone()
    if held:
        _update(db, turn, values)
    else:  # new, or deleted meanwhile: what it held is gone
        _begin(db, items[0], values)
    had_transcript, had_frame, had_salt = held or (None, None, "")
    # One that failed may have left KV too; what the session ran under last is known.
    salt_rows.use(db, turn.tenant, turn.session_id, {item.salt for item in items} - {had_salt})
    # What it had is part of what it has, unless the last turn was asked anew.
    if moving and had_transcript != transcript:
        transcript_rows.release(db, had_transcript)
    if moving and had_frame != frame:
        transcript_rows.release_content(db, had_frame)
    return held is None


def _seen(items: Sequence[TurnRecord]) -> dict[str, Any]:
    """What a session's row is to say after turns, whether or not their replies are known."""
    last = items[-1]
    return {
        "last_active_at": max(item.turn.started_at + item.turn.duration_ms / 1000 for item in items),
        "head": next((item.trace.head for item in items if item.trace.head), None),
        "asked": last.trace.asked or None,
        "answered": last.messages is not None,
    }


def _moved(moving: Sequence[TurnRecord], transcript: bytes | None, frame: bytes | None) -> dict[str, Any]:
    """What a session's row is to say besides after turns whose replies are known."""
    last = moving[-1]
    turn, usage = last.turn, last.turn.usage
    return {
        "turn_count": len(moving), "state": "active", "model": turn.model, "fingerprint": last.fingerprint,
        "salt": last.salt, "token_count": usage.prompt + usage.completion if usage else None,
        "prompt_tokens": usage.prompt if usage else None, "transcript": transcript, "frame": frame,
        "tip": last.trace.tip, "engine": turn.engine, "normalised": last.normalised,
    }  # fmt: skip


def _begin(db: sqlite3.Connection, first: TurnRecord, values: Mapping[str, Any]) -> None:
    turn, began = first.turn, first.session
    known = {"model": turn.model} | {name: value for name, value in values.items() if value is not None}
    new = Session(
        turn.tenant, turn.session_id, began.lineage, source=began.source, parent=began.parent,
        created_at=turn.started_at, **known,
    )  # fmt: skip
    _insert(db, new)


# How a value comes into a row that is there; others take the place of what it has.
_COMBINED = {
    "last_active_at": "max(last_active_at, ?)",
    "head": "coalesce(head, ?)",
    "turn_count": "turn_count + ?",
    "token_count": "coalesce(?, token_count)",
    "prompt_tokens": "coalesce(?, prompt_tokens)",
}


def _update(db: sqlite3.Connection, turn: Turn, values: Mapping[str, Any]) -> None:
    changes = ", ".join(f"{name} = {_COMBINED.get(name, '?')}" for name in values)
    db.execute(
        f"UPDATE sessions SET {changes} WHERE tenant = ? AND id = ?", (*values.values(), turn.tenant, turn.session_id)
    )


def _add_beginnings(db: sqlite3.Connection, item: TurnRecord) -> None:
    links = [link for link in (item.trace.asked, item.trace.tip) if link]
    turn = item.turn
    db.executemany(
        "INSERT OR IGNORE INTO beginnings VALUES (?, ?, ?)", [(turn.tenant, link, turn.session_id) for link in links]
    )
    # The same name again: the turn was asked anew.
    db.executemany(
        """INSERT INTO ends VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET tip = excluded.tip, marks = excluded.marks""",
        [(turn.tenant, *name[:3], turn.session_id, item.trace.tip, name.marks) for name in item.trace.ends],
    )


def _add_turn(db: sqlite3.Connection, turn: Turn) -> None:
    usage = turn.usage
    counts = (usage.prompt, usage.completion, usage.cached) if usage else (None, None, None)
    marks = ", ".join("?" * (len(_TURN_COLUMNS) + len(counts)))
    db.execute(
        f"""INSERT INTO turns ({", ".join(_TURN_COLUMNS)}, prompt_tokens, completion_tokens, cached_tokens)
        VALUES ({marks})""",
        (*_turn_values(turn), *counts),
    )


def _prune_turns(db: sqlite3.Connection, turn: Turn, keep: int) -> None:
    db.execute(
        """DELETE FROM turns WHERE tenant = ?1 AND session_id = ?2 AND id <= (
            SELECT id FROM turns WHERE tenant = ?1 AND session_id = ?2 ORDER BY id DESC LIMIT 1 OFFSET ?3)""",
        (turn.tenant, turn.session_id, keep),
    )


def turns(db: sqlite3.Connection, tenant: str, session_id: str, limit: int) -> list[Turn]:
    """Return the last turns, newest first."""
    found = db.execute(
        f"""SELECT prompt_tokens, completion_tokens, cached_tokens, {", ".join(_TURN_COLUMNS)}
        FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT ?""",
        (tenant, session_id, limit),
    )
    return [
        Turn(
            **dict(zip(_TURN_COLUMNS, rest, strict=True)),
            usage=None if prompt is None else Usage(prompt, completion, cached),
        )
        for prompt, completion, cached, *rest in found
    ]


def _batches(values: Sequence[T]) -> Iterable[Sequence[T]]:
    return (values[i : i + _VARIABLES] for i in range(0, len(values), _VARIABLES))


def newest(db: sqlite3.Connection) -> float | None:
    """Return when the newest record of a session or window was made, None where there is none."""
    (at,) = db.execute(
        "SELECT max(at) FROM (SELECT max(last_active_at) AS at FROM sessions UNION SELECT max(created_at) FROM windows)"
    ).fetchone()
    return at if at is None else float(at)

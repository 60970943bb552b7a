"""The SQL of sessions and their turns. The caller owns the transaction."""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

from gateway.dialects.titles import title_of
from gateway.records import Alias, AliasMatch, Session, SessionState, Turn, Usage
from gateway.store import ledger_rows, response_rows, salt_rows, session_name_rows, successor_rows, transcript_rows
from gateway.store.sql import batches, marks
from gateway.store.types import TurnRecord

_SESSION_COLUMNS = tuple(f.name for f in fields(Session))
_session_values = attrgetter(*_SESSION_COLUMNS)
_COLUMNS = ", ".join(_SESSION_COLUMNS)
JOINED_COLUMNS = ", ".join(f"s.{name}" for name in _SESSION_COLUMNS)
_SESSION = f"SELECT {_COLUMNS} FROM sessions"
_TURN_COLUMNS = tuple(f.name for f in fields(Turn) if f.name != "usage")
_turn_values = attrgetter(*_TURN_COLUMNS)
_OVERTAKEN = "the session was taken back to a window meanwhile: this turn is not part of it"
_CANDIDATES = 4  # sessions with the same prefix; the match depends on whether there is more than one
_ALIASES = 32  # replies with the same alias; if there are more, it identifies nothing


def session(db: sqlite3.Connection, tenant: str, session_id: str) -> Session | None:
    """Return the session, or None."""
    row = db.execute(f"{_SESSION} WHERE tenant = ? AND id = ?", (tenant, session_id)).fetchone()
    return Session(*row) if row else None


def list_sessions(
    db: sqlite3.Connection, tenant: str, *, state: SessionState | None, model: str | None, limit: int, offset: int,
    expired_by: float = 0.0,
) -> tuple[list[Session], int]:  # fmt: skip
    """Return one page of sessions, last active first, and the total.

    Those last active before `expired_by` count as `expired`, whatever their stored state. A session whose every request
    was refused is left out.
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


def sessions_beside(db: sqlite3.Connection, tenant: str, session_id: str, stem: str, limit: int) -> list[Session]:
    """Return the session with an id, and the side conversations whose ids begin with `stem`: last active first.

    Without a stem there are none. Sessions without a finished turn are left out.
    """
    rows = db.execute(
        f"""{_SESSION} WHERE tenant = ?1 AND id IN (
            SELECT ?2 UNION ALL
            SELECT id FROM sessions WHERE tenant = ?1 AND id > ?3 AND id < ?4 AND source LIKE '%, beside %'
        ) AND (turn_count > 0 OR transcript IS NOT NULL) ORDER BY +last_active_at DESC, id LIMIT ?5""",
        (tenant, session_id, f"{stem}:", f"{stem};", limit),
    )
    return [Session(*row) for row in rows]


def add_session(db: sqlite3.Connection, new: Session) -> bool:
    """Add a session, which others may be forked from at once; False if its id is taken."""
    cursor = db.execute(
        f"INSERT OR IGNORE INTO sessions ({_COLUMNS}) VALUES ({marks(_SESSION_COLUMNS)})", _session_values(new)
    )
    if not cursor.rowcount:
        return False
    _add_prefixes(db, new.tenant, new.id, new.last_reply_hash)
    salt_rows.use(db, new.tenant, new.id, [new.salt])
    return True


def replace_session(db: sqlite3.Connection, session: Session) -> None:
    """Replace everything that is stored of an existing session by this."""
    columns = ", ".join(f"{name} = ?" for name in _SESSION_COLUMNS)
    values = (*_session_values(session), session.tenant, session.id)
    db.execute(f"UPDATE sessions SET {columns} WHERE tenant = ? AND id = ?", values)
    _add_prefixes(db, session.tenant, session.id, session.last_reply_hash)
    salt_rows.use(db, session.tenant, session.id, [session.salt])


def set_frozen(db: sqlite3.Connection, session: Session, at: float) -> None:
    """Mark a session frozen, unless it has had a turn since it was read or another session has its id."""
    db.execute(
        """UPDATE sessions SET state = 'frozen', frozen_at = ?
        WHERE tenant = ? AND id = ? AND created_at = ? AND turn_count = ? AND transcript IS ?""",
        (at, session.tenant, session.id, session.created_at, session.turn_count, session.transcript),
    )


def delete_session(db: sqlite3.Connection, tenant: str, session_id: str, *, idle_since: float | None = None) -> bool:
    """Delete the session, its turns and its stored responses; False if there is none.

    Its windows stay, its salts are orphaned. With `idle_since` only if it was not active since then.
    """
    deleted = session(db, tenant, session_id)
    if idle_since is not None and (deleted is None or deleted.last_active_at >= idle_since):
        return False
    db.execute("DELETE FROM turns WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    response_rows.delete_of_session(db, tenant, session_id)
    if deleted is None:
        return False
    for table in ("session_prefixes", "reply_aliases"):
        db.execute(f"DELETE FROM {table} WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    db.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", (tenant, session_id))
    salt_rows.release(db, tenant, session_id, deleted.lineage)
    successor_rows.forget(db, tenant, session_id)
    ledger_rows.forget_session(db, tenant, session_id)
    transcript_rows.release(db, deleted.transcript)
    transcript_rows.release(db, deleted.window_transcript)
    transcript_rows.release_content(db, deleted.frame)
    return True


def forget_idle(db: sqlite3.Connection, keep: int, at_once: int) -> int:
    """Delete up to `at_once` of the sessions beyond `keep` that have been idle longest; return how many."""
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


def active_session(db: sqlite3.Connection, tenant: str, lineage: str, salt: str) -> str | None:
    """The session of a lineage that was last active, of those that are active or thawed under a salt; None if none is.

    Sessions of one lineage may have several salts: one that was thawed as text has that of another model.
    """
    query = """SELECT id FROM sessions INDEXED BY sessions_by_lineage
        WHERE tenant = ? AND lineage = ? AND state IN ('active', 'thawed') AND salt = ?
        ORDER BY last_active_at DESC LIMIT 1"""
    found = db.execute(query, (tenant, lineage, salt)).fetchone()
    return str(found[0]) if found else None


def sessions_by_prefix(
    db: sqlite3.Connection, tenant: str, links: Sequence[bytes]
) -> tuple[bytes | None, list[Session]]:
    """Return the first of `links` that a session has in its prefix chain, and the sessions that have it.

    Those whose last reply it is come first, then those whose last request it is, then those that have had a turn (a
    thawed session has the links of its window), then the last active ones.
    """
    longest = _first_known(db, tenant, links)
    if longest is None:
        return None, []
    rows = db.execute(
        f"""SELECT {JOINED_COLUMNS}
        FROM session_prefixes p JOIN sessions s ON s.tenant = p.tenant AND s.id = p.session_id
        WHERE p.tenant = ?1 AND p.link = ?2
        ORDER BY s.last_reply_hash IS ?2 DESC, s.last_request_hash IS ?2 DESC, s.turn_count > 0 DESC,
            s.last_active_at DESC LIMIT ?3""",
        (tenant, longest, _CANDIDATES),
    )
    return longest, [Session(*row) for row in rows]


def _first_known(db: sqlite3.Connection, tenant: str, links: Sequence[bytes]) -> bytes | None:
    for batch in (links[:3], *batches(links[3:])):  # nearly always it is among the first three
        query = f"SELECT DISTINCT link FROM session_prefixes WHERE tenant = ? AND link IN ({marks(batch)})"
        known = {link for (link,) in db.execute(query, (tenant, *batch))}
        if known:
            return next(link for link in batch if link in known)
    return None


def sessions_by_reply_alias(db: sqlite3.Connection, tenant: str, aliases: Sequence[Alias]) -> list[AliasMatch]:
    """Return sessions that have a reply with one of these aliases, the most specific first and the reply's own last.

    If there are many, only some of them. Those whose last reply it is come first, then the last active ones.
    """
    full, bare = aliases[0], aliases[-1]
    by_history = full if full.history else bare  # see `gateway.sessions.reply_aliases.has_alias`
    rows = db.execute(
        f"""SELECT a.link, a.history, a.question, a.marks, a.reply_hash IS s.last_reply_hash AS current,
            {JOINED_COLUMNS}
        FROM (
            SELECT * FROM (SELECT * FROM reply_aliases
                WHERE tenant = ?1 AND link = ?2 AND history = ?4 AND question = ?5 LIMIT ?6)
            UNION SELECT * FROM (SELECT * FROM reply_aliases
                WHERE tenant = ?1 AND link = ?3 AND history = ?4 LIMIT ?6)
            UNION SELECT * FROM (SELECT * FROM reply_aliases WHERE tenant = ?1 AND link = ?7 LIMIT ?6)
        ) a JOIN sessions s ON s.tenant = a.tenant AND s.id = a.session_id
        ORDER BY current DESC, s.last_active_at DESC""",
        (tenant, full.link, by_history.link, full.history, full.question, _ALIASES, bare.link),
    )
    count = len(Alias._fields)
    return [AliasMatch(Session(*row[count + 1 :]), Alias(*row[:count]), bool(row[count])) for row in rows]


def record(db: sqlite3.Connection, records: Sequence[TurnRecord], turns_kept: int) -> list[TurnRecord]:
    """Add turns and move their sessions on, which are created if they are new; keep each session's last turns.

    Returns the turns under the ids of the sessions that they belong to (`session_name_rows`).
    """
    by_conversation: dict[tuple[str, str, bytes | None], list[TurnRecord]] = {}
    for item in records:
        key = item.turn.tenant, item.turn.session_id, item.session.first_message_hash
        by_conversation.setdefault(key, []).append(item)
    recorded: list[TurnRecord] = []
    # One that displaces another comes first, so that the other is recorded under its own id.
    for conversation in sorted(by_conversation.values(), key=lambda items: not items[0].displaces):
        turn = conversation[0].turn
        items = session_name_rows.settled(db, conversation, session(db, turn.tenant, turn.session_id))
        rewinds = _advance(db, items)
        for item in items:
            overtaken = _is_overtaken(item, rewinds)
            _add_turn(db, replace(item.turn, detail=item.turn.detail or _OVERTAKEN) if overtaken else item.turn)
            _add_trace(db, item)
        if rewinds is not None or len(items) > turns_kept:
            _prune_turns(db, items[-1].turn, turns_kept)
        recorded += items
    return recorded


def _advance(db: sqlite3.Connection, items: Sequence[TurnRecord]) -> int | None:
    """Move a session on to its last turn with a known reply, whose transcript contains those before or replaces them.

    Turns that it has overtaken (`_is_overtaken`) only count. Returns how often it was taken back, None if it is new.
    """
    turn = items[0].turn
    query = "SELECT transcript, frame, salt, rewinds FROM sessions WHERE tenant = ? AND id = ?"
    row = db.execute(query, (turn.tenant, turn.session_id)).fetchone()
    old_transcript, old_frame, old_salt, rewinds = row or (None, None, "", None)
    valid = [item for item in items if not _is_overtaken(item, rewinds)]
    replied = [item for item in valid if item.messages is not None]
    transcript = transcript_rows.add(db, replied[-1].messages or ()) if replied else None
    frame = transcript_rows.add_content(db, replied[-1].frame) if replied else None
    values = _values_of_turns(items, valid) | (_values_of_replies(replied, transcript, frame) if replied else {})
    if row:
        _update(db, turn, values | {"turn_count": sum(item.messages is not None for item in items)})
    else:  # new, or just deleted, with what it had
        _create(db, items[0], values)
    # A turn that failed may have left KV too. The salt of the session's last turn is recorded already.
    salt_rows.use(db, turn.tenant, turn.session_id, {item.salt for item in items} - {old_salt})
    # The old transcript is part of the new one, unless the last turn was retried.
    if replied and old_transcript != transcript:
        transcript_rows.release(db, old_transcript)
    if replied and old_frame != frame:
        transcript_rows.release_content(db, old_frame)
    return rewinds if row else None


def _is_overtaken(item: TurnRecord, rewinds: int | None) -> bool:
    """Whether a turn began before its session was taken back to a window, and ended after that."""
    return rewinds is not None and item.session.rewinds < rewinds


def _values_of_turns(items: Sequence[TurnRecord], valid: Sequence[TurnRecord]) -> dict[str, Any]:
    """What any turns change in their session's row, and what those change that it has not overtaken."""
    values: dict[str, Any] = {
        "last_active_at": max(item.turn.started_at + item.turn.duration_ms / 1000 for item in items)
    }
    if not valid:
        return values
    last = valid[-1]
    return values | {
        "first_message_hash": next((i.trace.first_message_hash for i in valid if i.trace.first_message_hash), None),
        "last_request_hash": last.trace.request_hash or None,
        "answered": last.messages is not None,
    }


def _values_of_replies(replied: Sequence[TurnRecord], transcript: bytes | None, frame: bytes | None) -> dict[str, Any]:
    """What turns with a known reply change besides."""
    last = replied[-1]
    turn, usage = last.turn, last.turn.usage
    return {
        "turn_count": len(replied), "state": "active", "model": turn.model, "fingerprint": last.fingerprint,
        "salt": last.salt, "token_count": usage.prompt + usage.completion if usage else None,
        "prompt_tokens": usage.prompt if usage else None, "transcript": transcript, "frame": frame,
        "last_reply_hash": last.trace.reply_hash, "engine": turn.engine, "normalised": last.normalised,
        "title": title_of(last.messages or ()),
    }  # fmt: skip


def _create(db: sqlite3.Connection, first: TurnRecord, values: Mapping[str, Any]) -> None:
    turn, session = first.turn, first.session
    initial = {"model": turn.model} | {name: value for name, value in values.items() if value is not None}
    new = Session(
        turn.tenant, turn.session_id, session.lineage, source=session.source, parent=session.parent,
        created_at=turn.started_at, **initial,
    )  # fmt: skip
    add_session(db, new)


# How a value changes an existing row; any other replaces what is there.
_COMBINED = {
    "last_active_at": "max(last_active_at, ?)",
    "first_message_hash": "coalesce(first_message_hash, ?)",
    "turn_count": "turn_count + ?",
    "token_count": "coalesce(?, token_count)",
    "prompt_tokens": "coalesce(?, prompt_tokens)",
    # A successor begins in the middle of the conversation.
    "title": "coalesce(CASE WHEN source = 'successor' THEN title END, ?)",
}


def _update(db: sqlite3.Connection, turn: Turn, values: Mapping[str, Any]) -> None:
    changes = ", ".join(f"{name} = {_COMBINED.get(name, '?')}" for name in values)
    db.execute(
        f"UPDATE sessions SET {changes} WHERE tenant = ? AND id = ?", (*values.values(), turn.tenant, turn.session_id)
    )


def _add_trace(db: sqlite3.Connection, item: TurnRecord) -> None:
    turn, trace = item.turn, item.trace
    _add_prefixes(db, turn.tenant, turn.session_id, trace.request_hash, trace.reply_hash)
    # If the alias exists, the turn is a retry.
    db.executemany(
        """INSERT INTO reply_aliases VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET reply_hash = excluded.reply_hash, marks = excluded.marks""",
        [(turn.tenant, *alias[:3], turn.session_id, trace.reply_hash, alias.marks) for alias in trace.aliases],
    )


def _add_prefixes(db: sqlite3.Connection, tenant: str, session_id: str, *links: bytes | None) -> None:
    rows = [(tenant, link, session_id) for link in links if link]
    db.executemany("INSERT OR IGNORE INTO session_prefixes VALUES (?, ?, ?)", rows)


def _add_turn(db: sqlite3.Connection, turn: Turn) -> None:
    usage = turn.usage
    values = (*_turn_values(turn), *((usage.prompt, usage.completion, usage.cached) if usage else (None, None, None)))
    db.execute(
        f"""INSERT INTO turns ({", ".join(_TURN_COLUMNS)}, prompt_tokens, completion_tokens, cached_tokens)
        VALUES ({marks(values)})""",
        values,
    )


def _prune_turns(db: sqlite3.Connection, turn: Turn, keep: int) -> None:
    db.execute(
        """DELETE FROM turns WHERE tenant = ?1 AND session_id = ?2 AND id <= (
            SELECT id FROM turns WHERE tenant = ?1 AND session_id = ?2 ORDER BY id DESC LIMIT 1 OFFSET ?3)""",
        (turn.tenant, turn.session_id, keep),
    )


def turns(db: sqlite3.Connection, tenant: str, session_id: str, limit: int) -> list[Turn]:
    """Return the last turns, newest first."""
    rows = db.execute(
        f"""SELECT prompt_tokens, completion_tokens, cached_tokens, {", ".join(_TURN_COLUMNS)}
        FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT ?""",
        (tenant, session_id, limit),
    )
    return [
        Turn(
            **dict(zip(_TURN_COLUMNS, rest, strict=True)),
            usage=None if prompt is None else Usage(prompt, completion, cached),
        )
        for prompt, completion, cached, *rest in rows
    ]


def newest(db: sqlite3.Connection) -> float | None:
    """Return when the newest session or window was recorded, None if there is none."""
    (at,) = db.execute(
        "SELECT max(at) FROM (SELECT max(last_active_at) AS at FROM sessions UNION SELECT max(created_at) FROM windows)"
    ).fetchone()
    return at if at is None else float(at)

"""The SQL of sessions and their turns. The caller owns the transaction."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from operator import attrgetter
from typing import Any

from gateway.dialects.titles import title_of
from gateway.records import Alias, AliasMatch, Session, SessionState, Turn, Usage, subconversation_stem
from gateway.store import ledger_rows, response_rows, salt_rows, session_name_rows, successor_rows, transcript_rows
from gateway.store.database import Db
from gateway.store.sql import batches, columns, marks
from gateway.store.types import TurnRecord

_SESSION_COLUMNS = tuple(f.name for f in fields(Session))
_session_values = attrgetter(*_SESSION_COLUMNS)
_COLUMNS = columns(_SESSION_COLUMNS)
JOINED_COLUMNS = columns(_SESSION_COLUMNS, "s")
_SESSION = f"SELECT {_COLUMNS} FROM sessions"
_TURN_COLUMNS = tuple(f.name for f in fields(Turn) if f.name != "usage")
_turn_values = attrgetter(*_TURN_COLUMNS)
_ADDED = (*_TURN_COLUMNS, "prompt_tokens", "completion_tokens", "cached_tokens", "fingerprint", "unbooked")
_ADD_TURN = f"INSERT INTO turns ({', '.join(_ADDED)}) VALUES ({marks(_ADDED)})"
_OVERTAKEN = "the session was taken back to a window meanwhile: this turn is not part of it"
CANDIDATES = 4  # sessions with the same prefix; the match depends on whether there is more than one
BY_PREFIX = f"""SELECT {JOINED_COLUMNS}
    FROM session_prefixes p JOIN sessions s ON s.tenant = p.tenant AND s.id = p.session_id
    WHERE p.tenant = {{tenant}} AND p.link = {{link}}
    ORDER BY coalesce(s.last_reply_hash = {{link}}, false) DESC, coalesce(s.last_request_hash = {{link}}, false) DESC,
        s.turn_count > 0 DESC, s.last_active_at DESC LIMIT {{limit}}"""
_BY_PREFIX = BY_PREFIX.format(tenant="?1", link="?2", limit="?3")
_ALIASES = 32  # replies with the same alias; if there are more, it identifies nothing


async def session(db: Db, tenant: str, session_id: str) -> Session | None:
    """Return the session, or None."""
    row = await db.one(f"{_SESSION} WHERE tenant = ? AND id = ?", tenant, session_id)
    return Session(*row) if row else None


async def list_sessions(
    db: Db, tenant: str, *, state: SessionState | None, model: str | None, limit: int, offset: int,
    expired_by: float = 0.0,
) -> tuple[list[Session], int]:  # fmt: skip
    """Return one page of sessions, last active first, and the total.

    Those last active before `expired_by` count as `expired`, whatever their stored state. A session whose every request
    was refused is left out.
    """
    where, values = (
        """WHERE tenant = ?1
        AND (CAST(?2 AS TEXT) IS NULL OR CASE WHEN last_active_at < ?3 THEN 'expired' ELSE state END = ?2)
        AND (CAST(?4 AS TEXT) IS NULL OR model = ?4)
        AND (turn_count > 0 OR transcript IS NOT NULL OR coalesce((
            SELECT min(CASE WHEN t.outcome IN ('engine_error', 'gateway_error') THEN 1 ELSE 0 END) FROM turns t
            WHERE t.tenant = sessions.tenant AND t.session_id = sessions.id), 0) = 0)""",
        (tenant, state, expired_by, model),
    )
    total = await db.value(f"SELECT count(*) FROM sessions {where}", *values)
    page = await db.all(
        f"{_SESSION} {where} ORDER BY last_active_at DESC, id LIMIT ?5 OFFSET ?6", *values, limit, offset
    )
    return [Session(*row) for row in page], total


async def sessions_beside(db: Db, tenant: str, session_id: str, stem: str, limit: int) -> list[Session]:
    """Return the session with an id, and the side conversations whose ids begin with `stem`: last active first.

    Without a stem there are none. Sessions without a finished turn are left out.
    """
    rows = await db.all(
        f"""{_SESSION} WHERE tenant = ?1 AND id IN (
            SELECT ?2 UNION ALL
            SELECT id FROM sessions WHERE tenant = ?1 AND id > ?3 AND id < ?4 AND source LIKE '%, beside %'
        ) AND (turn_count > 0 OR transcript IS NOT NULL) ORDER BY +last_active_at DESC, id LIMIT ?5""",
        tenant,
        session_id,
        f"{stem}:",
        f"{stem};",
        limit,
    )
    return [Session(*row) for row in rows]


async def add_session(db: Db, new: Session) -> bool:
    """Add a session, which others may be forked from at once; False if its id is taken."""
    added = await db.run(
        f"INSERT INTO sessions ({_COLUMNS}) VALUES ({marks(_SESSION_COLUMNS)}) ON CONFLICT DO NOTHING",
        *_session_values(new),
    )
    if not added:
        return False
    await _add_prefixes(db, new.tenant, new.id, new.last_reply_hash)
    await salt_rows.use(db, new.tenant, new.id, [new.salt])
    return True


async def replace_session(db: Db, session: Session) -> None:
    """Replace everything that is stored of an existing session by this."""
    changes = ", ".join(f'"{name}" = ?' for name in _SESSION_COLUMNS)
    values = (*_session_values(session), session.tenant, session.id)
    await db.run(f"UPDATE sessions SET {changes} WHERE tenant = ? AND id = ?", *values)
    await _add_prefixes(db, session.tenant, session.id, session.last_reply_hash)
    await salt_rows.use(db, session.tenant, session.id, [session.salt])


async def set_frozen(db: Db, session: Session, at: float) -> None:
    """Mark a session frozen, unless it has had a turn since it was read or another session has its id."""
    await db.run(
        """UPDATE sessions SET state = 'frozen', frozen_at = ?
        WHERE tenant = ? AND id = ? AND created_at = ? AND turn_count = ? AND transcript IS ?""",
        at,
        session.tenant,
        session.id,
        session.created_at,
        session.turn_count,
        session.transcript,
    )


async def delete_session(db: Db, tenant: str, session_id: str, *, idle_since: float | None = None) -> bool:
    """Delete the session, its turns and its stored responses; False if there is none.

    Its windows stay, its salts are orphaned. With `idle_since` only if it was not active since then.
    """
    deleted = await session(db, tenant, session_id)
    if idle_since is not None and (deleted is None or deleted.last_active_at >= idle_since):
        return False
    await ledger_rows.book_turns(db)
    await db.run("DELETE FROM turns WHERE tenant = ? AND session_id = ?", tenant, session_id)
    await response_rows.delete_of_session(db, tenant, session_id)
    if deleted is None:
        return False
    for table in ("session_prefixes", "reply_aliases"):
        await db.run(f"DELETE FROM {table} WHERE tenant = ? AND session_id = ?", tenant, session_id)
    await db.run("DELETE FROM sessions WHERE tenant = ? AND id = ?", tenant, session_id)
    await salt_rows.release(db, tenant, session_id, deleted.lineage)
    await successor_rows.forget(db, tenant, session_id)
    await ledger_rows.forget_session(db, tenant, session_id)
    await transcript_rows.release(db, deleted.transcript)
    await transcript_rows.release(db, deleted.window_transcript)
    await transcript_rows.release_content(db, deleted.frame)
    return True


async def forget_idle(db: Db, keep: int, at_once: int) -> int:
    """Delete up to `at_once` of the sessions beyond `keep` that have been idle longest; return how many."""
    count = await db.value("SELECT count(*) FROM sessions")
    excess = min(at_once, count - keep)
    if excess <= 0:
        return 0
    oldest = await db.all("SELECT tenant, id FROM sessions ORDER BY last_active_at LIMIT ?", excess)
    for tenant, session_id in oldest:
        await delete_session(db, tenant, session_id)
    return len(oldest)


async def idle_sessions(db: Db, since: float, limit: int) -> list[tuple[str, str]]:
    """Return sessions (tenant, id) that were not active since then, idle longest first."""
    return await db.all(
        "SELECT tenant, id FROM sessions WHERE last_active_at < ? ORDER BY last_active_at LIMIT ?", since, limit
    )


async def active_session(db: Db, tenant: str, lineage: str, salt: str) -> str | None:
    """The session of a lineage that was last active, of those that are active or thawed under a salt; None if none is.

    Sessions of one lineage may have several salts: one that was thawed as text has that of another model.
    """
    query = """SELECT id FROM sessions INDEXED BY sessions_by_lineage
        WHERE tenant = ? AND lineage = ? AND state IN ('active', 'thawed') AND salt = ?
        ORDER BY last_active_at DESC LIMIT 1"""
    found: str | None = await db.value(query, tenant, lineage, salt)
    return found


async def sessions_by_prefix(db: Db, tenant: str, links: Sequence[bytes]) -> tuple[bytes | None, list[Session]]:
    """Return the first of `links` that a session has in its prefix chain, and the sessions that have it.

    Those whose last reply it is come first, then those whose last request it is, then those that have had a turn (a
    thawed session has the links of its window), then the last active ones.
    """
    longest = await _first_known(db, tenant, links)
    if longest is None:
        return None, []
    return longest, [Session(*row) for row in await db.all(_BY_PREFIX, tenant, longest, CANDIDATES)]


async def _first_known(db: Db, tenant: str, links: Sequence[bytes]) -> bytes | None:
    for batch in (links[:3], *batches(links[3:])):  # nearly always it is among the first three
        query = f"SELECT DISTINCT link FROM session_prefixes WHERE tenant = ? AND link IN ({marks(batch)})"
        known = {link for (link,) in await db.all(query, tenant, *batch)}
        if known:
            return next(link for link in batch if link in known)
    return None


async def sessions_by_reply_alias(db: Db, tenant: str, aliases: Sequence[Alias]) -> list[AliasMatch]:
    """Return sessions that have a reply with one of these aliases, the most specific first and the reply's own last.

    If there are many, only some of them. Those whose last reply it is come first, then the last active ones.
    """
    full, bare = aliases[0], aliases[-1]
    by_history = full if full.history else bare  # see `gateway.sessions.reply_aliases.has_alias`
    rows = await db.all(
        f"""SELECT a.link, a.history, a.question, a.marks,
            coalesce(a.reply_hash = s.last_reply_hash, false) AS current,
            {JOINED_COLUMNS}
        FROM (
            SELECT * FROM (SELECT * FROM reply_aliases
                WHERE tenant = ?1 AND link = ?2 AND history = ?4 AND question = ?5 LIMIT ?6) same
            UNION SELECT * FROM (SELECT * FROM reply_aliases
                WHERE tenant = ?1 AND link = ?3 AND history = ?4 LIMIT ?6) same_history
            UNION SELECT * FROM (SELECT * FROM reply_aliases WHERE tenant = ?1 AND link = ?7 LIMIT ?6) bare
        ) a JOIN sessions s ON s.tenant = a.tenant AND s.id = a.session_id
        ORDER BY current DESC, s.last_active_at DESC""",
        tenant,
        full.link,
        by_history.link,
        full.history,
        full.question,
        _ALIASES,
        bare.link,
    )
    count = len(Alias._fields)
    return [AliasMatch(Session(*row[count + 1 :]), Alias(*row[:count]), bool(row[count])) for row in rows]


def lock_names(records: Iterable[TurnRecord]) -> Iterator[str]:
    """What `record` locks: the sessions, each with those beside it, which it may rename."""
    return (f"session {item.turn.tenant} {subconversation_stem(item.session.id).split(':')[0]}" for item in records)


async def record(db: Db, records: Sequence[TurnRecord], turns_kept: int) -> list[TurnRecord]:
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
        holder = await session(db, turn.tenant, turn.session_id)
        items = await session_name_rows.settled(db, conversation, holder)
        if items[0].displaces or items is not conversation:  # it may be that of another id now
            holder = await session(db, turn.tenant, items[0].turn.session_id)
        await _advance(db, items, holder)
        for item in items:
            await _add_turn(db, item, _OVERTAKEN if _is_overtaken(item, holder) else "")
            await _add_trace(db, item)
        if holder or len(items) > turns_kept:
            await _prune_turns(db, items[-1].turn, turns_kept)
        recorded += items
    return recorded


async def _advance(db: Db, items: Sequence[TurnRecord], old: Session | None) -> None:
    """Move a session on to its last turn with a known reply, whose transcript contains those before or replaces them.

    Turns that it has overtaken (`_is_overtaken`) only count. Without an `old` one it is created.
    """
    turn = items[0].turn
    valid = [item for item in items if not _is_overtaken(item, old)]
    replied = [item for item in valid if item.messages is not None]
    transcript = await transcript_rows.add(db, replied[-1].messages or ()) if replied else None
    frame = await transcript_rows.add_content(db, replied[-1].frame) if replied else None
    values = _values_of_turns(items, valid) | (_values_of_replies(replied, transcript, frame) if replied else {})
    if old:
        await _update(db, turn, values | {"turn_count": sum(item.messages is not None for item in items)})
    else:  # new, or just deleted, with what it had
        await _create(db, items[0], values)
    # A turn that failed may have left KV too. The salt of the session's last turn is recorded already.
    if salts := {item.salt for item in items} - {old.salt if old else ""}:
        await salt_rows.use(db, turn.tenant, turn.session_id, salts)
    # The old transcript is part of the new one, unless the last turn was retried.
    if replied and old and old.transcript != transcript:
        await transcript_rows.release(db, old.transcript)
    if replied and old and old.frame != frame:
        await transcript_rows.release_content(db, old.frame)


def _is_overtaken(item: TurnRecord, session: Session | None) -> bool:
    """Whether a turn began before its session was taken back to a window, and ended after that."""
    return session is not None and item.session.rewinds < session.rewinds


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


async def _create(db: Db, first: TurnRecord, values: Mapping[str, Any]) -> None:
    turn, session = first.turn, first.session
    initial = {"model": turn.model} | {name: value for name, value in values.items() if value is not None}
    new = Session(
        turn.tenant, turn.session_id, session.lineage, source=session.source, parent=session.parent,
        created_at=turn.started_at, **initial,
    )  # fmt: skip
    await add_session(db, new)


# How a value changes an existing row; any other replaces what is there.
_COMBINED = {
    "last_active_at": "CASE WHEN last_active_at > {0} THEN last_active_at ELSE {0} END",
    "first_message_hash": "coalesce(first_message_hash, {0})",
    "turn_count": "turn_count + {0}",
    "token_count": "coalesce({0}, token_count)",
    "prompt_tokens": "coalesce({0}, prompt_tokens)",
    # A successor begins in the middle of the conversation.
    "title": "coalesce(CASE WHEN source = 'successor' THEN title END, {0})",
}


async def _update(db: Db, turn: Turn, values: Mapping[str, Any]) -> None:
    await db.run(_update_of(*values), turn.tenant, turn.session_id, *values.values())


@cache
def _update_of(*names: str) -> str:
    changes = ", ".join(
        f"{name} = {_COMBINED.get(name, '{0}').format(f'?{mark}')}" for mark, name in enumerate(names, start=3)
    )
    return f"UPDATE sessions SET {changes} WHERE tenant = ?1 AND id = ?2"


async def _add_trace(db: Db, item: TurnRecord) -> None:
    turn, trace = item.turn, item.trace
    await _add_prefixes(db, turn.tenant, turn.session_id, trace.request_hash, trace.reply_hash)
    # If the alias exists, the turn is a retry.
    await db.many(
        """INSERT INTO reply_aliases VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (tenant, link, history, question, session_id)
            DO UPDATE SET reply_hash = excluded.reply_hash, marks = excluded.marks""",
        [(turn.tenant, *alias[:3], turn.session_id, trace.reply_hash, alias.marks) for alias in trace.aliases],
    )


async def _add_prefixes(db: Db, tenant: str, session_id: str, *links: bytes | None) -> None:
    rows = [(tenant, link, session_id) for link in links if link]
    await db.many("INSERT INTO session_prefixes VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)


async def _add_turn(db: Db, item: TurnRecord, remark: str) -> None:
    turn, usage = item.turn, item.turn.usage
    await db.run(
        _ADD_TURN,
        *_turn_values(replace(turn, detail=turn.detail or remark) if remark else turn),
        *((usage.prompt, usage.completion, usage.cached) if usage else (None, None, None)),
        item.fingerprint,
        ledger_rows.is_booked_later(item),
    )


async def _prune_turns(db: Db, turn: Turn, keep: int) -> None:
    key = turn.tenant, turn.session_id
    query = "SELECT id FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
    last = await db.value(query, *key, keep)
    if last is None:
        return
    if await ledger_rows.has_unbooked(db, last):
        await ledger_rows.book_turns(db)
    await db.run("DELETE FROM turns WHERE tenant = ? AND session_id = ? AND id <= ?", *key, last)


async def turns(db: Db, tenant: str, session_id: str, limit: int) -> list[Turn]:
    """Return the last turns, newest first."""
    rows = await db.all(
        f"""SELECT prompt_tokens, completion_tokens, cached_tokens, {", ".join(_TURN_COLUMNS)}
        FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT ?""",
        tenant,
        session_id,
        limit,
    )
    return [
        Turn(
            **dict(zip(_TURN_COLUMNS, rest, strict=True)),
            usage=None if prompt is None else Usage(prompt, completion, cached),
        )
        for prompt, completion, cached, *rest in rows
    ]


async def newest(db: Db) -> float | None:
    """Return when the newest session or window was recorded, None if there is none."""
    at: float | None = await db.value(
        """SELECT max(at) FROM (
            SELECT max(last_active_at) AS at FROM sessions UNION SELECT max(created_at) FROM windows) t"""
    )
    return at

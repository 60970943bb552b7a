"""The SQL of sessions and their turns. The caller owns the transaction."""

from collections.abc import Iterable, Sequence
from operator import attrgetter

from msgspec import structs

from gateway.records import Alias, AliasMatch, Session, SessionState, Turn, Usage
from gateway.store import ledger_rows, response_rows, salt_rows, successor_rows, transcript_rows
from gateway.store.database import Db
from gateway.store.sql import batches, by_tenant, columns, marks

_SESSION_COLUMNS = tuple(f.name for f in structs.fields(Session))
session_values = attrgetter(*_SESSION_COLUMNS)
_COLUMNS = columns(_SESSION_COLUMNS)
JOINED_COLUMNS = columns(_SESSION_COLUMNS, "s")
_SESSION = f"SELECT {_COLUMNS} FROM sessions"
TURN_COLUMNS = tuple(f.name for f in structs.fields(Turn) if f.name != "usage")
ADD_SESSION = f"INSERT INTO sessions ({_COLUMNS}) VALUES ({marks(_SESSION_COLUMNS)}) ON CONFLICT DO NOTHING"
ADD_PREFIX = "INSERT INTO session_prefixes VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
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


async def sessions_by_ids(db: Db, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Session]:
    """Return the sessions of these tenants and ids that exist."""
    found: dict[tuple[str, str], Session] = {}
    for tenant, ids in by_tenant(keys).items():
        query = f"{_SESSION} WHERE tenant = ? AND id IN ({marks(ids)})"
        found |= {(tenant, row[1]): Session(*row) for row in await db.all(query, tenant, *ids)}
    return found


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
    if not await db.run(ADD_SESSION, *session_values(new)):
        return False
    await _add_prefixes(db, new.tenant, new.id, new.last_reply_hash)
    await salt_rows.use(db, new.tenant, new.id, [new.salt])
    return True


async def replace_session(db: Db, session: Session) -> None:
    """Replace everything that is stored of an existing session by this."""
    changes = ", ".join(f'"{name}" = ?' for name in _SESSION_COLUMNS)
    values = (*session_values(session), session.tenant, session.id)
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


async def _add_prefixes(db: Db, tenant: str, session_id: str, *links: bytes | None) -> None:
    rows = [(tenant, link, session_id) for link in links if link]
    await db.many(ADD_PREFIX, rows)


async def turns(db: Db, tenant: str, session_id: str, limit: int) -> list[Turn]:
    """Return the last turns, newest first."""
    rows = await db.all(
        f"""SELECT prompt_tokens, completion_tokens, cached_tokens, {", ".join(TURN_COLUMNS)}
        FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT ?""",
        tenant,
        session_id,
        limit,
    )
    return [
        Turn(
            **dict(zip(TURN_COLUMNS, rest, strict=True)),
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

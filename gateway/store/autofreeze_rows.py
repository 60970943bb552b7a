"""The SQL of automatic freezing: claims on sessions, what windows cover, and which windows were made automatically."""

import math
from collections.abc import Collection

from gateway.records import AUTO_TAG, Session
from gateway.store.database import Db
from gateway.store.session_rows import JOINED_COLUMNS
from gateway.store.sql import get_meta, set_meta
from gateway.store.types import FreezeCandidate

_UNFROZEN = f"""SELECT coalesce(f.covered_tokens, 0), coalesce(f.not_before, 0), coalesce(f.failures, 0),
    {JOINED_COLUMNS}
    FROM sessions s LEFT JOIN auto_freezes f ON f.tenant = s.tenant AND f.session_id = s.id"""
_RULES = "auto_freeze"  # in `meta`


async def unfrozen(db: Db, since: float, before: tuple[float, str, str] | None, limit: int) -> list[FreezeCandidate]:
    """Return sessions active since `since` that have had a turn since they were last frozen, last active first.

    `before` is where the previous page ended: when its last session was active, its tenant and its id.
    """
    after = "" if before is None else " AND (s.last_active_at, s.tenant, s.id) < (?, ?, ?)"
    rows = await db.all(
        f"""{_UNFROZEN} WHERE s.state = 'active' AND s.last_active_at >= ?{after} AND s.transcript IS NOT NULL
        ORDER BY s.last_active_at DESC, s.tenant DESC, s.id DESC LIMIT ?""",
        since,
        *(before or ()),
        limit,
    )
    return [FreezeCandidate(Session(*row[3:]), *row[:3]) for row in rows]


async def freeze_candidates(db: Db, keys: Collection[tuple[str, str]]) -> list[FreezeCandidate]:
    """Return the sessions that exist of these tenants and ids, whatever their state."""
    rows = [await db.one(f"{_UNFROZEN} WHERE s.tenant = ? AND s.id = ?", *key) for key in keys]
    return [FreezeCandidate(Session(*row[3:]), *row[:3]) for row in rows if row]


async def claim_freeze(
    db: Db, session: Session, *, now: float, until: float, cool: bool, latest: float = math.inf
) -> bool:
    """Claim the automatic freeze of a session, until it is reported or the claim ends (`until`).

    False if another worker has it, if the session is not as it was read, and, with `cool`, before `not_before`.
    A claim or a `not_before` later than `latest` does not count: it was set while the clock was wrong.
    """
    claimed = await db.run(
        """INSERT INTO auto_freezes (tenant, session_id, claimed_until)
        SELECT tenant, id, ?1 FROM sessions WHERE tenant = ?2 AND id = ?3 AND turn_count = ?4 AND state = 'active'
            AND created_at = ?7
        ON CONFLICT (tenant, session_id) DO UPDATE SET claimed_until = excluded.claimed_until
        WHERE (auto_freezes.claimed_until <= ?5 OR auto_freezes.claimed_until > ?8)
            AND (auto_freezes.not_before <= ?5 OR auto_freezes.not_before > ?8 OR NOT ?6)""",
        until,
        session.tenant,
        session.id,
        session.turn_count,
        now,
        cool,
        session.created_at,
        latest,
    )
    return claimed == 1


async def report_freeze(db: Db, session: Session, *, window: str | None, not_before: float) -> None:
    """Return a claim, with the name of the window that was made, or None if the freeze failed."""
    key = session.tenant, session.id
    same = "SELECT 1 FROM sessions WHERE tenant = ? AND id = ? AND created_at = ?"
    if await db.one(same, *key, session.created_at) is None:
        return
    if window is None:
        await db.run(
            """UPDATE auto_freezes SET claimed_until = 0, not_before = ?, failures = failures + 1
            WHERE tenant = ? AND session_id = ?""",
            not_before,
            *key,
        )
        return
    await db.run(
        """UPDATE auto_freezes SET claimed_until = 0, not_before = ?, failures = 0, covered_tokens = ?
        WHERE tenant = ? AND session_id = ?""",
        not_before,
        session.token_count,
        *key,
    )
    await db.run(
        """INSERT INTO auto_windows (tenant, name, session_id)
        SELECT tenant, name, session_id FROM windows WHERE tenant = ? AND name = ? AND session_id = ?
        ON CONFLICT DO NOTHING""",
        session.tenant,
        window,
        session.id,
    )


async def lower_covered_tokens(db: Db, session: Session) -> None:
    """Record that a session has shrunk: windows cover at most what it has now."""
    await db.run(
        """UPDATE auto_freezes SET covered_tokens = ?1
        WHERE tenant = ?2 AND session_id = ?3 AND covered_tokens > ?1""",
        session.token_count,
        session.tenant,
        session.id,
    )


async def keep_auto_windows(db: Db, session: Session) -> None:
    """Let no later automatic window of a session replace those that it has: their history is no longer its own."""
    await db.run("DELETE FROM auto_windows WHERE tenant = ? AND session_id = ?", session.tenant, session.id)


async def auto_windows(db: Db, tenant: str, session_id: str) -> list[str]:
    """Return the names of a session's automatic windows, newest first; one that has lost its tag does not count."""
    rows = await db.all(
        """SELECT a.name FROM auto_windows a JOIN windows w ON w.tenant = a.tenant AND w.name = a.name
        JOIN window_tags t ON t.tenant = a.tenant AND t.name = a.name AND t.tag = ?
        WHERE a.tenant = ? AND a.session_id = ? ORDER BY w.created_at DESC, a.number DESC""",
        AUTO_TAG,
        tenant,
        session_id,
    )
    return [name for (name,) in rows]


async def auto_freeze(db: Db) -> str | None:
    """Return the rules of automatic freezing that were set at run time, as JSON."""
    return await get_meta(db, _RULES)


async def set_auto_freeze(db: Db, text: str | None) -> None:
    """Store them; None deletes them."""
    await set_meta(db, _RULES, text)

"""The SQL of automatic freezing: claims on sessions, what is covered, and which windows were made automatically."""

import math
import sqlite3
from collections.abc import Collection
from dataclasses import fields

from gateway.records import AUTO_TAG, Session
from gateway.store.types import Unfrozen

_COLUMNS = tuple(f.name for f in fields(Session))
_UNFROZEN = f"""SELECT coalesce(f.covered_tokens, 0), coalesce(f.not_before, 0), coalesce(f.failures, 0),
    {", ".join(f"s.{name}" for name in _COLUMNS)}
    FROM sessions s LEFT JOIN auto_freezes f ON f.tenant = s.tenant AND f.session_id = s.id"""
_RULES = "auto_freeze"  # their name in `meta`


def unfrozen(db: sqlite3.Connection, since: float, before: tuple[float, str, str] | None, limit: int) -> list[Unfrozen]:
    """Return sessions active since `since` that have gone on since they were last frozen, last active first.

    `before` is where the page before ended: when its last session was active, its tenant and its id.
    """
    where, values = "s.state = 'active' AND s.last_active_at >= ?", [since]
    after = "" if before is None else " AND (s.last_active_at, s.tenant, s.id) < (?, ?, ?)"
    found = db.execute(
        f"""{_UNFROZEN} WHERE {where}{after} AND s.transcript IS NOT NULL
        ORDER BY s.last_active_at DESC, s.tenant DESC, s.id DESC LIMIT ?""",
        (*values, *(before or ()), limit),
    )
    return [Unfrozen(Session(*rest), *freezes) for *freezes, rest in ((*row[:3], row[3:]) for row in found)]


def unfrozen_sessions(db: sqlite3.Connection, keys: Collection[tuple[str, str]]) -> list[Unfrozen]:
    """Return sessions as above, by tenant and id, whatever their state; without those that are not there."""
    found = (db.execute(f"{_UNFROZEN} WHERE s.tenant = ? AND s.id = ?", key).fetchone() for key in keys)
    return [Unfrozen(Session(*row[3:]), *row[:3]) for row in found if row]


def claim_freeze(
    db: sqlite3.Connection, seen: Session, *, now: float, until: float, cool: bool, latest: float = math.inf
) -> bool:
    """Take the automatic freeze of a session for oneself, until it is reported or `until` is over.

    False where another has it, where the session is not as it was `seen`, and, with `cool`, before `not_before`.
    Neither a claim nor `not_before` holds that ends after `latest`: it was set while the clock was wrong.
    """
    cursor = db.execute(
        """INSERT INTO auto_freezes (tenant, session_id, claimed_until)
        SELECT tenant, id, ?1 FROM sessions WHERE tenant = ?2 AND id = ?3 AND turn_count = ?4 AND state = 'active'
            AND created_at = ?7
        ON CONFLICT (tenant, session_id) DO UPDATE SET claimed_until = excluded.claimed_until
        WHERE (claimed_until <= ?5 OR claimed_until > ?8) AND (not_before <= ?5 OR not_before > ?8 OR NOT ?6)""",
        (until, seen.tenant, seen.id, seen.turn_count, now, cool, seen.created_at, latest),
    )
    return cursor.rowcount == 1


def report_freeze(db: sqlite3.Connection, seen: Session, *, window: str | None, not_before: float) -> None:
    """Give a claim back: with the window that was made, or None where that failed."""
    key = seen.tenant, seen.id
    same = "SELECT 1 FROM sessions WHERE tenant = ? AND id = ? AND created_at = ?"
    if db.execute(same, (*key, seen.created_at)).fetchone() is None:
        return
    if window is None:
        db.execute(
            """UPDATE auto_freezes SET claimed_until = 0, not_before = ?, failures = failures + 1
            WHERE tenant = ? AND session_id = ?""",
            (not_before, *key),
        )
        return
    db.execute(
        """UPDATE auto_freezes SET claimed_until = 0, not_before = ?, failures = 0, covered_tokens = ?
        WHERE tenant = ? AND session_id = ?""",
        (not_before, seen.token_count, *key),
    )
    db.execute(
        """INSERT OR IGNORE INTO auto_windows (tenant, name, session_id)
        SELECT tenant, name, session_id FROM windows WHERE tenant = ? AND name = ? AND session_id = ?""",
        (seen.tenant, window, seen.id),
    )


def uncover(db: sqlite3.Connection, seen: Session) -> None:
    """Note that a session has shrunk: what it has now is all that is covered."""
    db.execute(
        """UPDATE auto_freezes SET covered_tokens = ?1
        WHERE tenant = ?2 AND session_id = ?3 AND covered_tokens > ?1""",
        (seen.token_count, seen.tenant, seen.id),
    )


def auto_windows(db: sqlite3.Connection, tenant: str, session_id: str) -> list[str]:
    """Return the names of a session's automatic windows, newest first; one without tag `auto` is none any more."""
    found = db.execute(
        """SELECT a.name FROM auto_windows a JOIN windows w ON w.tenant = a.tenant AND w.name = a.name
        JOIN window_tags t ON t.tenant = a.tenant AND t.name = a.name AND t.tag = ?
        WHERE a.tenant = ? AND a.session_id = ? ORDER BY w.created_at DESC, a.number DESC""",
        (AUTO_TAG, tenant, session_id),
    )
    return [name for (name,) in found]


def auto_freeze(db: sqlite3.Connection) -> str | None:
    """Return the rules of automatic freezing that were set at run time, as JSON."""
    row = db.execute("SELECT value FROM meta WHERE name = ?", (_RULES,)).fetchone()
    return str(row[0]) if row else None


def set_auto_freeze(db: sqlite3.Connection, text: str | None) -> None:
    """Keep them; None forgets them."""
    db.execute("DELETE FROM meta WHERE name = ?", (_RULES,))
    if text is not None:
        db.execute("INSERT INTO meta VALUES (?, ?)", (_RULES, text))

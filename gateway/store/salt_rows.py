"""The SQL of salts: whose turns ran under one, and which were released. The caller owns the transaction."""

import sqlite3
import time
from collections.abc import Iterable, Sequence

from gateway.store.types import OrphanedSalt, SaltNote, SaltUse


def use(db: sqlite3.Connection, tenant: str, session_id: str, salts: Iterable[str]) -> None:
    """A session has turns under `salts`."""
    rows = [(salt, tenant, session_id) for salt in dict.fromkeys(salts) if salt]
    if rows:
        db.executemany("INSERT OR IGNORE INTO session_salts VALUES (?, ?, ?)", rows)


def salts_of(db: sqlite3.Connection, tenant: str, session_id: str) -> list[str]:
    """Return the salts that the session's turns ran under, of turns that failed too."""
    found = db.execute("SELECT salt FROM session_salts WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    return [salt for (salt,) in found]


def leave(db: sqlite3.Connection, tenant: str, session_id: str, lineage: str) -> None:
    """A session goes: somebody has to look whether its salts are still needed."""
    for salt in salts_of(db, tenant, session_id):
        mark_orphaned(db, salt, tenant, lineage)
    db.execute("DELETE FROM session_salts WHERE tenant = ? AND session_id = ?", (tenant, session_id))


def mark_orphaned(db: sqlite3.Connection, salt: str, tenant: str, lineage: str) -> None:
    """Note a salt that nobody will have let go of who is stopped before: what lies under it is to be seen to."""
    db.execute("INSERT OR REPLACE INTO loose_salts VALUES (?, ?, ?, ?)", (salt, tenant, lineage, time.time()))


def note_salts(db: sqlite3.Connection, notes: Sequence[SaltNote]) -> None:
    """Note salts: as the session's where it is there, else as loose. Done again, it is noted as of now."""
    for one in notes:
        found = db.execute("SELECT 1 FROM sessions WHERE tenant = ? AND id = ?", (one.tenant, one.session_id))
        if found.fetchone():
            use(db, one.tenant, one.session_id, [one.salt])
        else:
            mark_orphaned(db, one.salt, one.tenant, one.lineage)


def orphaned_salts(db: sqlite3.Connection) -> list[OrphanedSalt]:
    """Return the salts that were let go of, and that nobody has settled since."""
    return [OrphanedSalt(*row) for row in db.execute("SELECT salt, tenant, lineage, since FROM loose_salts")]


def clear_orphan(db: sqlite3.Connection, gone: OrphanedSalt) -> None:
    """Say that what lay under a loose salt was seen to, unless it was let go of once more."""
    db.execute("DELETE FROM loose_salts WHERE salt = ? AND since = ?", (gone.salt, gone.since))


def salt_in_use(db: sqlite3.Connection, salt: str) -> bool:
    """Whether a session has turns under the salt. Windows hold their objects, not their salt."""
    return db.execute("SELECT 1 FROM session_salts WHERE salt = ? LIMIT 1", (salt,)).fetchone() is not None


def salt_uses(db: sqlite3.Connection) -> list[SaltUse]:
    """Return every salt that a session has, idle longest first."""
    found = db.execute(
        """SELECT u.salt, s.tenant, s.lineage, max(s.last_active_at)
        FROM session_salts u JOIN sessions s ON s.tenant = u.tenant AND s.id = u.session_id
        GROUP BY u.salt, s.tenant, s.lineage ORDER BY 4"""
    )
    return [SaltUse(*row) for row in found]

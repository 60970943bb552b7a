"""The SQL of salts: whose turns ran under one, and which were let go of. Whoever calls owns the transaction."""

import sqlite3
import time
from collections.abc import Iterable

from gateway.store.types import OrphanedSalt, SaltNote, SaltUse


def use(db: sqlite3.Connection, tenant: str, session_id: str, salts: Iterable[str]) -> None:
    """A session has turns under `salts`."""
    rows = [(salt, tenant, session_id) for salt in dict.fromkeys(salts) if salt]
    if rows:
        db.executemany("INSERT OR IGNORE INTO session_salts VALUES (?, ?, ?)", rows)


def of_session(db: sqlite3.Connection, tenant: str, session_id: str) -> list[str]:
    found = db.execute("SELECT salt FROM session_salts WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    return [salt for (salt,) in found]


def leave(db: sqlite3.Connection, tenant: str, session_id: str, lineage: str) -> None:
    """A session goes: somebody has to look whether its salts are still needed."""
    for salt in of_session(db, tenant, session_id):
        loosen(db, salt, tenant, lineage)
    db.execute("DELETE FROM session_salts WHERE tenant = ? AND session_id = ?", (tenant, session_id))


def loosen(db: sqlite3.Connection, salt: str, tenant: str, lineage: str) -> None:
    db.execute("INSERT OR REPLACE INTO loose_salts VALUES (?, ?, ?, ?)", (salt, tenant, lineage, time.time()))


def note(db: sqlite3.Connection, notes: Iterable[SaltNote]) -> None:
    for one in notes:
        found = db.execute("SELECT 1 FROM sessions WHERE tenant = ? AND id = ?", (one.tenant, one.session_id))
        if found.fetchone():
            use(db, one.tenant, one.session_id, [one.salt])
        else:
            loosen(db, one.salt, one.tenant, one.lineage)


def loose(db: sqlite3.Connection) -> list[OrphanedSalt]:
    return [OrphanedSalt(*row) for row in db.execute("SELECT salt, tenant, lineage, since FROM loose_salts")]


def settle(db: sqlite3.Connection, gone: OrphanedSalt) -> None:
    db.execute("DELETE FROM loose_salts WHERE salt = ? AND since = ?", (gone.salt, gone.since))


def in_use(db: sqlite3.Connection, salt: str) -> bool:
    return db.execute("SELECT 1 FROM session_salts WHERE salt = ? LIMIT 1", (salt,)).fetchone() is not None


def uses(db: sqlite3.Connection) -> list[SaltUse]:
    found = db.execute(
        """SELECT u.salt, s.tenant, s.lineage, max(s.last_active_at)
        FROM session_salts u JOIN sessions s ON s.tenant = u.tenant AND s.id = u.session_id
        GROUP BY u.salt, s.tenant, s.lineage ORDER BY 4"""
    )
    return [SaltUse(*row) for row in found]

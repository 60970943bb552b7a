"""The SQL of salts: which sessions use one, which are orphaned, and which secret they are made with.

The caller owns the transaction.
"""

import sqlite3
import time
from collections.abc import Iterable, Sequence

from gateway.store.sql import get_meta, set_meta
from gateway.store.types import OrphanedSalt, SaltNote, SaltUse

_MARK = "secret_mark"  # in `meta`


def use(db: sqlite3.Connection, tenant: str, session_id: str, salts: Iterable[str]) -> None:
    """Record that a session has turns under `salts`."""
    rows = [(salt, tenant, session_id) for salt in dict.fromkeys(salts) if salt]
    db.executemany("INSERT OR IGNORE INTO session_salts VALUES (?, ?, ?)", rows)


def salts_of(db: sqlite3.Connection, tenant: str, session_id: str) -> list[str]:
    """Return the salts of the session's turns, including those that failed."""
    rows = db.execute("SELECT salt FROM session_salts WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    return [salt for (salt,) in rows]


def release(db: sqlite3.Connection, tenant: str, session_id: str, lineage: str) -> None:
    """Mark the salts of a deleted session as orphaned: the sweeper checks whether they are still needed."""
    for salt in salts_of(db, tenant, session_id):
        mark_orphaned(db, salt, tenant, lineage)
    db.execute("DELETE FROM session_salts WHERE tenant = ? AND session_id = ?", (tenant, session_id))


def mark_orphaned(db: sqlite3.Connection, salt: str, tenant: str, lineage: str) -> None:
    """Record a salt as orphaned, as of now. Done in advance for a temporary salt, so that a crash leaves its KV to the
    sweeper."""
    db.execute("INSERT OR REPLACE INTO orphaned_salts VALUES (?, ?, ?, ?)", (salt, tenant, lineage, time.time()))


def note_salts(db: sqlite3.Connection, notes: Sequence[SaltNote]) -> None:
    """Record salts: as the session's if it exists, else as orphaned."""
    for note in notes:
        session = db.execute("SELECT 1 FROM sessions WHERE tenant = ? AND id = ?", (note.tenant, note.session_id))
        if session.fetchone():
            use(db, note.tenant, note.session_id, [note.salt])
        else:
            mark_orphaned(db, note.salt, note.tenant, note.lineage)


def orphaned_salts(db: sqlite3.Connection) -> list[OrphanedSalt]:
    """Return the salts that are orphaned and not cleared yet."""
    return [OrphanedSalt(*row) for row in db.execute("SELECT salt, tenant, lineage, since FROM orphaned_salts")]


def clear_orphan(db: sqlite3.Connection, orphan: OrphanedSalt) -> None:
    """Forget an orphaned salt whose KV has been dealt with, unless it has been orphaned once more."""
    db.execute("DELETE FROM orphaned_salts WHERE salt = ? AND since = ?", (orphan.salt, orphan.since))


def salt_in_use(db: sqlite3.Connection, salt: str) -> bool:
    """Whether a session has turns under the salt. Windows hold their objects, not their salt."""
    return db.execute("SELECT 1 FROM session_salts WHERE salt = ? LIMIT 1", (salt,)).fetchone() is not None


def salt_uses(db: sqlite3.Connection) -> list[SaltUse]:
    """Return every salt that a session has, idle longest first."""
    rows = db.execute(
        """SELECT u.salt, s.tenant, s.lineage, max(s.last_active_at)
        FROM session_salts u JOIN sessions s ON s.tenant = u.tenant AND s.id = u.session_id
        GROUP BY u.salt, s.tenant, s.lineage ORDER BY 4"""
    )
    return [SaltUse(*row) for row in rows]


def known_secret(db: sqlite3.Connection) -> tuple[str | None, bool]:
    """Return the mark of the store's secret (`gateway.sessions.salts`), and whether there is any session or window."""
    (in_use,) = db.execute("SELECT EXISTS (SELECT 1 FROM sessions) OR EXISTS (SELECT 1 FROM windows)").fetchone()
    return get_meta(db, _MARK), bool(in_use)


def remember_secret(db: sqlite3.Connection, mark: str) -> None:
    """Store the mark of the secret that salts are made with from now on."""
    set_meta(db, _MARK, mark)

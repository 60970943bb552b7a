"""The SQL of salts: which sessions use one, which are orphaned, and which secret they are made with.

The caller owns the transaction.
"""

import time
from collections.abc import Iterable, Sequence

from gateway.store.database import Db
from gateway.store.sql import get_meta, set_meta
from gateway.store.types import OrphanedSalt, SaltNote, SaltUse

USE = "INSERT INTO session_salts VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_MARK = "secret_mark"  # in `meta`


async def use(db: Db, tenant: str, session_id: str, salts: Iterable[str]) -> None:
    """Record that a session has turns under `salts`."""
    rows = [(salt, tenant, session_id) for salt in dict.fromkeys(salts) if salt]
    await db.many(USE, rows)


async def salts_of(db: Db, tenant: str, session_id: str) -> list[str]:
    """Return the salts of the session's turns, including those that failed."""
    rows = await db.all("SELECT salt FROM session_salts WHERE tenant = ? AND session_id = ?", tenant, session_id)
    return [salt for (salt,) in rows]


async def release(db: Db, tenant: str, session_id: str, lineage: str) -> None:
    """Mark the salts of a deleted session as orphaned: the sweeper checks whether they are still needed."""
    for salt in await salts_of(db, tenant, session_id):
        await mark_orphaned(db, salt, tenant, lineage)
    await db.run("DELETE FROM session_salts WHERE tenant = ? AND session_id = ?", tenant, session_id)


async def mark_orphaned(db: Db, salt: str, tenant: str, lineage: str) -> None:
    """Record a salt as orphaned, as of now. Done in advance for a temporary salt, so that a crash leaves its KV to the
    sweeper."""
    await db.run(
        """INSERT INTO orphaned_salts VALUES (?, ?, ?, ?) ON CONFLICT (salt) DO UPDATE SET
        tenant = excluded.tenant, lineage = excluded.lineage, since = excluded.since""",
        salt, tenant, lineage, time.time(),
    )  # fmt: skip


async def note_salts(db: Db, notes: Sequence[SaltNote]) -> None:
    """Record salts: as the session's if it exists, else as orphaned."""
    for note in notes:
        if await db.one("SELECT 1 FROM sessions WHERE tenant = ? AND id = ?", note.tenant, note.session_id):
            await use(db, note.tenant, note.session_id, [note.salt])
        else:
            await mark_orphaned(db, note.salt, note.tenant, note.lineage)


async def orphaned_salts(db: Db) -> list[OrphanedSalt]:
    """Return the salts that are orphaned and not cleared yet."""
    return [OrphanedSalt(*row) for row in await db.all("SELECT salt, tenant, lineage, since FROM orphaned_salts")]


async def clear_orphan(db: Db, orphan: OrphanedSalt) -> None:
    """Forget an orphaned salt whose KV has been dealt with, unless it has been orphaned once more."""
    await db.run("DELETE FROM orphaned_salts WHERE salt = ? AND since = ?", orphan.salt, orphan.since)


async def salt_in_use(db: Db, salt: str) -> bool:
    """Whether a session has turns under the salt. Windows hold their objects, not their salt."""
    return await db.one("SELECT 1 FROM session_salts WHERE salt = ? LIMIT 1", salt) is not None


async def salt_uses(db: Db) -> list[SaltUse]:
    """Return every salt that a session has, idle longest first."""
    rows = await db.all(
        """SELECT u.salt, s.tenant, s.lineage, max(s.last_active_at)
        FROM session_salts u JOIN sessions s ON s.tenant = u.tenant AND s.id = u.session_id
        GROUP BY u.salt, s.tenant, s.lineage ORDER BY 4"""
    )
    return [SaltUse(*row) for row in rows]


async def known_secret(db: Db) -> tuple[str | None, bool]:
    """Return the mark of the store's secret (`gateway.sessions.salts`), and whether there is any session or window."""
    in_use = await db.value("SELECT EXISTS (SELECT 1 FROM sessions) OR EXISTS (SELECT 1 FROM windows)")
    return await get_meta(db, _MARK), bool(in_use)


async def remember_secret(db: Db, mark: str, before: str | None) -> str:
    """Store the mark of the secret that salts are made with from now on, if it is still the one before; return the mark
    that there is then: of two gateways that start on a new store, one is first."""
    now = await get_meta(db, _MARK)
    if now != before:
        return now or mark
    await set_meta(db, _MARK, mark)
    return mark

"""The SQL of the gateways that share the store, and of what only one of them may do at a time.

A gateway is alive until its lease ends, by the database's clock: no gateway's own clock matters. What it holds besides
ends with it. The caller owns the transaction.
"""

from collections.abc import Sequence

from gateway.store.database import Db
from gateway.store.types import Member, Peer

_ALIVE = "EXISTS (SELECT 1 FROM gateways g WHERE g.id = leases.gateway AND g.until > ?4)"


async def join(db: Db, new: Member) -> tuple[list[Peer], float]:
    """Add a gateway; return the others, and when that was."""
    now = await db.now()
    await db.run(
        """INSERT INTO gateways (id, started, until, looked_at, protocol, oldest, host, process)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING""",
        new.id, now, now + new.ttl_s, now, new.protocol, new.oldest, new.host, new.process,
    )  # fmt: skip
    return await _others(db, new.id, now), now


async def renew(db: Db, member: Member) -> list[Peer] | None:
    """Renew a gateway's lease and return the others; None if it had ended, and others have acted on that."""
    now = await db.now()
    changed = "UPDATE gateways SET until = ?, looked_at = ? WHERE id = ?"
    if not await db.run(changed, now + member.ttl_s, now, member.id):
        return None
    return await _others(db, member.id, now)


async def _others(db: Db, own: str, now: float) -> list[Peer]:
    rows = await db.all("SELECT until, id, protocol, oldest, host, process, looked_at FROM gateways WHERE id != ?", own)
    return [Peer(until > now, *rest) for until, *rest in rows]


async def bury(db: Db, ended: Sequence[str]) -> None:
    """Remove gateways that are known to have ended, and all whose lease has; their own leases end thereby."""
    await db.many("DELETE FROM gateways WHERE id = ?", [(one,) for one in ended])
    await db.run("DELETE FROM gateways WHERE until <= ?", await db.now())
    await db.run("DELETE FROM leases WHERE gateway NOT IN (SELECT id FROM gateways)")
    await db.run("DELETE FROM open_turns WHERE gateway NOT IN (SELECT id FROM gateways)")


async def has_lease(db: Db, name: str, gateway: str) -> bool:
    """Whether a gateway has a lease now."""
    found = await db.one(
        """SELECT 1 FROM leases l JOIN gateways g ON g.id = l.gateway
        WHERE l.name = ?1 AND l.gateway = ?2 AND l.until > ?3 AND g.until > ?3""",
        name, gateway, await db.now(),
    )  # fmt: skip
    return found is not None


async def take_lease(db: Db, name: str, gateway: str, for_s: float) -> bool:
    """Take a lease, or renew one's own; return whether one has it now. It ends after `for_s`, or with the gateway."""
    now = await db.now()
    changed = await db.run(
        f"""INSERT INTO leases (name, gateway, until) VALUES (?1, ?2, ?3) ON CONFLICT (name) DO UPDATE
        SET gateway = excluded.gateway, until = excluded.until
        WHERE leases.gateway = excluded.gateway OR leases.until <= ?4 OR NOT {_ALIVE}""",
        name, gateway, now + for_s, now,
    )  # fmt: skip
    return changed > 0


async def drop_lease(db: Db, name: str, gateway: str) -> None:
    """Let others take a lease."""
    await db.run("DELETE FROM leases WHERE name = ? AND gateway = ?", name, gateway)

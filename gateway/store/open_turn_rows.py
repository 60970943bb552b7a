"""The SQL of turns in flight, by which gateways see each other's (`gateway.sessions.open_turns`)."""

from collections.abc import Sequence

from gateway.store.database import Db
from gateway.store.sql import batches, marks

# A gateway whose lease has ended is buried by the next heartbeat of another.
_OTHERS = "gateway IN (SELECT id FROM gateways WHERE id != ?)"


async def write(db: Db, gateway: str, new: Sequence[tuple[bytes, bool]], old: Sequence[bytes]) -> None:
    """Add and delete rows of a gateway: keys, and whether one is of a batch of turns that are over."""
    await db.many("DELETE FROM open_turns WHERE gateway = ? AND turn_key = ?", [(gateway, key) for key in sorted(old)])
    await db.many(
        "INSERT INTO open_turns (gateway, turn_key, is_over) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        [(gateway, key, int(over)) for key, over in sorted(new)],
    )


async def elsewhere(db: Db, gateway: str, keys: Sequence[bytes]) -> list[bytes]:
    """Return those of `keys` that other live gateways have."""
    found: list[bytes] = []
    for batch in batches(keys):
        query = f"SELECT DISTINCT turn_key FROM open_turns WHERE turn_key IN ({marks(batch)}) AND {_OTHERS}"
        rows = await db.all(query, *batch, gateway)
        found += [bytes(key) for (key,) in rows]
    return found


async def ended(db: Db, gateway: str) -> list[bytes]:
    """Return the batches of other live gateways that are over and not recorded yet."""
    rows = await db.all(f"SELECT turn_key FROM open_turns WHERE is_over = 1 AND {_OTHERS}", gateway)
    return [bytes(key) for (key,) in rows]


async def any_elsewhere(db: Db, gateway: str) -> bool:
    """Whether another live gateway has any."""
    return await db.one(f"SELECT 1 FROM open_turns WHERE {_OTHERS} LIMIT 1", gateway) is not None

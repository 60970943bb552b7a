"""The SQL of sessions that continue one whose context was full. The caller owns the transaction."""

from gateway.records import Succession
from gateway.store.database import Db

_COLUMNS = 'tenant, session_id, successor, "window", dropped, link'


async def successor(db: Db, step: Succession) -> Succession | None:
    """Return the step to the successor that a session has already, or None."""
    return await _step(db, "session_id", step.tenant, step.session_id)


async def add(db: Db, step: Succession) -> None:
    """Give a session its successor."""
    await db.run(
        f"INSERT INTO successions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
        step.tenant,
        step.session_id,
        step.successor,
        step.window,
        step.dropped,
        step.link,
    )
    await db.run(
        "UPDATE sessions SET successor = ? WHERE tenant = ? AND id = ?", step.successor, step.tenant, step.session_id
    )


async def successions(db: Db, tenant: str, session_id: str) -> list[Succession]:
    """Return all steps from session to successor of the conversation that a session is part of, in order."""
    before, at = [], session_id
    while step := await _step(db, "successor", tenant, at):
        before.append(step)
        at = step.session_id
    after, at = [], session_id
    while step := await _step(db, "session_id", tenant, at):
        after.append(step)
        at = step.successor
    return [*reversed(before), *after]


async def forget(db: Db, tenant: str, session_id: str) -> None:
    """Remove a deleted session from its conversation: the session before it has no successor any more."""
    await db.run("UPDATE sessions SET successor = NULL WHERE tenant = ? AND successor = ?", tenant, session_id)
    for end in ("session_id", "successor"):
        await db.run(f"DELETE FROM successions WHERE tenant = ? AND {end} = ?", tenant, session_id)


async def _step(db: Db, end: str, tenant: str, session_id: str) -> Succession | None:
    query = f"SELECT {_COLUMNS} FROM successions WHERE tenant = ? AND {end} = ?"
    row = await db.one(query, tenant, session_id)
    return Succession(*row) if row else None

"""The SQL of sessions that continue one whose context was full. The caller owns the transaction."""

import sqlite3

from gateway.records import Succession

_COLUMNS = "tenant, session_id, successor, window, dropped, link"


def successor(db: sqlite3.Connection, step: Succession) -> Succession | None:
    """Return the step to the successor that a session has already, or None."""
    return _step(db, "session_id", step.tenant, step.session_id)


def add(db: sqlite3.Connection, step: Succession) -> None:
    """Give a session its successor."""
    db.execute(
        f"INSERT INTO successions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
        (step.tenant, step.session_id, step.successor, step.window, step.dropped, step.link),
    )
    db.execute(
        "UPDATE sessions SET successor = ? WHERE tenant = ? AND id = ?", (step.successor, step.tenant, step.session_id)
    )


def successions(db: sqlite3.Connection, tenant: str, session_id: str) -> list[Succession]:
    """Return all steps from session to successor of the conversation that a session is part of, in order."""
    before, at = [], session_id
    while step := _step(db, "successor", tenant, at):
        before.append(step)
        at = step.session_id
    after, at = [], session_id
    while step := _step(db, "session_id", tenant, at):
        after.append(step)
        at = step.successor
    return [*reversed(before), *after]


def forget(db: sqlite3.Connection, tenant: str, session_id: str) -> None:
    """Remove a deleted session from its conversation: the session before it has no successor any more."""
    db.execute("UPDATE sessions SET successor = NULL WHERE tenant = ? AND successor = ?", (tenant, session_id))
    for end in ("session_id", "successor"):
        db.execute(f"DELETE FROM successions WHERE tenant = ? AND {end} = ?", (tenant, session_id))


def _step(db: sqlite3.Connection, end: str, tenant: str, session_id: str) -> Succession | None:
    query = f"SELECT {_COLUMNS} FROM successions WHERE tenant = ? AND {end} = ?"
    row = db.execute(query, (tenant, session_id)).fetchone()
    return Succession(*row) if row else None

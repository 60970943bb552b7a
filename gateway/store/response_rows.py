"""The SQL of kept answers (Responses API); see `gateway.store.rows`, which owns what they have in common."""

import sqlite3
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.records import StoredResponse

# Long, and the same from answer to answer of a conversation.
_ECHOED = ("instructions", "tools")
# Old answers are dropped this many at a time, as what only they held must then be looked for.
_DROPPED_AT_ONCE = 16


def echo(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer repeats of its request."""
    return {name: answer[name] for name in _ECHOED if name in answer}


def add(db: sqlite3.Connection, new: StoredResponse, echo_id: bytes) -> None:
    """Keep an answer. An id that comes again names the later one, as it does to the engine."""
    answer = orjson.dumps({name: None if name in _ECHOED else value for name, value in new.answer.items()})
    db.execute(
        """INSERT OR REPLACE INTO responses
        (tenant, id, session_id, lineage, created_at, answer, echo, instructed, transcript, asked)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            new.tenant, new.id, new.session_id, new.lineage, new.created_at, answer, echo_id, new.instructed,
            new.transcript, new.asked,
        ),
    )  # fmt: skip


def find(db: sqlite3.Connection, tenant: str, response_id: str) -> StoredResponse | None:
    row = db.execute(
        """SELECT session_id, lineage, created_at, answer, body, instructed, transcript, asked
        FROM responses JOIN contents ON contents.id = echo WHERE tenant = ? AND responses.id = ?""",
        (tenant, response_id),
    ).fetchone()
    if row is None:
        return None
    session_id, lineage, created_at, answer, echoed, instructed, transcript, asked = row
    whole = {**orjson.loads(answer), **orjson.loads(echoed)}
    return StoredResponse(
        tenant, response_id, session_id, lineage, created_at, whole, bool(instructed), transcript, asked
    )


def delete(db: sqlite3.Connection, tenant: str, response_id: str) -> bool:
    return db.execute("DELETE FROM responses WHERE tenant = ? AND id = ?", (tenant, response_id)).rowcount == 1


def delete_of_session(db: sqlite3.Connection, tenant: str, session_id: str) -> None:
    db.execute("DELETE FROM responses WHERE tenant = ? AND session_id = ?", (tenant, session_id))


def drop_oldest(db: sqlite3.Connection, tenant: str, keep: int) -> bool:
    """Drop the oldest answers of a tenant over `keep`, some at a time; tell whether any went."""
    slack = keep // _DROPPED_AT_ONCE
    newest = "SELECT number FROM responses WHERE tenant = ? ORDER BY number DESC LIMIT 1 OFFSET ?"
    if db.execute(newest, (tenant, keep + slack)).fetchone() is None:
        return False
    (last,) = db.execute(newest, (tenant, keep)).fetchone()
    db.execute("DELETE FROM responses WHERE tenant = ? AND number <= ?", (tenant, last))
    return True

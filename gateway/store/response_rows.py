"""The SQL of kept answers (Responses API). Whoever calls owns the transaction."""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from gateway.records import StoredResponse
from gateway.store import transcript_rows
from gateway.store.contract import Finished

# Long, and the same from answer to answer of a conversation.
_ECHOED = ("instructions", "tools")


def echo(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer repeats of its request."""
    return {name: answer[name] for name in _ECHOED if name in answer}


def add(db: sqlite3.Connection, new: StoredResponse, echo_id: bytes) -> None:
    answer = orjson.dumps({name: None if name in _ECHOED else value for name, value in new.answer.items()})
    db.execute(
        """INSERT INTO responses
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
    return _delete(db, "tenant = ? AND id = ?", (tenant, response_id)) == 1


def delete_of_session(db: sqlite3.Connection, tenant: str, session_id: str) -> None:
    _delete(db, "tenant = ? AND session_id = ?", (tenant, session_id))


def record(db: sqlite3.Connection, finished: Sequence[Finished], keep: int) -> None:
    """Keep the answers of finished turns, and drop the oldest ones over `keep` for each tenant."""
    for item in finished:
        if item.response:
            transcript = transcript_rows.add(db, item.messages) if item.messages else None
            new = replace(item.response, transcript=transcript, asked=transcript_rows.add(db, item.asked))
            delete(db, new.tenant, new.id)  # an id that comes again names the later one, as it does to the engine
            add(db, new, transcript_rows.add_content(db, echo(new.answer)))
    for tenant in {item.turn.tenant for item in finished}:
        _drop_oldest(db, tenant, keep)


def _drop_oldest(db: sqlite3.Connection, tenant: str, keep: int) -> None:
    oldest = "SELECT number FROM responses WHERE tenant = ? ORDER BY number DESC LIMIT 1 OFFSET ?"
    row = db.execute(oldest, (tenant, keep)).fetchone()
    if row is not None:
        _delete(db, "tenant = ? AND number <= ?", (tenant, row[0]))


def _delete(db: sqlite3.Connection, where: str, values: Sequence[object]) -> int:
    gone = db.execute(f"SELECT transcript, asked, echo FROM responses WHERE {where}", values).fetchall()
    db.execute(f"DELETE FROM responses WHERE {where}", values)
    for transcript, asked, echoed in gone:
        transcript_rows.release(db, transcript)
        transcript_rows.release(db, asked)
        transcript_rows.release_content(db, echoed)
    return len(gone)

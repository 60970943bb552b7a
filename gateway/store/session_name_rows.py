"""Which of the conversations that a client has under one id is the session of that id. The caller owns the transaction.

A chat front end asks for a title under the id of the chat, at the same time as for the first reply, and either request
may come first. So a session that was sent one message only gives its id up to a conversation that continues.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from gateway.records import Session, subconversation_id, subconversation_source
from gateway.store import ledger_rows
from gateway.store.types import TurnRecord


def settled(db: sqlite3.Connection, items: Sequence[TurnRecord], holder: Session | None) -> Sequence[TurnRecord]:
    """Return turns of one conversation under the session id that they are recorded under.

    `holder` is the session that has their id now. If it holds another conversation, either that one steps aside, or
    these turns do: the turns of a conversation whose id was given to another while they were in flight.
    """
    session = items[0].session
    head = session.first_message_hash
    if head is None or (holder and holder.first_message_hash in (None, head)):
        return items
    beside = subconversation_id(session.id, head)
    if items[0].displaces and (holder is None or _steps_aside(db, holder)):
        _rename(db, session.tenant, beside, session.id, session.source, session.parent)  # its earlier turns
        return items
    return [_beside(item, beside) for item in items] if holder else items


def _beside(item: TurnRecord, session_id: str) -> TurnRecord:
    old = item.session
    source = subconversation_source(old.source, old.id)
    return replace(
        item,
        turn=replace(item.turn, session_id=session_id),
        session=replace(old, id=session_id, source=source, parent=old.id),
        response=item.response and replace(item.response, session_id=session_id),
    )


def _steps_aside(db: sqlite3.Connection, holder: Session) -> bool:
    """Give a session an id beside its own if it is a single message; return whether its id is free now."""
    if not holder.is_single_message or holder.first_message_hash is None:
        return False
    beside = subconversation_id(holder.id, holder.first_message_hash)
    query = "SELECT 1 FROM sessions WHERE tenant = ? AND id = ?"
    if db.execute(query, (holder.tenant, beside)).fetchone():
        return False
    _rename(db, holder.tenant, holder.id, beside, subconversation_source(holder.source, holder.id), holder.id)
    return True


def _rename(db: sqlite3.Connection, tenant: str, session_id: str, new_id: str, source: str, parent: str | None) -> None:
    """Give a session, if there is one, another id, with whatever belongs to it."""
    db.execute("PRAGMA defer_foreign_keys = ON")  # until the transaction is over
    cursor = db.execute(
        "UPDATE sessions SET id = ?, source = ?, parent = ? WHERE tenant = ? AND id = ?",
        (new_id, source, parent, tenant, session_id),
    )
    if not cursor.rowcount:
        return
    for table in _tables_of_sessions(db):
        query = f"UPDATE {table} SET session_id = ? WHERE tenant = ? AND session_id = ?"
        db.execute(query, (new_id, tenant, session_id))
    ledger_rows.rename(db, tenant, "session", session_id, new_id)


def _tables_of_sessions(db: sqlite3.Connection) -> list[str]:
    """The tables that name a session."""
    rows = db.execute(
        """SELECT t.name FROM sqlite_master t JOIN pragma_table_info(t.name) c
        WHERE t.type = 'table' AND t.sql NOT LIKE 'CREATE VIRTUAL%' AND c.name = 'session_id'"""
    )
    return [name for (name,) in rows]

"""Which of the conversations that a client has under one id is the session of that id. The caller owns the transaction.

A chat front end asks for a title under the id of the chat, at the same time as for the first reply, and either request
may come first. So a session that was sent one message only gives its id up to a conversation that continues.
"""

from collections.abc import Sequence

from msgspec import structs

from gateway.records import Session, subconversation_id, subconversation_source
from gateway.store import ledger_rows
from gateway.store.database import Db
from gateway.store.types import TurnRecord

TABLES_OF_SESSIONS = (
    "auto_freezes", "auto_windows", "reply_aliases", "responses", "session_prefixes", "session_salts", "successions",
    "turns", "windows",
)  # fmt: skip
"""The tables that name a session in `session_id`."""


async def settled(db: Db, items: Sequence[TurnRecord], holder: Session | None) -> Sequence[TurnRecord]:
    """Return turns of one conversation under the session id that they are recorded under.

    `holder` is the session that has their id now. If it holds another conversation, either that one steps aside, or
    these turns do: the turns of a conversation whose id was given to another while they were in flight.
    """
    session = items[0].session
    head = session.first_message_hash
    if head is None or (holder and holder.first_message_hash in (None, head)):
        return items
    beside = subconversation_id(session.id, head)
    if items[0].displaces and (holder is None or await _steps_aside(db, holder)):
        await _rename(db, session.tenant, beside, session.id, session.source, session.parent)  # its earlier turns
        return items
    return [_beside(item, beside) for item in items] if holder else items


def _beside(item: TurnRecord, session_id: str) -> TurnRecord:
    old = item.session
    source = subconversation_source(old.source, old.id)
    return structs.replace(
        item,
        turn=structs.replace(item.turn, session_id=session_id),
        session=structs.replace(old, id=session_id, source=source, parent=old.id),
        response=item.response and structs.replace(item.response, session_id=session_id),
    )


async def _steps_aside(db: Db, holder: Session) -> bool:
    """Give a session an id beside its own if it is a single message; return whether its id is free now."""
    if not holder.is_single_message or holder.first_message_hash is None:
        return False
    beside = subconversation_id(holder.id, holder.first_message_hash)
    query = "SELECT 1 FROM sessions WHERE tenant = ? AND id = ?"
    if await db.one(query, holder.tenant, beside):
        return False
    await _rename(db, holder.tenant, holder.id, beside, subconversation_source(holder.source, holder.id), holder.id)
    return True


async def _rename(db: Db, tenant: str, session_id: str, new_id: str, source: str, parent: str | None) -> None:
    """Give a session, if there is one, another id, with whatever belongs to it."""
    await db.run("PRAGMA defer_foreign_keys = ON")  # until the transaction is over
    renamed = await db.run(
        "UPDATE sessions SET id = ?, source = ?, parent = ? WHERE tenant = ? AND id = ?",
        new_id,
        source,
        parent,
        tenant,
        session_id,
    )
    if not renamed:
        return
    for table in TABLES_OF_SESSIONS:
        query = f"UPDATE {table} SET session_id = ? WHERE tenant = ? AND session_id = ?"
        await db.run(query, new_id, tenant, session_id)
    await ledger_rows.rename(db, tenant, "session", session_id, new_id)

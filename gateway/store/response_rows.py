"""The SQL of stored responses (Responses API). The caller owns the transaction."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from msgspec import structs

from gateway.records import StoredResponse
from gateway.store import transcript_rows
from gateway.store.database import Db
from gateway.store.types import TurnRecord

log = logging.getLogger(__name__)

# What a response repeats of its request: long, and mostly the same throughout a conversation.
_ECHOED = ("instructions", "tools")
_DROPPED_AT_ONCE = 100_000  # the others follow with the next response


async def record(db: Db, records: Sequence[TurnRecord], keep: int) -> None:
    """Store the responses of turns, and delete all but the last `keep` of each tenant.

    A response replaces an earlier one of the same id only in the same session: whatever made two ids equal, no session
    may overwrite another's response.
    """
    stored = [(item, item.response) for item in records if item.response]
    for item, response in stored:
        if await _is_of_another_session(db, response):
            log.warning(
                "a response of session %s is not stored: its id %.200r is that of another session's response",
                response.session_id, response.id,
            )  # fmt: skip
            continue
        transcript = await transcript_rows.add(db, item.messages) if item.messages else None
        await _add(
            db,
            structs.replace(
                response, transcript=transcript, request_input=await transcript_rows.add(db, item.request_input)
            ),
        )
    for tenant in {response.tenant for _, response in stored}:
        await _drop_oldest(db, tenant, keep)


async def _is_of_another_session(db: Db, new: StoredResponse) -> bool:
    query = "SELECT session_id FROM responses WHERE tenant = ? AND id = ?"
    row = await db.one(query, new.tenant, new.id)
    return row is not None and row[0] != new.session_id


async def _add(db: Db, new: StoredResponse) -> None:
    await delete_response(db, new.tenant, new.id)  # the same id again in its session: a retry
    answer = orjson.dumps({name: None if name in _ECHOED else value for name, value in new.answer.items()})
    echo = await transcript_rows.add_content(db, {name: new.answer[name] for name in _ECHOED if name in new.answer})
    number = await db.value(
        """INSERT INTO responses
        (tenant, id, session_id, lineage, created_at, answer, echo, instructed, transcript, request_input)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING number""",
        new.tenant, new.id, new.session_id, new.lineage, new.created_at, answer, echo, new.instructed, new.transcript,
        new.request_input,
    )  # fmt: skip
    # An id that belongs to another response's item stays with it.
    await db.many(
        "INSERT INTO response_items VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        [(new.tenant, item_id, number) for item_id in _items(new.answer)],
    )


def _items(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The items of a response by their ids."""
    output = answer.get("output")
    items = [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []
    return {item["id"]: item for item in items if isinstance(item.get("id"), str)}


async def response_items(db: Db, tenant: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return items of stored responses by their ids, without those that do not exist."""
    found: dict[str, dict[str, Any]] = {}
    for item_id in ids:
        if item_id not in found:
            row = await db.one(
                """SELECT answer FROM response_items JOIN responses USING (number)
                WHERE response_items.tenant = ? AND response_items.id = ?""",
                tenant,
                item_id,
            )
            found |= _items(orjson.loads(row[0])) if row else {}
    return {item_id: found[item_id] for item_id in ids if item_id in found}


async def response(db: Db, tenant: str, response_id: str) -> StoredResponse | None:
    """Return a stored response, or None."""
    row = await db.one(
        """SELECT session_id, lineage, created_at, answer, body, instructed, transcript, request_input
        FROM responses JOIN contents ON contents.id = echo WHERE tenant = ? AND responses.id = ?""",
        tenant,
        response_id,
    )
    if row is None:
        return None
    session_id, lineage, created_at, answer, echo, instructed, transcript, request_input = row
    full: Mapping[str, Any] = {**orjson.loads(answer), **orjson.loads(echo)}
    return StoredResponse(
        tenant, response_id, session_id, lineage, created_at, full, bool(instructed), transcript, request_input
    )


async def delete_response(db: Db, tenant: str, response_id: str) -> bool:
    """Delete a stored response; False if there is none. Responses that continue it stay."""
    return await _delete(
        db, await db.all("SELECT number FROM responses WHERE tenant = ? AND id = ?", tenant, response_id)
    )


async def delete_of_session(db: Db, tenant: str, session_id: str) -> None:
    await _delete(
        db, await db.all("SELECT number FROM responses WHERE tenant = ? AND session_id = ?", tenant, session_id)
    )


async def _drop_oldest(db: Db, tenant: str, keep: int) -> None:
    older = "SELECT number FROM responses WHERE tenant = ? ORDER BY number DESC LIMIT ? OFFSET ?"
    await _delete(db, await db.all(older, tenant, _DROPPED_AT_ONCE, keep))


async def _delete(db: Db, numbers: Iterable[tuple[int]]) -> bool:
    """Delete responses, and what only they referred to."""
    deleted = [
        await db.one("DELETE FROM responses WHERE number = ? RETURNING transcript, request_input, echo", *number)
        for number in list(numbers)
    ]
    for transcript, request_input, echo in deleted:
        await transcript_rows.release(db, transcript)
        await transcript_rows.release(db, request_input)
        await transcript_rows.release_content(db, echo)
    return bool(deleted)

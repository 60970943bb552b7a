"""The SQL that records turns: many at once, with a few statements for all of them. The caller owns the transaction."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

from msgspec import structs

from gateway.dialects.titles import title_of
from gateway.records import Session, subconversation_stem
from gateway.store import ledger_rows, salt_rows, session_name_rows, transcript_rows
from gateway.store.batch import Batch
from gateway.store.database import Db
from gateway.store.session_rows import ADD_PREFIX, ADD_SESSION, TURN_COLUMNS, session, session_values, sessions_by_ids
from gateway.store.sql import by_tenant, marks
from gateway.store.types import TurnRecord

_turn_values = attrgetter(*TURN_COLUMNS)
_ADDED = (*TURN_COLUMNS, "prompt_tokens", "completion_tokens", "cached_tokens", "fingerprint", "unbooked")
_ADD_TURN = f"INSERT INTO turns ({', '.join(_ADDED)}) VALUES ({marks(_ADDED)})"
# If the alias exists, the turn is a retry.
_ADD_ALIAS = """INSERT INTO reply_aliases VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (tenant, link, history, question, session_id)
        DO UPDATE SET reply_hash = excluded.reply_hash, marks = excluded.marks"""
_BESIDE = re.compile(r":[0-9a-f]{16}$")  # what the id of a conversation beside another one ends with
_OVERTAKEN = "the session was taken back to a window meanwhile: this turn is not part of it"


def lock_names(records: Iterable[TurnRecord]) -> Iterator[str]:
    """What `record` locks: the sessions, each with those beside it, which it may rename."""
    return (f"session {item.turn.tenant} {subconversation_stem(item.session.id).split(':')[0]}" for item in records)


async def record(db: Db, records: Sequence[TurnRecord], turns_kept: int) -> list[TurnRecord]:
    """Add turns and move their sessions on, which are created if they are new; keep each session's last turns.

    Returns the turns under the ids of the sessions that they belong to (`session_name_rows`).
    """
    if not records:
        return []
    by_conversation: dict[tuple[str, str, bytes | None], list[TurnRecord]] = {}
    for item in records:
        key = item.turn.tenant, item.turn.session_id, item.session.first_message_hash
        by_conversation.setdefault(key, []).append(item)
    # One that displaces another comes first, so that the other is recorded under its own id.
    conversations = sorted(by_conversation.values(), key=lambda items: not items[0].displaces)
    known = await _holders(db, conversations)
    recorded: list[TurnRecord] = []
    grown: set[tuple[str, str]] = set()  # sessions that may have more turns than are kept
    batch = Batch()
    for conversation in conversations:
        if known is None:  # what the one before has changed matters
            await batch.write(db)
        items, holder = await _settled(db, conversation, known)
        await _advance(db, batch, items, holder)
        for item in items:
            _add_turn(batch, item, _OVERTAKEN if _is_overtaken(item, holder) else "")
            _add_trace(batch, item)
        recorded += items
        if holder or len(items) > turns_kept:
            grown.add((items[0].turn.tenant, items[0].turn.session_id))
    await transcript_rows.finish(db, batch)
    await _prune_turns(db, grown, turns_kept)
    return recorded


async def _holders(db: Db, conversations: Sequence[Sequence[TurnRecord]]) -> dict[tuple[str, str], Session] | None:
    """The sessions that have the ids of these conversations; None if one conversation may change that of another."""
    keys = [(items[0].turn.tenant, items[0].turn.session_id) for items in conversations]
    stems = {(tenant, _BESIDE.sub("", subconversation_stem(session_id))) for tenant, session_id in keys}
    if conversations[0][0].displaces or len(stems) < len(keys):
        return None
    return await sessions_by_ids(db, keys)


async def _settled(
    db: Db, conversation: Sequence[TurnRecord], known: Mapping[tuple[str, str], Session] | None
) -> tuple[Sequence[TurnRecord], Session | None]:
    """The turns of a conversation under their session's id, and that session as it is now."""
    turn = conversation[0].turn
    key = turn.tenant, turn.session_id
    holder = await session(db, *key) if known is None else known.get(key)
    items = await session_name_rows.settled(db, conversation, holder)
    if items[0].displaces or items is not conversation:  # it may be that of another id now
        holder = await session(db, turn.tenant, items[0].turn.session_id)
    return items, holder


async def _advance(db: Db, batch: Batch, items: Sequence[TurnRecord], old: Session | None) -> None:
    """Move a session on to its last turn with a known reply, whose transcript contains those before or replaces them.

    Turns that it has overtaken (`_is_overtaken`) only count. Without an `old` one it is created.
    """
    turn = items[0].turn
    valid = [item for item in items if not _is_overtaken(item, old)]
    replied = [item for item in valid if item.messages is not None]
    values = _values_of_turns(items, valid)
    if replied:
        last = replied[-1]
        transcript = await transcript_rows.extend(db, batch, last.messages or (), old.transcript if old else None)
        frame = transcript_rows.add_frame(batch, last.frame, old.frame if old else None)
        values |= _values_of_replies(replied, transcript, frame)
    if old:
        values |= {"turn_count": sum(item.messages is not None for item in items)}
        batch.add(_update_of(*values), [(turn.tenant, turn.session_id, *values.values())])
    else:  # new, or just deleted, with what it had
        _create(batch, items[0], values)
    # A turn that failed may have left KV too. The salt of the session's last turn is recorded already.
    salts = dict.fromkeys(item.salt for item in items if item.salt and item.salt != (old.salt if old else ""))
    batch.add(salt_rows.USE, [(salt, turn.tenant, turn.session_id) for salt in salts])


def _is_overtaken(item: TurnRecord, session: Session | None) -> bool:
    """Whether a turn began before its session was taken back to a window, and ended after that."""
    return session is not None and item.session.rewinds < session.rewinds


def _values_of_turns(items: Sequence[TurnRecord], valid: Sequence[TurnRecord]) -> dict[str, Any]:
    """What any turns change in their session's row, and what those change that it has not overtaken."""
    values: dict[str, Any] = {
        "last_active_at": max(item.turn.started_at + item.turn.duration_ms / 1000 for item in items)
    }
    if not valid:
        return values
    last = valid[-1]
    return values | {
        "first_message_hash": next((i.trace.first_message_hash for i in valid if i.trace.first_message_hash), None),
        "last_request_hash": last.trace.request_hash or None,
        "answered": last.messages is not None,
    }


def _values_of_replies(replied: Sequence[TurnRecord], transcript: bytes | None, frame: bytes | None) -> dict[str, Any]:
    """What turns with a known reply change besides."""
    last = replied[-1]
    turn, usage = last.turn, last.turn.usage
    return {
        "turn_count": len(replied), "state": "active", "model": turn.model, "fingerprint": last.fingerprint,
        "salt": last.salt, "token_count": usage.prompt + usage.completion if usage else None,
        "prompt_tokens": usage.prompt if usage else None, "transcript": transcript, "frame": frame,
        "last_reply_hash": last.trace.reply_hash, "engine": turn.engine, "normalised": last.normalised,
        "title": title_of(last.messages or ()),
    }  # fmt: skip


def _create(batch: Batch, first: TurnRecord, values: Mapping[str, Any]) -> None:
    turn, session = first.turn, first.session
    initial = {"model": turn.model} | {name: value for name, value in values.items() if value is not None}
    new = Session(
        turn.tenant, turn.session_id, session.lineage, source=session.source, parent=session.parent,
        created_at=turn.started_at, **initial,
    )  # fmt: skip
    batch.add(ADD_SESSION, [session_values(new)])


# How a value changes an existing row; any other replaces what is there.
_COMBINED = {
    "last_active_at": "CASE WHEN last_active_at > {0} THEN last_active_at ELSE {0} END",
    "first_message_hash": "coalesce(first_message_hash, {0})",
    "turn_count": "turn_count + {0}",
    "token_count": "coalesce({0}, token_count)",
    "prompt_tokens": "coalesce({0}, prompt_tokens)",
    # A successor begins in the middle of the conversation.
    "title": "coalesce(CASE WHEN source = 'successor' THEN title END, {0})",
}


@cache
def _update_of(*names: str) -> str:
    changes = ", ".join(
        f"{name} = {_COMBINED.get(name, '{0}').format(f'?{mark}')}" for mark, name in enumerate(names, start=3)
    )
    return f"UPDATE sessions SET {changes} WHERE tenant = ?1 AND id = ?2"


def _add_trace(batch: Batch, item: TurnRecord) -> None:
    turn, trace = item.turn, item.trace
    links = (trace.request_hash, trace.reply_hash)
    batch.add(ADD_PREFIX, [(turn.tenant, link, turn.session_id) for link in links if link])
    aliases = [(turn.tenant, *alias[:3], turn.session_id, trace.reply_hash, alias.marks) for alias in trace.aliases]
    batch.add(_ADD_ALIAS, aliases)


def _add_turn(batch: Batch, item: TurnRecord, remark: str) -> None:
    turn, usage = item.turn, item.turn.usage
    values = (
        *_turn_values(structs.replace(turn, detail=turn.detail or remark) if remark else turn),
        *((usage.prompt, usage.completion, usage.cached) if usage else (None, None, None)),
        item.fingerprint,
        ledger_rows.is_booked_later(item),
    )
    batch.add(_ADD_TURN, [values])


async def _prune_turns(db: Db, sessions: Iterable[tuple[str, str]], keep: int) -> None:
    for tenant, ids in by_tenant(sessions).items():
        query = f"""SELECT session_id FROM turns WHERE tenant = ? AND session_id IN ({marks(ids)})
            GROUP BY session_id HAVING count(*) > ?"""
        for (session_id,) in await db.all(query, tenant, *ids, keep):
            await _prune(db, tenant, session_id, keep)


async def _prune(db: Db, tenant: str, session_id: str, keep: int) -> None:
    query = "SELECT id FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
    last = await db.value(query, tenant, session_id, keep)
    if await ledger_rows.has_unbooked(db, last):
        await ledger_rows.book_turns(db)
    await db.run("DELETE FROM turns WHERE tenant = ? AND session_id = ? AND id <= ?", tenant, session_id, last)

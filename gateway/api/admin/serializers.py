"""Convert records to JSON, with the same field names in every answer."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gateway.api.admin.models import responses
from gateway.dialects.turns import Turns
from gateway.kv.keys import ObjectKey
from gateway.kv.memory import MEMORY_TIER
from gateway.records import Message, PinnedObject, Session, Sizes, Turn, Window
from gateway.store.types import Saved
from gateway.windows.ask import Answer

Present = Mapping[str, set[str]]  # the objects that LMCache finds in each tier
_NEARLY_FULL = 0.95  # of the context limit


def moment(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat("T", "milliseconds")


def moment_or_null(seconds: float | None) -> str | None:
    """The same, or None for None."""
    return None if seconds is None else moment(seconds)


def paging(count: int, total: int, limit: int, offset: int) -> dict[str, Any]:
    """The position of a page of a list."""
    return {"total": total, "has_more": offset + count < total, "limit": limit, "offset": offset}


def saved(s: Saved) -> responses.Saved:
    """What the cache saved."""
    return responses.Saved.model_validate(s)


def session_fields(s: Session, expired_by: float) -> dict[str, Any]:
    """A session; `expired` if it was last active before `expired_by`."""
    return {
        "id": s.id,
        "title": s.title,
        "state": "expired" if s.last_active_at < expired_by else s.state,
        "model": s.model,
        "token_count": s.token_count,
        "turn_count": s.turn_count,
        "lineage": s.lineage,
        "recognised_by": s.source,
        "forked_from": s.parent,
        "successor": s.successor,
        "window": s.window,
        "engine": s.engine or None,
        "normalised": s.normalised.split(),
        "created_at": moment(s.created_at),
        "last_active_at": moment(s.last_active_at),
        "frozen_at": moment_or_null(s.frozen_at),
    }


def context_limit_warnings(tokens: int, limit: int | None) -> list[str]:
    """A warning if a context is near its limit, or full."""
    if not limit or tokens < limit * _NEARLY_FULL:
        return []
    if tokens >= limit:
        return [f"the context is full: {tokens} of {limit} tokens; freeze the session and continue in another one"]
    share = tokens * 100 // limit
    return [f"the context is nearly full: {tokens} of {limit} tokens ({share}%); freeze it before it is"]


def estimates(report: Mapping[str, Any] | None) -> responses.Estimates | None:
    """How a model's tokens are estimated; None if none were so far."""
    return responses.Estimates(**report) if report else None


def turn(t: Turn) -> responses.Turn:
    """A turn."""
    return responses.Turn(
        started_at=moment(t.started_at),
        duration_ms=round(t.duration_ms, 1),
        first_token_ms=None if t.first_token_ms is None else round(t.first_token_ms, 1),
        model=t.model,
        outcome=t.outcome,
        status=t.status,
        prompt_tokens=t.usage.prompt if t.usage else None,
        completion_tokens=t.usage.completion if t.usage else None,
        cached_tokens=t.usage.cached if t.usage else None,
        detail=t.detail,
        recognised_by=t.source,
        engine=t.engine or None,
        estimated_tokens=t.estimated_tokens,
        expected_cached_tokens=t.expected_tokens,
        miss=t.miss or None,
    )


def ask_receipt(answer: Answer) -> responses.AskReceipt:
    """What an answer cost."""
    return responses.AskReceipt(
        prompt_tokens=answer.usage.prompt,
        cached_tokens=answer.usage.cached,
        computed_tokens=answer.computed_tokens,
        completion_tokens=answer.usage.completion,
        chunks_expected=answer.restored.chunks_expected,
        chunks_found=answer.restored.chunks_found,
        expected_cached_tokens=answer.restored.expected_cached_tokens,
        at_turn=answer.restored.at_turn,
        partial=answer.restored.partial,
        duration_ms=answer.duration_ms,
        saved=saved(answer.saved) if answer.saved else None,
    )


def window_line_fields(w: Window, now: float) -> dict[str, Any]:
    """A window in a list."""
    return {
        "name": w.name,
        "title": w.title,
        "session_id": w.session_id,
        "model": w.model,
        "description": w.description,
        "tags": list(w.tags),
        "token_count": w.token_count,
        "size_bytes": w.size_bytes,
        "kv": w.kv,
        "parent_window": w.parent,
        "state": "expired" if w.has_expired(now) else "frozen",
        "created_at": moment(w.created_at),
        "expires_at": moment_or_null(w.expires_at),
    }


def window_fields(w: Window, now: float) -> dict[str, Any]:
    """A window with its receipt."""
    return {**window_line_fields(w, now), "block_count": w.chunk_count * w.world_size, "receipt": dict(w.receipt)}


def window_status_fields(w: Window, now: float, pinned: Sizes, present: Present) -> dict[str, Any]:
    """A window, and where its bytes are now: in pins, and in the tiers where LMCache finds them."""
    tiers = {
        name: {
            "pinned": len(pinned.get(name, {})),
            "pinned_bytes": sum(pinned.get(name, {}).values()),
            "present": len(present.get(name, set())),
        }
        for name in dict.fromkeys([*pinned, *present])
    }
    first = next((name for name, tier in tiers.items() if tier["present"]), None)
    return {
        **window_fields(w, now),
        "kv_cache": {
            "block_count": w.chunk_count * w.world_size,
            "total_size_bytes": w.size_bytes,
            "storage_tier": first or next((name for name, tier in tiers.items() if tier["pinned"]), None),
            "tiers": tiers,
        },
        "timestamps": {"created_at": moment(w.created_at), "expires_at": moment_or_null(w.expires_at)},
    }


def transcript(messages: Sequence[Message], frame: Mapping[str, Any] | None) -> dict[str, Any]:
    """A transcript, each message with its turn. A text has no turns."""
    turns = Turns.of(messages)
    numbers: Sequence[int | None] = turns.numbers or [None] * len(messages)
    rows = [{**message, "turn": number} for message, number in zip(messages, numbers, strict=True)]
    return {"messages": rows, "turns": len(turns.ends), "frame": dict(frame or {})}


def blocks(objects: Sequence[PinnedObject], present: Present) -> list[dict[str, Any]]:
    """Every KV object of a window, in chunk order."""
    out: dict[str, dict[str, Any]] = {}
    in_memory = present.get(MEMORY_TIER, set())
    for o in objects:
        key = ObjectKey.parse(o.key)
        block = out.setdefault(
            o.key,
            {
                "hash": key.chunk_hash,
                "rank": key.rank,
                "size_bytes": o.size,
                "pinned": {},
                "present": [MEMORY_TIER] if o.key in in_memory else [],
            },
        )
        block["pinned"][o.tier] = o.checksum.hex()
        if o.key in present.get(o.tier, set()):
            block["present"].append(o.tier)
    return list(out.values())

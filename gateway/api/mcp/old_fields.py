"""The answers of the tools with the fields of the replaced system beside ours, so that its scripts find them.

Ours are in the tools' output schemas. These only repeat or summarise them, so no schema has them; docs/mcp.md and
docs/coming-from-cwm-mcp.md list them.
"""

from datetime import UTC, datetime

from gateway.api.mcp.admin_request import Json


def frozen(answer: Json) -> Json:
    """A new window."""
    name, tokens, blocks = answer["name"], answer["token_count"], answer["block_count"]
    return {
        **answer,
        "window_name": name,
        "total_size_bytes": answer["size_bytes"],
        "storage_tier": next(iter(answer["receipt"].get("tiers", ())), None),
        "message": f"session {answer['session_id']} is saved as window {name}: {tokens} tokens, {blocks} blocks",
    }


def thawed(answer: Json) -> Json:
    """A new session. `cache_hit` and `cache_efficiency` are null unless the engine was asked (`warm_cache`)."""
    receipt, session_id = answer["receipt"], answer["session_id"]
    cached = receipt["cached_tokens"]
    share = None if cached is None or not receipt["prompt_tokens"] else round(cached / receipt["prompt_tokens"], 2)
    return {
        **answer,
        "partial": receipt["partial"],
        "warning": "; ".join(answer["warnings"]) or None,
        "restoration_time_ms": receipt["duration_ms"],
        "cache_hit": None if cached is None else cached > 0,
        "cache_efficiency": share,
        "blocks_expected": receipt["chunks_expected"],
        "blocks_found": receipt["chunks_found"],
        "model_compatible": None if receipt.get("as_text") else True,  # else another is refused: model_mismatch
        "message": f"window {answer['window_name']} is restored into session {session_id}",
        "instructions": f"continue with the header X-Session-ID: {session_id}, or at the base URL /s/{session_id}/v1",
    }


def cloned(answer: Json) -> Json:
    """A clone, and the windows that it descends from."""
    source, target = answer["source_window"], answer["target_window"]
    return {
        **answer,
        "new_window_name": target,
        "total_size_bytes": answer["size_bytes"],
        "lineage": answer.get("ancestors", [])[::-1],
        "message": f"window {source} is cloned as {target}, with {answer['shared_blocks']} shared blocks",
        "instructions": f"restore it with window_thaw, window_name {target}",
    }


def deleted(answer: Json) -> Json:
    """What a deletion did."""
    return {**answer, "message": f"window {answer['window_name']} is deleted"}


def windows(answer: Json) -> Json:
    """A page of windows; what each has saved is in window_status, a page of it would be long."""
    lines = [{**_without_saved(one), "total_size_bytes": one["size_bytes"]} for one in answer["windows"]]
    return {**answer, "windows": lines, **_page(answer, len(lines))}


def sessions(answer: Json) -> Json:
    """A page of sessions, like one of windows."""
    lines = [_without_saved(one) for one in answer["sessions"]]
    return {**answer, "sessions": lines, **_page(answer, len(lines))}


def _without_saved(answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name != "saved"}


def _page(answer: Json, count: int) -> Json:
    total, limit, offset = answer["total"], answer["limit"], answer["offset"]
    return {
        "count": count,
        "page": offset // limit + 1,
        "total_pages": -(-total // limit),
        "has_next": answer["has_more"],
        "has_prev": offset > 0,
    }


_OF_WINDOW = (
    "name", "session_id", "description", "tags", "block_count", "model", "token_count", "created_at", "parent_window"
)  # fmt: skip
_OF_SESSION = ("id", "state", "model", "token_count", "created_at", "frozen_at")


def status(answer: Json) -> Json:
    """The status of a window or of a session, also nested under what it is."""
    return _window_status(answer) if "kv_cache" in answer else _session_status(answer)


def _window_status(answer: Json) -> Json:
    size = answer["size_bytes"]
    nested = {**{name: answer[name] for name in _OF_WINDOW}, "total_size_bytes": size}
    times = {**answer["timestamps"], "frozen_at": answer["created_at"]}
    more = {"id": answer["name"], "total_size_bytes": size, "timestamps": times, "window": nested}
    return {"type": "window", **answer, **more, **_lineage(answer)}


def _lineage(answer: Json) -> Json:
    if "lineage" not in answer:
        return {}
    lineage = answer["lineage"]
    ancestors = lineage["ancestors"]
    more = {
        "is_clone": bool(ancestors),
        "depth": len(ancestors),
        "parent_window": lineage["parent"],
        "root_window": ancestors[-1] if ancestors else answer["name"],
    }
    return {"lineage": {**lineage, **more}}


def _session_status(answer: Json) -> Json:
    times = {"created_at": answer["created_at"], "updated_at": answer["last_active_at"]}
    nested = {**{name: answer[name] for name in _OF_SESSION}, "updated_at": answer["last_active_at"]}
    more = {"timestamps": {**times, "frozen_at": answer["frozen_at"]}, "window_count": len(answer["windows"])}
    return {"type": "session", **answer, **more, "session": nested}


def status_cache_stats(answer: Json) -> Json:
    """A summary of a window's KV; of a session's prompt tokens, in the turns that its status shows."""
    if "kv_cache" in answer:
        return _window_cache_stats(answer)
    counted = [turn for turn in answer["turns"] if turn["prompt_tokens"] and turn["cached_tokens"] is not None]
    prompt, cached = (sum(turn[name] for turn in counted) for name in ("prompt_tokens", "cached_tokens"))
    hit_rate = round(cached / prompt, 4) if prompt else None
    count = len(answer["windows"])
    return {"prompt_tokens": prompt, "cached_tokens": cached, "hit_rate": hit_rate, "window_count": count}


def _window_cache_stats(answer: Json) -> Json:
    blocks, tiers = answer["kv_cache"]["block_count"], answer["kv_cache"]["tiers"].values()
    available = max((max(tier["pinned"], tier["present"]) for tier in tiers), default=0)  # a thaw restores pinned ones
    return {
        "stored": blocks > 0,
        "token_count": answer["token_count"],
        "block_count": blocks,
        "blocks_available": available,
        "cache_complete": answer["kv"] == "complete" and available >= blocks,
        "created_at": answer["created_at"],
    }


def cache_stats(answer: Json) -> Json:
    """The answer of GET /admin/cache, and the totals of its durable tiers. Hits and misses count prompt tokens.

    Scripts format the hit rate of `kv_store` as a number: it is 0 of 0 before the first prompt, where ours is null.
    """
    tiers = [tier for tier in answer["tiers"].values() if "pinned" in tier]
    blocks, size = (sum(tier[name] for tier in tiers) for name in ("objects", "bytes"))
    hit_rate, cached = answer["hit_rate"], answer["cached_tokens"]
    totals = {"total_blocks": blocks, "total_bytes": size}
    counted = {"hits": cached, "misses": answer["prompt_tokens"] - cached}
    kv_store = {**totals, "total_size_bytes": size, "hit_rate": hit_rate or 0.0, **counted}
    vllm = {"connected": answer.get("engines_up", 0) > 0, "hit_rate": hit_rate, "cached_tokens": cached}
    return {**totals, **answer, "kv_store": kv_store, "vllm": vllm}


def health(answer: Json) -> Json:
    """The components as a list, and `by_name`. If there is only one, also its status and message."""
    by_name, now = answer["components"], datetime.now(UTC).isoformat(timespec="milliseconds")
    components = [_component(name, one, now) for name, one in by_name.items()]
    only = {} if len(components) != 1 else {key: components[0][key] for key in ("name", "status", "message")}
    return {**answer, "timestamp": now, **only, "components": components, "by_name": by_name}


def _component(name: str, component: Json, now: str) -> Json:
    plain = {key: component[key] for key in ("status", "message", "latency_ms")}
    details = {key: component[key] for key in component if key not in plain}
    return {"name": name, **plain, "last_check": now, "metadata": details}

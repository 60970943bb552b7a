"""What tools answer, as JSON schemas: what is named is always there, and there may be more."""

from gateway.edge.mcp_params import Json


def object(about: str = "", **properties: Json) -> Json:
    schema: Json = {"type": "object", "properties": properties, "required": list(properties)}
    return {**schema, "description": about} if about else schema


def list_of(item: Json, about: str = "") -> Json:
    schema: Json = {"type": "array", "items": item}
    return {**schema, "description": about} if about else schema


def or_null(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer"}
WARNINGS = list_of(TEXT, "what did not go as it should; read these")
LINE = {
    "name": TEXT,
    "session_id": TEXT,
    "model": TEXT,
    "description": TEXT,
    "tags": list_of(TEXT),
    "token_count": WHOLE,
    "size_bytes": WHOLE,
    "kv": {"type": "string", "description": "how much of its KV is pinned; `absent`: a thaw computes it anew"},
    "parent_window": or_null(TEXT),
    "created_at": TEXT,
    "expires_at": or_null(TEXT),
}
FROZEN = {**LINE, "state": TEXT, "block_count": WHOLE, "receipt": object("what was seen when it was frozen")}
PAGE = {"total": WHOLE, "has_more": {"type": "boolean"}, "limit": WHOLE, "offset": WHOLE}
METRIC = object(name=TEXT, type=TEXT, labels=object(), value={"type": "number"})


def typed(answer: Json) -> Json:
    """A status says of what it is."""
    return {"type": "window" if "kv_cache" in answer else "session", **answer}


def cache_stats(answer: Json) -> Json:
    """The numbers of the cache, out of all numbers."""

    def total(name: str, **labels: str) -> int:
        rows = (m for m in answer["metrics"] if m["name"] == name and labels.items() <= m["labels"].items())
        return int(sum(m["value"] for m in rows))

    names = sorted({m["labels"]["tier"] for m in answer["metrics"] if m["name"] == "cwg_pinned_objects"})
    prompt, cached = total("cwg_prompt_tokens_total"), total("cwg_cached_tokens_total")
    return {
        "windows": total("cwg_windows"),
        "total_blocks": total("cwg_pinned_objects"),
        "total_bytes": total("cwg_pinned_bytes"),
        "tiers": {
            t: {"blocks": total("cwg_pinned_objects", tier=t), "bytes": total("cwg_pinned_bytes", tier=t)}
            for t in names
        },
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "hit_rate": round(cached / prompt, 4) if prompt else None,
    }

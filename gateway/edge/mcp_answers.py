"""What tools answer, as JSON schemas: what is named is always there, and there may be more."""

from gateway.edge.mcp_params import Json


def shape_of(about: str = "", /, **properties: Json) -> Json:
    """An object that has at least these properties."""
    schema: Json = {"type": "object", "properties": properties, "required": list(properties)}
    return {**schema, "description": about} if about else schema


def list_of(item: Json, about: str = "") -> Json:
    """A list of such items."""
    schema: Json = {"type": "array", "items": item}
    return {**schema, "description": about} if about else schema


def or_null(schema: Json) -> Json:
    """The same, or null."""
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
    "state": TEXT,
    "created_at": TEXT,
    "expires_at": or_null(TEXT),
}
_FROZEN = {**LINE, "block_count": WHOLE, "receipt": shape_of("what was seen when it was frozen")}
PAGE = {"total": WHOLE, "has_more": {"type": "boolean"}, "limit": WHOLE, "offset": WHOLE}
METRIC = shape_of(name=TEXT, type=TEXT, labels=shape_of(), value={"type": "number"})


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


THAWED = shape_of(
    session_id=TEXT,
    window_name=TEXT,
    model=TEXT,
    token_count=WHOLE,
    cache_salt=TEXT,
    receipt=shape_of("what was found when thawing"),
    warnings=WARNINGS,
)
WINDOWS = shape_of(windows=list_of(shape_of(**LINE)), **PAGE)
STATUS = shape_of(type={"type": "string", "enum": ["window", "session"]}, model=TEXT, token_count=WHOLE, state=TEXT)
CLONED = shape_of(source_window=TEXT, target_window=TEXT, shared_blocks=WHOLE, **_FROZEN)
DELETED = shape_of(window_name=TEXT, blocks_deleted=WHOLE, space_freed_bytes=WHOLE)
SESSIONS = shape_of(
    sessions=list_of(shape_of(id=TEXT, state=TEXT, model=TEXT, token_count=WHOLE, created_at=TEXT)), **PAGE
)
CACHE = shape_of(
    windows=WHOLE,
    total_blocks=WHOLE,
    total_bytes=WHOLE,
    tiers=shape_of(),
    prompt_tokens=WHOLE,
    cached_tokens=WHOLE,
    hit_rate={"type": ["number", "null"]},
)
HEALTH = shape_of(status=TEXT, components=shape_of("each with its status and message"))
METRICS: Json = {
    "type": "object",
    "properties": {"format": TEXT, "metrics": list_of(METRIC), "content": TEXT},
    "required": ["format"],
}
FROZEN = shape_of(**_FROZEN, warnings=WARNINGS)

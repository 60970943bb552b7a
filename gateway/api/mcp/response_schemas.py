"""What tools answer, as JSON schemas: what is named is always there, and there may be more."""

from typing import get_args

from gateway.api.mcp.parameters import Json
from gateway.records import KvState


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
NUMBER: Json = {"type": "number"}
FLAG: Json = {"type": "boolean"}
WARNINGS = list_of(TEXT, "what did not go as it should; read these")
KV = {
    "type": "string",
    "enum": [*get_args(KvState)],
    "description": "how much of its KV is pinned; `absent`: a thaw computes it anew",
}
LINE = {
    "name": TEXT,
    "session_id": TEXT,
    "model": TEXT,
    "description": TEXT,
    "tags": list_of(TEXT),
    "token_count": WHOLE,
    "size_bytes": WHOLE,
    "kv": KV,
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
    """What GET /admin/cache says, and the sum of its tiers."""
    tiers = answer["tiers"].values()
    total = {
        "total_blocks": sum(tier["objects"] for tier in tiers),
        "total_bytes": sum(tier["bytes"] for tier in tiers),
    }
    return {**total, **answer}


def policy(answer: Json) -> Json:
    """The rules apart from what is said of them."""
    about: Json = {name: answer[name] for name in ("set_at_run_time", "available", "warnings") if name in answer}
    rules = {name: value for name, value in answer.items() if name not in about}
    return {"policy": rules, "warnings": [], **about}


_RECEIPT = {"chunks_expected": WHOLE, "chunks_found": WHOLE, "partial": FLAG, "duration_ms": NUMBER}
_RESTORED = shape_of("what was found when restoring", **_RECEIPT)
_PROMPT = {"prompt_tokens": WHOLE, "cached_tokens": or_null(WHOLE)}
THAWED = shape_of(
    session_id=TEXT,
    window_name=TEXT,
    model=TEXT,
    token_count=WHOLE,
    cache_salt=TEXT,
    receipt=shape_of("what was found when thawing", **_RECEIPT, **_PROMPT),
    warnings=WARNINGS,
)
WINDOWS = shape_of(windows=list_of(shape_of(**LINE)), **PAGE)
_ALWAYS = shape_of(type={"type": "string", "enum": ["window", "session"]}, model=TEXT, token_count=WHOLE, state=TEXT)
_OF_WINDOW = {"kv_cache": shape_of("blocks and bytes, by tier"), "receipt": shape_of(), "warnings": WARNINGS}
_OF_SESSION = {"context_limit": or_null(WHOLE), "turns": list_of(shape_of()), "windows": list_of(TEXT)}
STATUS = {**_ALWAYS, "properties": {**_ALWAYS["properties"], **_OF_WINDOW, **_OF_SESSION}}
CLONED = shape_of(source_window=TEXT, target_window=TEXT, shared_blocks=WHOLE, **_FROZEN)
DELETED = shape_of(window_name=TEXT, blocks_deleted=WHOLE, space_freed_bytes=WHOLE)
SESSIONS = shape_of(
    sessions=list_of(shape_of(id=TEXT, state=TEXT, model=TEXT, token_count=WHOLE, created_at=TEXT)), **PAGE
)
CACHE = shape_of(
    windows=WHOLE,
    total_blocks=WHOLE,
    total_bytes=WHOLE,
    tiers=shape_of("for each: objects and bytes, of those windows', sessions' and nobody's"),
    lmcache=shape_of(status=TEXT),
    prompt_tokens=WHOLE,
    cached_tokens=WHOLE,
    hit_rate=or_null(NUMBER),
    warnings=WARNINGS,
)
ANSWERED = shape_of(
    window_name=TEXT,
    model=TEXT,
    answer=TEXT,
    reasoning=or_null(TEXT),
    finish_reason={"type": ["string", "null"], "description": "`stop`, or `length`: cut at max_tokens"},
    receipt=shape_of("what it cost", **_RECEIPT, **_PROMPT, computed_tokens=or_null(WHOLE)),
    warnings=WARNINGS,
)
VERIFIED = shape_of(
    window_name=TEXT,
    ok=FLAG,
    kv=KV,
    chunks_expected=WHOLE,
    chunks_pinned=WHOLE,
    chunks_usable=WHOLE,
    tiers=shape_of("what was found in each"),
    damaged=list_of(shape_of(hash=TEXT, state=TEXT), "objects that are not as they were"),
    deep={
        **or_null(list_of(shape_of(tier=TEXT, equal=FLAG))),
        "description": "with `deep`, what each tier's KV led to",
    },
    warnings=WARNINGS,
)
PREFETCHED = shape_of(window_name=TEXT, receipt=_RESTORED, warnings=WARNINGS)
EVICTED = shape_of(
    window_name=TEXT,
    objects=WHOLE,
    tiers=shape_of("objects `before` and `after`, by tier"),
    kept=WHOLE,
    warnings=WARNINGS,
)
FANNED_OUT = shape_of(window_name=TEXT, model=TEXT, token_count=WHOLE, kv=KV, sessions=list_of(TEXT), warnings=WARNINGS)
_ORIGIN = or_null(shape_of("where it came from", kind=TEXT, name=TEXT))
_NODE = shape_of(
    kind=TEXT,
    name=TEXT,
    state=TEXT,
    model=TEXT,
    token_count=WHOLE,
    created_at=TEXT,
    parent=_ORIGIN,
    relation=or_null(TEXT),
)
TREE = shape_of(nodes=list_of(_NODE, "oldest first"), windows=WHOLE, sessions=WHOLE, truncated=FLAG, limit=WHOLE)
SESSION_DELETED = shape_of(
    session_id=TEXT, deleted=FLAG, blocks_deleted=WHOLE, space_freed_bytes=WHOLE, warnings=WARNINGS
)
POLICY = shape_of(
    policy=shape_of("the rules as they are now", enabled=FLAG),
    set_at_run_time=list_of(TEXT, "rules that differ from the settings' because they were set here or by an admin"),
    available=list_of(TEXT, "what `policies` may use"),
    warnings=WARNINGS,
)
_OPINION = shape_of(policy=TEXT, reason=or_null(TEXT), error=or_null(TEXT))
CHECKED = shape_of(
    session_id=TEXT,
    triggered=FLAG,
    reason=or_null(TEXT),
    held_back=or_null(TEXT),
    window_name=or_null(TEXT),
    token_count=WHOLE,
    context_limit=or_null(WHOLE),
    threshold_percent=or_null(NUMBER),
    idle_seconds=NUMBER,
    policies=list_of(_OPINION, "what each says"),
)
HEALTH = shape_of(status=TEXT, components=shape_of("each with its status and message"))
METRICS: Json = {
    "type": "object",
    "properties": {"format": TEXT, "metrics": list_of(METRIC), "content": TEXT},
    "required": ["format"],
}
FROZEN = shape_of(**_FROZEN, warnings=WARNINGS)
DESCRIBED = shape_of(**_FROZEN)

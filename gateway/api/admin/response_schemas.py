"""What the admin API answers, as JSON schemas. They are closed: what is not named here is never answered."""

from typing import get_args

from gateway.api.admin.schema import (  # fmt: skip
    ANYTHING,
    FLAG,
    MOMENT,
    NUMBER,
    TEXT,
    WHOLE,
    Json,
    by_name,
    list_of,
    or_null,
    shape,
    word,
)
from gateway.api.health import COMPONENTS
from gateway.records import KvState, Outcome, SessionState
from gateway.windows.tree import Kind, Relation

WARNINGS = list_of(TEXT, "what did not go as it should")
KV = word(*get_args(KvState), about="how much of its KV is pinned; `absent`: a thaw computes it anew")
_PAGE = {"total": WHOLE, "has_more": FLAG, "limit": WHOLE, "offset": WHOLE}
_TEXT_OR_NULL, _WHOLE_OR_NULL, _NUMBER_OR_NULL = or_null(TEXT), or_null(WHOLE), or_null(NUMBER)

ERROR = shape(
    error=shape(code=TEXT, message=TEXT, hint=TEXT, retryable=FLAG, details=ANYTHING),
)

_SESSION: dict[str, Json] = {
    "id": TEXT,
    "state": word(*get_args(SessionState)),
    "model": TEXT,
    "token_count": WHOLE,
    "turn_count": WHOLE,
    "lineage": TEXT,
    "recognised_by": TEXT,
    "forked_from": _TEXT_OR_NULL,
    "successor": _TEXT_OR_NULL,
    "window": _TEXT_OR_NULL,
    "engine": _TEXT_OR_NULL,
    "normalised": list_of(TEXT),
    "created_at": MOMENT,
    "last_active_at": MOMENT,
    "frozen_at": or_null(MOMENT),
}
_ESTIMATES = or_null(
    shape(
        "how its model's tokens are estimated, and how wrong that was",
        source=TEXT,
        exact=FLAG,
        why=TEXT,
        bytes_per_token=_NUMBER_OR_NULL,
        tokens_around_a_message=NUMBER,
        prompts=WHOLE,
        mean_error=_NUMBER_OR_NULL,
        p95_error=_NUMBER_OR_NULL,
        mean_error_of_new=_NUMBER_OR_NULL,
        p95_error_of_new=_NUMBER_OR_NULL,
    )
)
_TURN = shape(
    started_at=MOMENT,
    duration_ms=NUMBER,
    model=TEXT,
    outcome=word(*get_args(Outcome)),
    status=WHOLE,
    prompt_tokens=_WHOLE_OR_NULL,
    completion_tokens=_WHOLE_OR_NULL,
    cached_tokens=_WHOLE_OR_NULL,
    detail=TEXT,
    recognised_by=TEXT,
    engine=_TEXT_OR_NULL,
    estimated_tokens=_WHOLE_OR_NULL,
    expected_cached_tokens=_WHOLE_OR_NULL,
    miss=_TEXT_OR_NULL,
)
SESSIONS = shape(sessions=list_of(shape(**_SESSION)), **_PAGE)
SESSION = shape(
    **_SESSION,
    context_limit=_WHOLE_OR_NULL,
    estimates=_ESTIMATES,
    turns=list_of(_TURN, "newest first"),
    windows=list_of(TEXT),
    warnings=WARNINGS,
)
SESSION_DELETED = shape(session_id=TEXT, deleted=FLAG, blocks_deleted=WHOLE, space_freed_bytes=WHOLE, warnings=WARNINGS)

_LINE: dict[str, Json] = {
    "name": TEXT,
    "session_id": TEXT,
    "model": TEXT,
    "description": TEXT,
    "tags": list_of(TEXT),
    "token_count": WHOLE,
    "size_bytes": WHOLE,
    "kv": KV,
    "parent_window": _TEXT_OR_NULL,
    "state": word("frozen", "expired"),
    "created_at": MOMENT,
    "expires_at": or_null(MOMENT),
}
_WINDOW = {
    **_LINE,
    "block_count": WHOLE,
    "receipt": {**ANYTHING, "description": "what was seen when it was frozen or imported"},
}
_TIER = shape(pinned=WHOLE, pinned_bytes=WHOLE, present=WHOLE)
_BLOCK = shape(
    hash=TEXT,
    rank=WHOLE,
    size_bytes=WHOLE,
    pinned=by_name(TEXT, "checksum in each tier where it is pinned"),
    present=list_of(TEXT, "tiers where LMCache finds it"),
)
WINDOWS = shape(windows=list_of(shape(**_LINE)), **_PAGE)
WINDOW = shape(**_WINDOW)
FROZEN = shape(**_WINDOW, warnings=WARNINGS)
STATUS = shape(
    **_WINDOW,
    kv_cache=shape(
        block_count=WHOLE,
        total_size_bytes=WHOLE,
        storage_tier=_TEXT_OR_NULL,
        tiers=by_name(_TIER),
    ),
    timestamps=shape(created_at=MOMENT, expires_at=or_null(MOMENT)),
    warnings=WARNINGS,
    optional={
        "blocks": list_of(_BLOCK, "in chunk order"),
        "lineage": shape(parent=_TEXT_OR_NULL, ancestors=list_of(TEXT), clones=list_of(TEXT)),
    },
)
DELETED = shape(window_name=TEXT, blocks_deleted=WHOLE, space_freed_bytes=WHOLE, blocks_kept=WHOLE, warnings=WARNINGS)
CLONED = shape(source_window=TEXT, target_window=TEXT, shared_blocks=WHOLE, isolated=FLAG, **_WINDOW, warnings=WARNINGS)
MESSAGES = shape(window_name=TEXT, messages=list_of(ANYTHING), frame=ANYTHING)

_RESTORED = {
    "chunks_expected": WHOLE,
    "chunks_found": WHOLE,
    "chunks_relinked": WHOLE,
    "chunks_corrupt": WHOLE,
    "chunks_prefetched": _WHOLE_OR_NULL,
    "partial": FLAG,
    "duration_ms": NUMBER,
}
THAWED = shape(
    session_id=TEXT,
    window_name=TEXT,
    model=TEXT,
    token_count=WHOLE,
    cache_salt=TEXT,
    receipt=shape(**_RESTORED, cached_tokens=_WHOLE_OR_NULL, prompt_tokens=WHOLE),
    warnings=WARNINGS,
    continuation=or_null(
        shape(
            "the turn that `continuation_prompt` was; `error` in its place where it failed, which undoes no thaw",
            message=or_null(ANYTHING),
            finish_reason=_TEXT_OR_NULL,
            usage=or_null(ANYTHING),
            cached_tokens=_WHOLE_OR_NULL,
            error=or_null(ANYTHING),
        )
    ),
)
EVICTED = shape(
    window_name=TEXT,
    objects=WHOLE,
    tiers=by_name(shape(before=WHOLE, after=WHOLE)),
    kept=WHOLE,
    warnings=WARNINGS,
    duration_ms=NUMBER,
)
PREFETCHED = shape(window_name=TEXT, receipt=shape(**_RESTORED), warnings=WARNINGS)
FANNED_OUT = shape(
    window_name=TEXT,
    model=TEXT,
    token_count=WHOLE,
    kv=KV,
    block_count=WHOLE,
    sessions=list_of(TEXT),
    warnings=WARNINGS,
)
ANSWERED = shape(
    window_name=TEXT,
    model=TEXT,
    answer=TEXT,
    reasoning=_TEXT_OR_NULL,
    finish_reason=_TEXT_OR_NULL,
    receipt=shape(
        prompt_tokens=WHOLE,
        cached_tokens=_WHOLE_OR_NULL,
        computed_tokens=_WHOLE_OR_NULL,
        completion_tokens=WHOLE,
        chunks_expected=WHOLE,
        chunks_found=WHOLE,
        partial=FLAG,
        duration_ms=NUMBER,
    ),
    warnings=WARNINGS,
)
_REPLAY = shape(
    "what the engine said on the KV of one tier, against what it said without any",
    tier=TEXT,
    equal=FLAG,
    tokens_compared=WHOLE,
    first_difference=or_null(shape(position=WHOLE, expected_token_id=_WHOLE_OR_NULL, token_id=_WHOLE_OR_NULL)),
    largest_logprob_difference=NUMBER,
    prompt_tokens=WHOLE,
    cached_tokens=_WHOLE_OR_NULL,
    expected_cached_tokens=WHOLE,
)
VERIFIED = shape(
    window_name=TEXT,
    ok=FLAG,
    kv=KV,
    chunks_expected=WHOLE,
    chunks_pinned=WHOLE,
    chunks_usable=WHOLE,
    tiers=by_name(shape(checked=FLAG, objects=WHOLE, intact=WHOLE, damaged=WHOLE, missing=WHOLE, present=WHOLE)),
    damaged=list_of(
        shape(
            hash=TEXT,
            rank=WHOLE,
            chunk=WHOLE,
            tier=_TEXT_OR_NULL,
            state=word("missing", "damaged"),
            size_bytes=_WHOLE_OR_NULL,
        )
    ),
    warnings=WARNINGS,
    duration_ms=NUMBER,
    deep=or_null(list_of(_REPLAY)),
)
_NODE = shape(
    kind=word(*get_args(Kind)),
    name=TEXT,
    state=TEXT,
    model=TEXT,
    token_count=WHOLE,
    created_at=MOMENT,
    parent=or_null(shape(kind=word(*get_args(Kind)), name=TEXT)),
    relation=or_null(word(*get_args(Relation))),
)
TREE = shape(nodes=list_of(_NODE, "oldest first"), windows=WHOLE, sessions=WHOLE, truncated=FLAG, limit=WHOLE)

_SHARE = shape(objects=WHOLE, bytes=WHOLE)
CACHE = shape(
    windows=WHOLE,
    prompt_tokens=WHOLE,
    cached_tokens=WHOLE,
    hit_rate={**_NUMBER_OR_NULL, "description": "of all prompts since the gateway started"},
    chunk_size=_WHOLE_OR_NULL,
    lmcache=shape(
        status=word("healthy", "unhealthy", "unreachable", "not configured"),
        optional={"chunk_size": WHOLE, "hash_algorithm": TEXT, "adapters": list_of(TEXT)},
    ),
    tiers=by_name(
        shape(
            objects=WHOLE, bytes=WHOLE, pinned=_SHARE, windows=_SHARE, sessions=_SHARE, forgotten=_SHARE, unknown=_SHARE
        )
    ),
    warnings=WARNINGS,
)
_RULES: dict[str, Json] = {
    "enabled": FLAG,
    "idle_timeout_minutes": _NUMBER_OR_NULL,
    "token_threshold": _WHOLE_OR_NULL,
    "context_share": _NUMBER_OR_NULL,
    "at_shutdown": FLAG,
    "policies": list_of(ANYTHING),
    "naming_pattern": TEXT,
    "cooldown_seconds": NUMBER,
    "keep": WHOLE,
    "ttl_seconds": _NUMBER_OR_NULL,
    "set_at_run_time": list_of(TEXT, "rules that were set here; the others are the settings'"),
    "available": list_of(TEXT, "what `policies` may use"),
}
POLICIES = shape(**_RULES)
POLICIES_SET = shape(**_RULES, warnings=WARNINGS)
CHECKED = shape(
    session_id=TEXT,
    triggered=FLAG,
    reason=_TEXT_OR_NULL,
    held_back=_TEXT_OR_NULL,
    window_name=TEXT,
    token_count=WHOLE,
    covered_tokens=WHOLE,
    context_limit=_WHOLE_OR_NULL,
    threshold_percent=_NUMBER_OR_NULL,
    idle_seconds=NUMBER,
    estimates=_ESTIMATES,
    policies=list_of(shape(policy=TEXT, reason=_TEXT_OR_NULL, error=_TEXT_OR_NULL), "what each says"),
)

_WELL = word("healthy", "degraded", "unhealthy")
_ENGINE = shape(url=TEXT, state=TEXT, failures=WHOLE, last_error=_TEXT_OR_NULL, models=list_of(TEXT))
_COMPONENT = shape(
    status=_WELL,
    message=TEXT,
    latency_ms=NUMBER,
    optional={"engines": list_of(_ENGINE), "models_differ": by_name(by_name(TEXT))},
)
HEALTH = shape(
    status=_WELL,
    version=TEXT,
    pid=WHOLE,
    uptime_seconds=NUMBER,
    components=shape(optional=dict.fromkeys(COMPONENTS, _COMPONENT)),
)
DOCTOR = shape(
    ok=FLAG,
    checks=list_of(shape(name=TEXT, status=word("ok", "warning", "failed"), message=TEXT, remedy=TEXT)),
)
METRICS = {
    "oneOf": [
        shape(
            format=word("json"),
            metrics=list_of(shape(name=TEXT, type=TEXT, help=TEXT, labels=by_name(TEXT), value=NUMBER)),
        ),
        shape(format=word("prometheus"), content=TEXT),
    ]
}
ALIVE = shape(status=word("ok"))
READY = shape(status=word("ready"))
NOT_READY = shape(status=word("not ready"), waiting_for=TEXT, reason=TEXT)

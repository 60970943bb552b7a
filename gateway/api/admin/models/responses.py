"""What the admin API answers: a model for each shape, of which OpenAPI and the output schemas of MCP are made.

All are closed. A field that is `absent()` may be left out of an answer; every other one is always there.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from gateway.api.schemas import Json
from gateway.records import KvState, Outcome, SessionState

Number = Annotated[int | float, WithJsonSchema({"type": "number"})]  # an int stays one
Moment = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
Warnings = Annotated[list[str], Field(description="what went wrong or is missing")]
Kv = Annotated[KvState, Field(description="how much of its KV is pinned; `absent`: a thaw recomputes it")]


def absent() -> Any:
    """The default of a field that may be left out of an answer. It is neither documented nor sent."""
    return Field(default_factory=lambda: None)


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class ErrorInfo(Answer):
    code: str
    message: str
    hint: str
    retryable: bool
    details: Json


class Error(Answer):
    error: ErrorInfo


class Page(Answer):
    total: int
    has_more: bool
    limit: int
    offset: int


class Saved(Answer):
    """what the engine did not have to compute, of the requests whose cached tokens it counted"""

    requests: int
    prompt_tokens: int
    tokens: int = Field(description="from the cache")
    seconds_estimated: Number | None = Field(description="what computing `tokens_estimated` would have taken")
    tokens_estimated: int
    error_share: Number | None = Field(description="median relative error of such estimates, 0.1 is 10%")
    reason: str | None = Field(description="why the estimate does not cover all tokens")


class WindowLine(Answer):
    name: str
    title: str | None
    session_id: str
    model: str
    description: str
    tags: list[str]
    token_count: int
    size_bytes: int
    kv: Kv
    parent_window: str | None
    state: Literal["frozen", "expired"]
    created_at: Moment
    expires_at: Moment | None


class Match(Answer):
    """where the text was found"""

    field: Literal["name", "description", "tag", "message"]
    message: int | None = Field(description="its place in the text, from 0")
    role: str | None
    snippet: str = Field(description="the text around it")


class Window(WindowLine):
    block_count: int
    receipt: Json = Field(description="as measured when it was frozen or imported")


class ListedWindow(WindowLine):
    saved: Saved
    match: Match = absent()


class Windows(Page):
    windows: list[ListedWindow]
    truncated: Annotated[bool, Field(description="more match than were looked at: only the newest messages")] = absent()


class Frozen(Window):
    warnings: Warnings


class PinnedTier(Answer):
    pinned: int
    pinned_bytes: int
    present: int


class KvCache(Answer):
    block_count: int
    total_size_bytes: int
    storage_tier: str | None
    tiers: dict[str, PinnedTier]


class Timestamps(Answer):
    created_at: Moment
    expires_at: Moment | None


class Block(Answer):
    hash: str
    rank: int
    size_bytes: int
    pinned: dict[str, str] = Field(description="checksum in each tier where it is pinned")
    present: list[str] = Field(description="tiers where LMCache finds it")


class Lineage(Answer):
    parent: str | None
    ancestors: list[str]
    clones: list[str]


class WindowStatus(Window):
    kv_cache: KvCache
    timestamps: Timestamps
    saved: Saved
    caches: dict[str, bool | None] = Field(
        description="by the URL of each cache, whether all of it is in its memory, or none; null: not known"
    )
    warnings: Warnings
    blocks: Annotated[list[Block], Field(description="in chunk order")] = absent()
    lineage: Lineage = absent()


class WindowDeleted(Answer):
    window_name: str
    blocks_deleted: int
    space_freed_bytes: int
    blocks_kept: int
    warnings: Warnings


class Cloned(Window):
    source_window: str
    target_window: str
    shared_blocks: int
    isolated: bool
    ancestors: list[str] = Field(description="nearest first")
    warnings: Warnings


class Restored(Answer):
    chunks_expected: int
    chunks_found: int
    chunks_relinked: int
    chunks_corrupt: int
    chunks_prefetched: int | None
    partial: bool
    duration_ms: Number


class ThawReceipt(Restored):
    cached_tokens: int | None
    expected_cached_tokens: int
    prompt_tokens: int
    computed_tokens: Annotated[int, Field(description="computed now, or in the first turn unless `warm` is `gpu`")]
    at_turn: int | None
    as_text: bool
    saved: Saved | None = Field(description="by this thaw, null if it was not measured: with `warm: gpu` it is")


class Replaced(Answer):
    """what a session that was taken back had before"""

    turns_dropped: int
    token_count: int
    kept_in: str | None = Field(description="a window that has all of it; null if none has")


class Continuation(Answer):
    """the turn made of `continuation_prompt`, or `error` if it failed; the thaw is not undone"""

    message: Json | None
    finish_reason: str | None
    usage: Json | None
    cached_tokens: int | None
    error: Json | None


class Thawed(Answer):
    session_id: str
    window_name: str
    model: str
    token_count: int
    cache_salt: str
    receipt: ThawReceipt
    warnings: Warnings
    replaced: Replaced | None = Field(description="null unless `into_session` was given")
    continuation: Continuation | None


class EvictedTier(Answer):
    before: int
    after: int


class Evicted(Answer):
    window_name: str
    objects: int
    tiers: dict[str, EvictedTier]
    caches: dict[str, EvictedTier] = Field(description="the memory of each cache, by its URL; `cpu` is their sum")
    kept: int
    warnings: Warnings
    duration_ms: Number


class LoadedTier(Answer):
    present: int


class Prefetched(Answer):
    window_name: str
    receipt: Restored
    tiers: dict[str, LoadedTier]
    cache_url: str = Field(description="the cache into whose memory it was loaded: that of a thaw's engine")
    warnings: Warnings


class FannedOut(Answer):
    window_name: str
    model: str
    token_count: int
    kv: Kv
    block_count: int
    sessions: list[str]
    warnings: Warnings


class AskReceipt(Answer):
    prompt_tokens: int
    cached_tokens: int | None
    computed_tokens: int | None
    completion_tokens: int
    chunks_expected: int
    chunks_found: int
    expected_cached_tokens: int
    at_turn: int | None
    partial: bool
    duration_ms: Number
    saved: Saved | None


class Answered(Answer):
    window_name: str
    model: str
    answer: str
    reasoning: str | None
    finish_reason: Annotated[str | None, Field(description="`stop`, or `length`: cut at max_tokens")]
    receipt: AskReceipt
    warnings: Warnings


class Difference(Answer):
    position: int
    expected_token_id: int | None
    token_id: int | None


class Replay(Answer):
    """what the engine generated from the KV of one tier, compared with what it generated without any"""

    tier: str
    equal: bool
    tokens_compared: int
    first_difference: Difference | None
    largest_logprob_difference: Annotated[
        Number,
        Field(description="of equal tokens; how many tokens are computed in one go changes the last bits of a number"),
    ]
    prompt_tokens: int
    cached_tokens: int | None
    expected_cached_tokens: int


class VerifiedTier(Answer):
    checked: bool
    objects: int
    intact: int
    damaged: int
    missing: int
    present: int


class Damage(Answer):
    hash: str
    rank: int
    chunk: int
    tier: str | None
    state: Literal["missing", "damaged"]
    size_bytes: int | None


class Verified(Answer):
    window_name: str
    ok: bool
    kv: Kv
    chunks_expected: int
    chunks_pinned: int
    chunks_usable: int
    tiers: dict[str, VerifiedTier]
    damaged: list[Damage]
    warnings: Warnings
    duration_ms: Number
    deep: list[Replay] | None


class SessionLine(Answer):
    id: str
    title: str | None
    state: SessionState
    model: str
    token_count: int
    turn_count: int
    lineage: str
    recognised_by: str
    forked_from: str | None
    successor: str | None
    window: str | None
    engine: str | None
    normalised: list[str]
    created_at: Moment
    last_active_at: Moment
    frozen_at: Moment | None


class Estimates(Answer):
    """how its model's tokens are estimated, and how far off that was"""

    source: str
    exact: bool
    why: str
    bytes_per_token: Number | None
    tokens_around_a_message: Number
    prompts: int
    mean_error: Number | None
    p95_error: Number | None
    mean_error_of_new: Number | None
    p95_error_of_new: Number | None


class Turn(Answer):
    started_at: Moment
    duration_ms: Number
    first_token_ms: Number | None
    model: str
    outcome: Outcome
    status: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    detail: str
    recognised_by: str
    engine: str | None
    estimated_tokens: int | None
    expected_cached_tokens: int | None
    miss: str | None


class ListedSession(SessionLine):
    saved: Saved


class Sessions(Page):
    sessions: list[ListedSession]


class Session(SessionLine):
    context_limit: int | None
    estimates: Estimates | None
    saved: Saved
    turns: list[Turn] = Field(description="newest first")
    windows: list[str]
    warnings: Warnings


class CurrentSession(Answer):
    session_id: str | None = Field(description="null: the caller sent no id, or several conversations go by it")
    recognised_by: str | None = Field(description="what named it")
    sessions: list[SessionLine] = Field(description="recorded conversations that go by the id that was sent")


class SessionDeleted(Answer):
    session_id: str
    deleted: bool
    blocks_deleted: int
    space_freed_bytes: int
    warnings: Warnings

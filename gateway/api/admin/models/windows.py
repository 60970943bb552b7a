"""Windows, and the results of operations on them."""

from typing import Annotated, Literal

from pydantic import Field

from gateway.api.admin.models.base import Answer, Json, Kv, Moment, Number, Page, Warnings, absent
from gateway.windows.tree import Kind, Relation


class WindowLine(Answer):
    name: str
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


class Window(WindowLine):
    block_count: int
    receipt: Json = Field(description="what was seen when it was frozen or imported")


class Windows(Page):
    windows: list[WindowLine]


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
    warnings: Warnings


class Messages(Answer):
    window_name: str
    messages: list[Json]
    frame: Json


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
    prompt_tokens: int


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
    continuation: Continuation | None


class EvictedTier(Answer):
    before: int
    after: int


class Evicted(Answer):
    window_name: str
    objects: int
    tiers: dict[str, EvictedTier]
    kept: int
    warnings: Warnings
    duration_ms: Number


class Prefetched(Answer):
    window_name: str
    receipt: Restored
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
    partial: bool
    duration_ms: Number


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
    largest_logprob_difference: Number
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


class NodeName(Answer):
    kind: Kind
    name: str


class Node(NodeName):
    state: str
    model: str
    token_count: int
    created_at: Moment
    parent: NodeName | None
    relation: Relation | None


class Tree(Answer):
    nodes: list[Node] = Field(description="oldest first")
    windows: int
    sessions: int
    truncated: bool
    limit: int

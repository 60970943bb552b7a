"""Deep verify: generate from the stored KV, and compare with what the engine generates without it.

Checksums prove that the bytes are those that were pinned; this proves that they are the right ones. Nothing is recorded
for it: a reference continuation made at the freeze would make every freeze slower, and one made at the first deep
verify would only prove that nothing has changed since. So the reference is computed each time:

1. Under a new random salt, the engine computes the window's whole chunks, and continues greedily from there.
2. For each tier, under another such salt, the pins of that tier are exposed to LMCache as they are, and the engine
   continues from what it loads. Neither its own prefix cache nor LMCache's memory has anything under that salt.
3. Token ids and log probabilities are compared (`gateway.windows.comparison`).

It costs what a thaw without KV would: the whole window is computed once.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.dialects.base import engine_token_counts
from gateway.engines.client import EngineClient, Model
from gateway.errors import GatewayError, no_cache
from gateway.kv.keys import ObjectKey, with_salt
from gateway.kv.tiers.base import Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.windows.catalog import served_model
from gateway.windows.comparison import compare
from gateway.windows.context import OperationContext, Services
from gateway.windows.delete import drop_from_cache

TOKENS = 16  # of the continuation
_SAMPLING: dict[str, Any] = {
    "logprobs": 5,
    "return_token_ids": True,
    "ignore_eos": True,
    "kv_transfer_params": {"lmcache.max_offload_tokens": 0},
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which two continuations differ: its position, the expected token, and the actual one."""

    position: int
    expected_token_id: int | None
    token_id: int | None


@dataclass(frozen=True, slots=True)
class Replay:
    """The engine's continuation from the KV of one tier, compared with its continuation without any.

    `equal`: the same tokens, with the same log probabilities (within `comparison.TOLERANCE`), as far as they were
    compared, and all of the KV was used: `cached_tokens` is at least `expected_cached_tokens`.
    """

    tier: str
    equal: bool
    tokens_compared: int
    first_difference: Difference | None
    largest_logprob_difference: float
    prompt_tokens: int
    cached_tokens: int | None
    expected_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """The tokens that the engine generated, their log probabilities, and the likeliest tokens at each position."""

    ids: Sequence[int]
    tokens: Sequence[str]
    logprobs: Sequence[float | None]
    likeliest: Sequence[Mapping[str, float]]
    prompt_tokens: int
    cached_tokens: int | None


async def replay(
    ctx: OperationContext, window: Window, manifest: Manifest, tiers: Collection[str]
) -> tuple[tuple[Replay, ...], list[str]]:
    """Continue the window without its KV, and on that of each of `tiers`; warn of what cannot be compared.

    Raises `model_mismatch`, `cache_unavailable`, `engine_unreachable`, `engine_timeout`.
    """
    services = ctx.services
    model = await served_model(services, window)
    ids = manifest.token_ids[: model.context_limit - TOKENS] if model.context_limit else manifest.token_ids
    chunks = min(window.chunk_count, len(ids) // window.chunk_size) if window.chunk_size else 0
    if not chunks:
        return (), ["the window holds no KV: there is nothing to continue from"]
    if services.cache is None:
        raise no_cache("load the KV")
    steps = iter(range(1, len(tiers) + 1))
    ctx.progress("compute", 0, len(tiers) + 1)
    engine = _Engine(services.engines.for_lineage(window.lineage), model, ids)
    cached = chunks * window.chunk_size
    expected = await engine.compute_and_continue(cached)

    async def replay_from(tier: Tier) -> Replay:
        ctx.progress(f"replay {tier.name}", next(steps), len(tiers) + 1)
        leading = [o for o in manifest.objects if o.tier == tier.name][: chunks * window.world_size]
        actual = await _continue_from_tier(services, engine, window, tier, leading)
        return compare_continuations(tier.name, expected, actual, min(cached, len(ids) - 1))

    replays, warnings = await services.pins.each(replay_from, only=tiers)
    return tuple(replays.values()), warnings


@dataclass(frozen=True, slots=True)
class _Engine:
    """Continues the token ids of a window under different salts."""

    client: EngineClient
    model: Model
    ids: Sequence[int]

    async def compute_and_continue(self, cached: int) -> Continuation:
        """Compute the KV of the first `cached` tokens under a new salt, and continue from it."""
        salt = secrets.token_hex(16)
        await self.client.prefill(self.model.id, self.ids[:cached], salt, store=False)
        return await self.continue_with(salt)

    async def continue_with(self, salt: str) -> Continuation:
        """Continue greedily from the KV that is found under a salt."""
        return _read(await self.client.complete(self.model.id, self.ids, salt, max_tokens=TOKENS, **_SAMPLING))


async def _continue_from_tier(
    services: Services, engine: _Engine, window: Window, tier: Tier, objects: Sequence[PinnedObject]
) -> Continuation:
    salt = secrets.token_hex(16)
    exposed = [one._replace(key=with_salt(one.key, salt), pin=one.pin_key) for one in objects]
    keys = [ObjectKey.parse(one.key) for one in exposed]
    await services.store.mark_orphaned(salt, window.tenant, window.lineage)  # if we die, a sweep removes what is left
    # No sweep may delete it while the engine loads it, and no deletion the pins.
    async with services.claims.keep([*keys, *(ObjectKey.parse(one.pin_key) for one in exposed)]):
        try:
            await tier.expose_pin(exposed)
            return await engine.continue_with(salt)
        finally:
            await tier.drop_original(keys)
            await drop_from_cache(services, keys, [tier])


def _read(answer: dict[str, Any]) -> Continuation:
    """Read a completion. Raises `internal` if it lacks what was asked for, as it may from another engine than vLLM."""
    usage = engine_token_counts(answer.get("usage"))
    try:
        choice = answer["choices"][0]
        return Continuation(
            choice["token_ids"],
            choice["logprobs"]["tokens"],
            choice["logprobs"]["token_logprobs"],
            choice["logprobs"]["top_logprobs"],
            usage.prompt if usage else 0,
            usage.cached if usage else None,
        )
    except (IndexError, KeyError, TypeError) as error:
        message = "the engine's completion has no token ids or no log probabilities: nothing can be compared"
        raise GatewayError("internal", message, hint="a deep verification needs vLLM 0.32 or later") from error


def compare_continuations(tier: str, expected: Continuation, actual: Continuation, cached: int) -> Replay:
    """Compare two continuations; `cached` tokens of the prompt should have come from the cache."""
    seen, first = compare(expected, actual), None
    if seen.verdict == "different":
        at = seen.tokens - 1
        first = Difference(at, _at(expected.ids, at), _at(actual.ids, at))
    used = actual.cached_tokens is not None and actual.cached_tokens >= cached
    return Replay(
        tier=tier,
        equal=used and first is None,
        tokens_compared=seen.tokens,
        first_difference=first,
        largest_logprob_difference=seen.largest,
        prompt_tokens=actual.prompt_tokens,
        cached_tokens=actual.cached_tokens,
        expected_cached_tokens=cached,
    )


def _at(ids: Sequence[int], position: int) -> int | None:
    return ids[position] if position < len(ids) else None

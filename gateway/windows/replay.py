"""Deep verify: generate from the stored KV, and compare with what the engine generates without it.

Checksums prove that the bytes are those that were pinned; this proves that they are the right ones. Nothing has to be
recorded for it: a continuation kept at the freeze would make every freeze dearer, and one kept at the first deep verify
would prove only that nothing has changed since. So the control is computed anew, whenever it is asked for:

1. Under a salt that nobody ever used, the engine computes the window's whole chunks, and goes on greedily from there.
2. For each tier, under another such salt, LMCache is shown the pins of that tier as they are; the engine goes on from
   what it loads. Neither its own prefix cache nor LMCache's memory can know that salt: only the pinned bytes are there.
3. Token ids and log probabilities are compared. They are not equal to the last bit: the window's KV was computed turn
   by turn, the control's in one go (0.03 apart was seen). Where two tokens are all but equally likely in both, sound KV
   may go on with the other one: what follows then is another text, and no longer compared.

It costs what a thaw without KV would: the whole window is computed once.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from gateway.dialects.base import usage_of
from gateway.engines.client import EngineClient, Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, with_salt
from gateway.kv.tiers.base import Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.runtime.progress import Progress
from gateway.windows.catalog import served_model
from gateway.windows.context import Services
from gateway.windows.delete import drop_from_cache

TOKENS = 16  # of the continuation
TOLERANCE = 0.1  # of a log probability
_ASKED: dict[str, Any] = {
    "logprobs": 5,
    "return_token_ids": True,
    "ignore_eos": True,
    "kv_transfer_params": {"lmcache.max_offload_tokens": 0},
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which two continuations differ: its place, and what was expected and seen there."""

    position: int
    expected_token_id: int | None
    token_id: int | None


@dataclass(frozen=True, slots=True)
class Replay:
    """What the engine said on the KV of one tier, against what it said without any.

    `equal`: the same tokens, with the same log probabilities (to `TOLERANCE`), as far as they were compared, and all of
    the KV was used: `cached_tokens` is at least `expected_cached_tokens`.
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
    ids: Sequence[int]
    tokens: Sequence[str]
    logprobs: Sequence[float | None]
    likeliest: Sequence[Mapping[str, float]]
    prompt_tokens: int
    cached_tokens: int | None


async def replay(
    services: Services,
    window: Window,
    manifest: Manifest,
    tiers: Collection[str],
    progress: Progress,
) -> tuple[tuple[Replay, ...], list[str]]:
    """Continue the window without its KV, and on that of each of `tiers`; warn of what cannot be compared.

    Raises `model_mismatch`, `cache_unavailable`, `engine_unreachable`, `engine_timeout`.
    """
    model = await served_model(services, window)
    ids = manifest.token_ids[: model.context_limit - TOKENS] if model.context_limit else manifest.token_ids
    chunks = min(window.chunk_count, len(ids) // window.chunk_size) if window.chunk_size else 0
    if not chunks:
        return (), ["the window holds no KV: there is nothing to continue from"]
    if services.cache is None:
        raise GatewayError("cache_unavailable", "no cache is configured to load the KV", hint="set cache_url")
    engine = services.engines.for_lineage(window.lineage)
    steps = iter(range(1, len(tiers) + 1))
    progress("compute", 0, len(tiers) + 1)
    whole = chunks * window.chunk_size
    expected = await _computed(engine, model, ids, whole)

    async def compare(tier: Tier) -> Replay:
        progress(f"replay {tier.name}", next(steps), len(tiers) + 1)
        leading = [o for o in manifest.objects if o.tier == tier.name][: chunks * window.world_size]
        seen = await _restored(services, engine, model, window, tier, leading, ids)
        return compare_continuations(tier.name, expected, seen, min(whole, len(ids) - 1))

    replays, warnings = await services.pins.each(compare, only=tiers)
    return tuple(replays.values()), warnings


async def _computed(engine: EngineClient, model: Model, ids: Sequence[int], whole: int) -> Continuation:
    salt = secrets.token_hex(16)
    await engine.prefill(model.id, ids[:whole], salt, store=False)
    return _read(await engine.complete(model.id, ids, salt, max_tokens=TOKENS, **_ASKED))


async def _restored(
    services: Services, engine: EngineClient, model: Model, window: Window, tier: Tier, objects: Sequence[PinnedObject],
    ids: Sequence[int],
) -> Continuation:  # fmt: skip
    salt = secrets.token_hex(16)
    lent = [one._replace(key=with_salt(one.key, salt), pin=one.pin_key) for one in objects]
    keys = [ObjectKey.parse(one.key) for one in lent]
    await services.store.mark_orphaned(
        salt, window.tenant, window.lineage
    )  # if we die, a sweep takes away what is left
    # A sweep must not take it away while the engine loads it, nor a deletion the pins.
    async with services.pins.lock.acquire(exclusive=False):
        try:
            await tier.expose_pin(lent)
            return _read(await engine.complete(model.id, ids, salt, max_tokens=TOKENS, **_ASKED))
        finally:
            await tier.drop_original(keys)
            await drop_from_cache(services, keys, [tier])


def _read(answer: dict[str, Any]) -> Continuation:
    choice, usage = answer["choices"][0], usage_of(answer.get("usage"))
    return Continuation(
        choice["token_ids"],
        choice["logprobs"]["tokens"],
        choice["logprobs"]["token_logprobs"],
        choice["logprobs"]["top_logprobs"],
        usage.prompt if usage else 0,
        usage.cached if usage else None,
    )


def compare_continuations(tier: str, expected: Continuation, seen: Continuation, whole: int) -> Replay:
    first, largest, compared = None, 0.0, 0
    said = zip_longest(expected.ids, seen.ids, expected.logprobs, seen.logprobs)
    for position, (wanted, got, before, after) in enumerate(said):
        compared = position + 1
        if _tied(expected, seen, position):
            break
        apart = abs(before - after) if before is not None and after is not None else None
        if wanted == got and apart is not None:
            largest = max(largest, apart)
        if wanted != got or apart is None or apart > TOLERANCE:
            first = Difference(position, wanted, got)
            break
    used = seen.cached_tokens is not None and seen.cached_tokens >= whole
    return Replay(
        tier=tier,
        equal=used and first is None,
        tokens_compared=compared,
        first_difference=first,
        largest_logprob_difference=largest,
        prompt_tokens=seen.prompt_tokens,
        cached_tokens=seen.cached_tokens,
        expected_cached_tokens=whole,
    )


def _tied(expected: Continuation, seen: Continuation, position: int) -> bool:
    """Whether both went on with different tokens that both have for all but equally likely."""
    if position >= min(len(expected.tokens), len(seen.tokens)) or expected.tokens[position] == seen.tokens[position]:
        return False
    one, other = expected.tokens[position], seen.tokens[position]
    a, b = expected.likeliest[position], seen.likeliest[position]
    if any(token not in top for token in (one, other) for top in (a, b)):
        return False
    return max(abs(a[one] - b[one]), abs(a[other] - b[other]), abs(a[one] - a[other])) <= TOLERANCE

"""Prefetch and evict: move a window's KV into LMCache's memory before it is needed, and out of it when it is not.

An eviction checks every byte in the durable tiers and restores there what was evicted from them; then it deletes from
LMCache's memory what a durable tier certainly has. What none has stays: it may be the last copy. vLLM's own prefix
cache is not touched: it has no call that drops one window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from gateway.errors import no_cache
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import LMCache
from gateway.kv.memory import MEMORY_TIER
from gateway.windows.catalog import get_usable_window, served_model
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.restore import Receipt, check_and_restore, load, put_back


class Prefetched(NamedTuple):
    """The receipt of a load, and how many objects each tier has: `cpu`, the cache's memory, and durable ones.

    Without `cpu` where nothing was loaded: what is in the cache's memory then is not known.
    """

    receipt: Receipt
    tiers: Mapping[str, int]


@instrumented
async def prefetch(ctx: OperationContext, name: str) -> Prefetched:
    """Load a window's chunks from disk or Redis into the cache's memory; create no session.

    Raises `window_not_found`, `model_mismatch`, `cache_unavailable`. Chunks that are lost or damaged raise nothing: the
    receipt says `partial`.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    await served_model(services, window)
    cache = _cache(services, "load into")
    manifest = await services.store.manifest(window)
    counted = await cache.moves(window.salt)
    receipt = await check_and_restore(ctx, window, manifest)
    tiers, loaded = {}, None
    if receipt.chunks_found:
        tiers[MEMORY_TIER] = objects = await load(ctx, cache, window, manifest, receipt.chunks_found)
        loaded = objects // window.world_size
        if objects == window.chunk_count * window.world_size:
            cache.remember(window.manifest, window.salt, counted, is_there=True)
    present, _ = await services.pins.present(list(dict.fromkeys(one.key for one in manifest.objects)))
    tiers |= {tier: len(keys) for tier, keys in present.items()}
    partial = (loaded or 0) < receipt.chunks_expected
    receipt = replace(receipt, chunks_prefetched=loaded, partial=partial, duration_ms=ctx.duration_ms())
    return Prefetched(receipt, tiers)


@dataclass(frozen=True, slots=True)
class Residency:
    """How many of a window's objects were in a tier before, and how many are there now."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """What was moved where. `tiers` has `cpu`, the cache's memory, and each durable tier that can be reached.

    `kept`: objects that stayed because no durable tier has them intact; `cpu` does not count those.
    """

    window_name: str
    objects: int
    tiers: Mapping[str, Residency]
    kept: int
    warnings: tuple[str, ...]
    duration_ms: float


@instrumented
async def evict(ctx: OperationContext, name: str) -> Evicted:
    """Move a window's KV out of the cache's memory. Raises `window_not_found`, `cache_unavailable`.

    Objects that a request is reading just now stay, with a warning.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    cache = _cache(services, "evict from")
    objects = await services.store.pinned(window)
    names = list(dict.fromkeys(one.key for one in objects))
    before, _ = await services.pins.present(names)
    ctx.progress("restore", 0, len(names))
    states, warnings = await put_back(services, window, objects)
    safe = {key for by_key in states.values() for key, state in by_key.items() if state.usable}
    ctx.progress("evict", 0, len(safe))
    counted = await cache.moves(window.salt)
    dropped, locked = await cache.delete([ObjectKey.parse(one) for one in names if one in safe], tier="l1")
    after, _ = await services.pins.present(names)
    tiers = {MEMORY_TIER: Residency(dropped + locked, locked)}
    tiers |= {tier: Residency(len(before.get(tier, ())), len(present)) for tier, present in after.items()}
    if locked:
        warnings.append(f"{locked} objects are in use and stayed in the cache's memory")
    kept = len(names) - len(safe)
    cache.remember(window.manifest, window.salt, None if locked or kept else counted, is_there=False)
    if kept:
        warnings.append(
            f"{kept} of {len(names)} objects are intact in no durable tier: they stayed in the cache's memory"
        )
    ctx.progress("evict", len(safe), len(safe))
    return Evicted(name, len(names), tiers, kept, tuple(warnings), ctx.duration_ms())


def _cache(services: Services, purpose: str) -> LMCache:
    if services.cache is None:
        raise no_cache(purpose)
    return services.cache

"""Prefetch and evict: move a window's KV into LMCache's memory before it is needed, and out of it when it is not.

An eviction checks every byte in the durable tiers and restores there what was evicted from them; then it deletes from
LMCache's memory what a durable tier certainly has. What none has stays: it may be the last copy. vLLM's own prefix
cache is not touched: it has no call that drops one window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gateway.engines.client import Model
from gateway.errors import GatewayError, no_cache
from gateway.kv.cache_pool import CachePool
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import LMCache
from gateway.kv.memory import MEMORY_TIER, Moves
from gateway.records import Window
from gateway.windows.catalog import get_usable_window, served_model
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.placement import load, place
from gateway.windows.restore import Receipt, check_and_restore, put_back


class Prefetched(NamedTuple):
    """The receipt of a load, and how many objects each tier has: `cpu`, the cache's memory, and durable ones.

    Without `cpu` where nothing was loaded: what is in the cache's memory then is not known. `cache_url` is the cache
    of the engine that will get the next thaw's turns.
    """

    receipt: Receipt
    tiers: Mapping[str, int]
    cache_url: str


@instrumented
async def prefetch(ctx: OperationContext, name: str) -> Prefetched:
    """Load a window's chunks from the durable tiers into the cache's memory; create no session.

    Of several caches, into that of the engine to which a thaw of the window would go. Raises `window_not_found`,
    `model_mismatch`, `cache_unavailable`. Chunks that are lost or damaged raise nothing: the receipt says `partial`.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    model = await served_model(services, window)
    cache = _cache_of(services, window, model)
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
    return Prefetched(receipt, tiers, cache.url)


@dataclass(frozen=True, slots=True)
class Residency:
    """How many of a window's objects were in a tier before, and how many are there now."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """What was moved where. `tiers` has `cpu`, the cache's memory, and each durable tier that can be reached.

    `kept`: objects that stayed because no durable tier has them intact; `cpu` does not count those. `caches` has the
    memory of each cache that answered, by its URL; `cpu` is their sum.
    """

    window_name: str
    objects: int
    tiers: Mapping[str, Residency]
    caches: Mapping[str, Residency]
    kept: int
    warnings: tuple[str, ...]
    duration_ms: float


@instrumented
async def evict(ctx: OperationContext, name: str) -> Evicted:
    """Move a window's KV out of the memory of every cache. Raises `window_not_found`, `cache_unavailable`.

    Objects that a request is reading just now stay, with a warning; so does what a cache has that does not answer.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    pool = _pool(services, "evict from")
    objects = await services.store.pinned(window)
    names = list(dict.fromkeys(one.key for one in objects))
    before, _ = await services.pins.present(names)
    with ctx.step("restore", len(names)):
        states, warnings = await put_back(services, window, objects)
    safe = {key for by_key in states.values() for key, state in by_key.items() if state.usable}
    kept = len(names) - len(safe)
    with ctx.step("evict", len(safe)):
        caches, more = await _drop(pool, window, [ObjectKey.parse(one) for one in names if one in safe], kept)
    warnings += more
    after, _ = await services.pins.present(names)
    tiers = {MEMORY_TIER: Residency(sum(c.before for c in caches.values()), sum(c.after for c in caches.values()))}
    tiers |= {tier: Residency(len(before.get(tier, ())), len(present)) for tier, present in after.items()}
    if kept:
        warnings.append(
            f"{kept} of {len(names)} objects are intact in no durable tier: they stayed in the cache's memory"
        )
    ctx.progress("evict", len(safe), len(safe))
    return Evicted(name, len(names), tiers, caches, kept, tuple(warnings), ctx.duration_ms())


async def _drop(
    pool: CachePool, window: Window, keys: Sequence[ObjectKey], kept: int
) -> tuple[dict[str, Residency], list[str]]:
    """Drop a window's objects from every memory; return what each cache had and has, and warnings.

    `kept`: how many objects of the window are not to be dropped. Raises `cache_unavailable` if no cache answers.
    """
    counted = await pool.each(lambda cache: cache.moves(window.salt))
    answers = await pool.delete_each(keys, tier="l1")
    caches: dict[str, Residency] = {}
    warnings: list[str] = []
    for url, answer in answers.items():
        if isinstance(answer, GatewayError):
            warnings.append(answer.message)
            continue
        dropped, locked = answer
        caches[url] = Residency(dropped + locked, locked)
        before = counted.get(url)
        seen = before if isinstance(before, Moves) and not locked and not kept else None
        if cache := pool.own(url):
            cache.remember(window.manifest, window.salt, seen, is_there=False)
        if locked:
            warnings.append(f"{locked} objects are in use and stayed in the cache's memory")
    if not caches:
        raise pool.none_of(answers)
    return caches, warnings


def _pool(services: Services, purpose: str) -> CachePool:
    if services.cache is None:
        raise no_cache(purpose)
    return services.cache


def _cache_of(services: Services, window: Window, model: Model) -> LMCache:
    """The cache to load a window into. Raises `cache_unavailable`."""
    pool = _pool(services, "load into")
    placement = place(services, window.lineage, model=model.id, tokens=window.token_count)
    if placement.cache is not None:
        return placement.cache
    url = placement.node.cache if placement.node else ""
    why = pool.left_out.get(url) or "it is not known which one is its"
    raise GatewayError(
        "cache_unavailable",
        f"the cache of engine {placement.engine or '(none can be reached)'} cannot be loaded into: {why}",
        hint="`GET /admin/health` says which cache belongs to which engine",
    )

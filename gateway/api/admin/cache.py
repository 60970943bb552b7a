"""GET /admin/cache: the cache's state, the objects in its tiers, and the hit rate."""

from dataclasses import asdict

from gateway.api.admin.models import status
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.errors import GatewayError
from gateway.kv.lmcache import LMCache
from gateway.kv.memory import MEMORY_TIER, MemoryUse
from gateway.windows.retention.usage import TierUse, usage


@operation("GET", "/admin/cache")
async def statistics(call: Call) -> status.Cache:
    """Show what each tier holds and for whom, and the state of the cache."""
    await call.services.recorder.flush()  # so that a turn is counted once its reply was read
    tiers, warnings = await usage(call.services)
    lmcache, memory, more = await _lmcache(call.services.cache)
    engines = await call.services.engines.cache_use()
    prompt_tokens, cached_tokens = call.services.metrics.token_totals()
    return status.Cache(
        windows=sum((await call.services.store.window_counts()).values()),
        chunk_size=call.services.settings.chunk_size or lmcache.chunk_size,
        engines_up=len(call.services.engines.up),
        lmcache=lmcache,
        tiers={
            **({"gpu": status.EngineTier(**asdict(engines))} if engines else {}),
            **({MEMORY_TIER: status.MemoryTier(**asdict(memory))} if memory else {}),
            **{tier.name: _tier(tier) for tier in tiers},
        },
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        hit_rate=round(cached_tokens / prompt_tokens, 4) if prompt_tokens else None,
        warnings=[*warnings, *more],
    )


async def _lmcache(cache: LMCache | None) -> tuple[status.LMCacheStatus, MemoryUse | None, list[str]]:
    """Its state, what is in its memory, and warnings."""
    if cache is None:
        return status.LMCacheStatus(status="not configured"), None, []
    try:
        info = await cache.info()
        trouble = await cache.trouble()
    except GatewayError as error:
        return status.LMCacheStatus(status="unreachable"), None, [error.message]
    answer = status.LMCacheStatus(
        status="unhealthy" if trouble else "healthy",
        chunk_size=info.chunk_size,
        hash_algorithm=info.hash_algorithm,
        adapters=[*info.adapters],
    )
    return answer, info.memory, [trouble] if trouble else []


def _tier(tier: TierUse) -> status.CacheTier:
    shares = asdict(tier)
    del shares["name"]
    return status.CacheTier(**shares.pop("total"), **shares)

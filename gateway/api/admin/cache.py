"""GET /admin/cache: the cache's state, the objects in its tiers, and the hit rate."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from gateway.api.admin.models import status
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.errors import GatewayError
from gateway.kv.cache_pool import CachePool
from gateway.kv.lmcache import CacheInfo, LMCache
from gateway.kv.memory import MEMORY_TIER, MemoryUse
from gateway.windows.context import Services
from gateway.windows.retention.usage import TierUse, usage


class _Together(NamedTuple):
    """What is told of all caches together."""

    status: status.LMCacheStatus
    memory: MemoryUse | None


@operation("GET", "/admin/cache")
async def statistics(call: Call) -> status.Cache:
    """Show what each tier holds and for whom, and the state of the cache."""
    await call.services.recorder.flush()  # so that a turn is counted once its reply was read
    tiers, warnings = await usage(call.services)
    nodes = await _nodes(call.services)
    (lmcache, memory), more = await _lmcache(call.services.cache, nodes)
    engines = await call.services.engines.cache_use()
    prompt_tokens, cached_tokens = call.services.metrics.token_totals()
    return status.Cache(
        windows=sum((await call.services.store.window_counts()).values()),
        chunk_size=call.services.settings.chunk_size or lmcache.chunk_size,
        engines_up=len(call.services.engines.up),
        lmcache=lmcache,
        nodes=nodes,
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


async def _nodes(services: Services) -> list[status.NodeMemory]:
    """Every cache, and what is in its memory."""
    if services.cache is None:
        return []
    infos, troubles = await asyncio.gather(services.cache.each(LMCache.info), services.cache.troubles())
    only = len(infos) == 1
    return [_node(services, url, info, troubles.get(url, ""), only=only) for url, info in infos.items()]


def _node(
    services: Services, url: str, info: CacheInfo | GatewayError, trouble: str, *, only: bool
) -> status.NodeMemory:
    difference = services.cache.left_out.get(url, "") if services.cache else ""
    said = info if isinstance(info, CacheInfo) else None
    trouble = trouble if said else str(info)
    return status.NodeMemory(
        url=url,
        status="unhealthy" if trouble else "left out" if difference else "healthy",
        message=trouble or difference or "answers",
        engines=services.engines.beside(url, only=only),
        chunk_size=said.chunk_size if said else None,
        memory=status.MemoryTier(**asdict(said.memory)) if said and said.memory else None,
    )


async def _lmcache(caches: CachePool | None, nodes: Sequence[status.NodeMemory]) -> tuple[_Together, list[str]]:
    """The state of all caches together, what is in their memory, and warnings."""
    if caches is None:
        return _Together(status.LMCacheStatus(status="not configured"), None), []
    named = len(nodes) > 1
    warnings = [f"{n.url}: {n.message}" if named else n.message for n in nodes if n.status != "healthy"]
    try:
        info = await caches.info()
    except GatewayError as error:
        return _Together(status.LMCacheStatus(status="unreachable"), None), warnings or [error.message]
    answer = status.LMCacheStatus(
        status="unhealthy" if warnings else "healthy",
        chunk_size=info.chunk_size,
        hash_algorithm=info.hash_algorithm,
        adapters=[*info.adapters],
    )
    return _Together(answer, info.memory), warnings


def _tier(tier: TierUse) -> status.CacheTier:
    shares = asdict(tier)
    del shares["name"]
    return status.CacheTier(**shares.pop("total"), **shares)

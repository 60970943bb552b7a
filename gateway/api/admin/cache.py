"""GET /admin/cache: the cache's state, the objects in its tiers, and the hit rate."""

from dataclasses import asdict
from typing import Any

from gateway.api.admin import models
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.errors import GatewayError
from gateway.kv.lmcache import LMCache
from gateway.metrics import Metrics, Stored
from gateway.windows.retention.usage import TierUse, usage


@operation("GET", "/admin/cache")
async def statistics(call: Call) -> models.Cache:
    """Tell what lies in each tier and for whom, and what the cache says of itself."""
    await call.services.recorder.flush()  # who has read a reply, finds its turn counted
    tiers, warnings = await usage(call.services)
    lmcache, more = await _lmcache(call.services.cache)
    chunk_size = call.services.settings.chunk_size or lmcache.chunk_size
    return models.Cache(
        windows=sum((await call.services.store.window_counts()).values()),
        chunk_size=chunk_size,
        lmcache=lmcache,
        tiers={tier.name: _tier(tier) for tier in tiers},
        **_hits(call.services.metrics),
        warnings=[*warnings, *more],
    )


def _hits(telemetry: Metrics) -> dict[str, Any]:
    """What the cache was good for, since the gateway started. `hit_rate` is None before the first prompt."""
    rows = telemetry.rows(Stored({}, {}))
    prompt, cached = (
        int(sum(row["value"] for row in rows if row["name"] == name))
        for name in ("cwg_prompt_tokens_total", "cwg_cached_tokens_total")
    )
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "hit_rate": round(cached / prompt, 4) if prompt else None,
    }


async def _lmcache(cache: LMCache | None) -> tuple[models.LMCacheStatus, list[str]]:
    if cache is None:
        return models.LMCacheStatus(status="not configured"), []
    try:
        info = await cache.info()
        healthy = await cache.healthy()
    except GatewayError as error:
        return models.LMCacheStatus(status="unreachable"), [error.message]
    shown = models.LMCacheStatus(
        status="healthy" if healthy else "unhealthy",
        chunk_size=info.chunk_size,
        hash_algorithm=info.hash_algorithm,
        adapters=[str(adapter.get("type", "")) for adapter in info.adapters],
    )
    return shown, []


def _tier(tier: TierUse) -> models.CacheTier:
    shares = {name: share for name, share in asdict(tier).items() if name not in ("name", "total")}
    return models.CacheTier(objects=tier.total.objects, bytes=tier.total.bytes, **shares)

"""GET /admin/cache: what the cache says of itself, and what lies in its tiers."""

from dataclasses import asdict
from typing import Any

from gateway.edge.endpoint import Call
from gateway.errors import GatewayError
from gateway.kv.lmcache import LMCache
from gateway.windows.usage import TierUse, usage


async def statistics(call: Call) -> tuple[int, Any]:
    """GET /admin/cache."""
    call.query({})
    tiers, warnings = await usage(call.parts)
    lmcache, more = await _lmcache(call.parts.cache)
    chunk_size = call.parts.settings.chunk_size or lmcache.get("chunk_size")
    shown = {tier.name: _tier(tier) for tier in tiers}
    return 200, {"chunk_size": chunk_size, "lmcache": lmcache, "tiers": shown, "warnings": [*warnings, *more]}


async def _lmcache(cache: LMCache | None) -> tuple[dict[str, Any], list[str]]:
    if cache is None:
        return {"status": "not configured"}, []
    try:
        info = await cache.info()
        healthy = await cache.healthy()
    except GatewayError as error:
        return {"status": "unreachable"}, [error.message]
    return {
        "status": "healthy" if healthy else "unhealthy",
        "chunk_size": info.chunk_size,
        "hash_algorithm": info.hash_algorithm,
        "adapters": [str(adapter.get("type", "")) for adapter in info.adapters],
    }, []


def _tier(tier: TierUse) -> dict[str, Any]:
    shares = {name: share for name, share in asdict(tier).items() if name not in ("name", "total")}
    return {"objects": tier.total.objects, "bytes": tier.total.bytes, **shares}

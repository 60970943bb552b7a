"""What puts the objects of the tiers at risk while everything answers: seen by health, each with its remedy."""

from collections.abc import Iterator

from gateway.kv.lmcache import CacheInfo, LMCache
from gateway.kv.tiers.base import Tier
from gateway.windows.context import Services

_S3_OFF = (
    "s3 tier: LMCache has switched its s3 adapter off after three connection errors, and never tries again "
    "(LMCache#4368): windows keep no KV there; restart LMCache"
)


async def find_risks(services: Services) -> list[str]:
    """The risks of every tier, and of each LMCache's adapters for them; a tier that cannot be reached is one too.

    Of a cache that cannot be asked, the component `cache` says so.
    """
    by_tier, unreachable = await services.pins.each(lambda tier: tier.risks())
    risks = [*unreachable, *(risk for some in by_tier.values() for risk in some)]
    answers = await services.cache.each(LMCache.info) if services.cache else {}
    for url, info in answers.items():
        where = f"cache {url}: " if len(answers) > 1 else ""
        if isinstance(info, CacheInfo):
            risks += [where + risk for tier in services.pins.tiers for risk in _of_adapter(tier, info)]
    return risks


def _of_adapter(tier: Tier, info: CacheInfo) -> Iterator[str]:
    if tier.adapter not in info.adapters:
        has = f"only {', '.join(info.adapters)}" if info.adapters else "and no other"
        yield f"{tier.name} tier: LMCache has no adapter of type {tier.adapter}, {has}; start it with that --l2-adapter"
    elif tier.adapter in info.disabled:
        stopped = f"{tier.name} tier: LMCache's {tier.adapter} adapter has stopped; restart LMCache"
        yield _S3_OFF if tier.adapter == "s3" else stopped

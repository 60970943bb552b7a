"""Quotas: a tier over its budget loses the KV of the sessions idle longest, never that of windows.

So does the disk tier, with or without a budget, when less than `disk_reserve_bytes` are free on its disk: the store may
be on the same one.
"""

import logging
from collections.abc import Sequence

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Tier
from gateway.store.types import SaltUse
from gateway.windows.context import Services
from gateway.windows.delete import drop_from_cache
from gateway.windows.retention.orphans import BATCH, group_by_salt

log = logging.getLogger(__name__)


async def enforce_quotas(services: Services) -> None:
    """Bring every tier within its budget, as far as the KV of idle sessions allows."""
    _, warnings = await services.pins.each(lambda tier: _enforce(services, tier))
    for warning in warnings:
        log.warning("could not check a budget: %s", warning)


async def _enforce(services: Services, tier: Tier) -> None:
    if not tier.lists:  # then a lifecycle rule of its storage is the budget
        return
    settings = services.settings
    budget = {"disk": settings.disk_budget_bytes, "redis": settings.redis_budget_bytes}.get(tier.name, 0)
    free = await tier.free()
    lacking = 0 if free is None else max(0, settings.disk_reserve_bytes - free)
    if not (budget or lacking):
        return
    stored = await tier.inventory()
    size = sum(one.size for one in stored)
    budget = min(budget or size, max(0, size - lacking))
    if size <= budget:
        return
    by_salt = group_by_salt(one.key for one in stored)
    for salt, uses in _idle_first(await services.store.salt_uses()):
        if salt not in by_salt or await _in_turn(services, uses):
            continue
        size -= await _delete_salt(services, tier, by_salt[salt])
        if size <= budget:
            return
    log.warning("the %s tier holds %d bytes, %d more than its budget, and no idle session has any of it that no window "
                "holds", tier.name, size, size - budget)  # fmt: skip


async def _in_turn(services: Services, uses: Sequence[SaltUse]) -> bool:
    for use in uses:
        if await services.turns.lineage_has_turn_in_flight(use.tenant, use.lineage):
            return True
    return False


def _idle_first(uses: Sequence[SaltUse]) -> list[tuple[str, list[SaltUse]]]:
    """Salts with what uses them, the one whose last use is longest ago first."""
    by_salt: dict[str, list[SaltUse]] = {}
    for use in uses:
        by_salt.setdefault(use.salt, []).append(use)
    return sorted(by_salt.items(), key=lambda item: max(use.last_active_at for use in item[1]))


async def _delete_salt(services: Services, tier: Tier, keys: Sequence[ObjectKey]) -> int:
    """Delete the objects of one salt from a tier, except what windows hold; return the bytes freed."""
    freed = 0
    for start in range(0, len(keys), BATCH):
        async with services.claims.removing(keys[start : start + BATCH]) as removal:
            free = removal.claimed.keys
            more, warnings = await removal.remove(free, originals=True, only=(tier.name,))
        freed += more
        for warning in warnings:
            log.warning("could not delete for a budget: %s", warning)
        for warning in await drop_from_cache(services, free, [tier]):
            log.warning("the cache still has in memory what was deleted for a budget: %s", warning)
    if freed:
        log.info("deleted %d bytes of idle sessions from the %s tier: it was over its budget", freed, tier.name)
    return freed

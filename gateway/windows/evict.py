"""Evict: move a window's KV out of the cache's memory; its next use loads it from the tiers.

1. Check every byte in the durable tiers, and put back there what eviction took.
2. Drop from LMCache's memory what a durable tier has for certain. What none has stays: it may be the last copy.

What the engine holds in its own prefix cache goes when others need the room: vLLM has no call that drops one window.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.runtime.progress import Progress, silent
from gateway.windows.catalog import get_usable_window
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.restore import put_back


@dataclass(frozen=True, slots=True)
class Place:
    """How many of a window's objects were in a tier before, and how many are there now."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """What went where. `tiers` has `cpu`, the cache's memory, and each durable tier that could be asked.

    `kept`: objects that were left alone because no durable tier has them intact; `cpu` does not count those.
    """

    window_name: str
    objects: int
    tiers: Mapping[str, Place]
    kept: int
    warnings: tuple[str, ...]
    duration_ms: float


@instrumented
async def evict(services: Services, tenant: str, name: str, progress: Progress = silent) -> Evicted:
    """Move a window's KV out of the cache's memory. Raises `window_not_found`, `cache_unavailable`.

    Objects that a request is reading just now stay, and the answer says so.
    """
    clock = time.monotonic()
    window = await get_usable_window(services, tenant, name)
    if services.cache is None:
        raise GatewayError("cache_unavailable", "no cache is configured to evict from", hint="set cache_url")
    objects = await services.store.pinned(window)
    names = list(dict.fromkeys(one.key for one in objects))
    before, _ = await services.pins.present(names)
    progress("restore", 0, len(names))
    states, warnings = await put_back(services, window, objects)
    safe = {key for have in states.values() for key, state in have.items() if state.usable}
    progress("evict", 0, len(safe))
    dropped, locked = await services.cache.delete([ObjectKey.parse(one) for one in names if one in safe], tier="l1")
    after, _ = await services.pins.present(names)
    tiers = {"cpu": Place(dropped + locked, locked)}
    tiers |= {tier: Place(len(before.get(tier, ())), len(have)) for tier, have in after.items()}
    if locked:
        warnings.append(f"{locked} objects are in use and stayed in the cache's memory")
    kept = len(names) - len(safe)
    if kept:
        warnings.append(
            f"{kept} of {len(names)} objects are intact in no durable tier: they stayed in the cache's memory"
        )
    progress("evict", len(safe), len(safe))
    return Evicted(name, len(names), tiers, kept, tuple(warnings), round((time.monotonic() - clock) * 1000, 1))

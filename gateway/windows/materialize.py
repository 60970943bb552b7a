"""Get a window's KV into the tiers: plan what it needs, compute what is missing, wait until it is stored."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gateway.engines.client import EngineClient, Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, object_keys
from gateway.kv.lmcache import CacheInfo
from gateway.records import PinnedObject, Usage
from gateway.runtime.progress import Progress
from gateway.windows.context import Services

_POLL_S = 0.02
# LMCache writes to all tiers at once but not at one speed. An object that one tier has and another has not is waited
# for only while that tier still makes progress: LMCache does not fill a tier in later that was added or emptied.
_SETTLE_S = 1.0
_STALL_S = 5.0


@dataclass(frozen=True)
class Plan:
    """The objects that a prefix of token ids consists of, in chunk order."""

    model: Model
    salt: str
    ids: tuple[int, ...]
    chunk_size: int
    world_size: int
    keys: tuple[ObjectKey, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The keys as the store spells them."""
        return tuple(map(str, self.keys))

    @property
    def chunks(self) -> int:
        """Whole chunks in `ids`."""
        return len(self.keys) // self.world_size

    def covered(self, have: set[str]) -> int:
        """How many leading chunks are whole in `have`, the keys that are there."""
        count = 0
        while count < self.chunks and have.issuperset(self._of_chunk(count)):
            count += 1
        return count

    def _of_chunk(self, index: int) -> tuple[str, ...]:
        """The names of one chunk, one for each rank."""
        return self.names[index * self.world_size : (index + 1) * self.world_size]


def plan(model: Model, salt: str, ids: Sequence[int], info: CacheInfo, chunk_size: int) -> Plan:
    """Name the objects of `ids`. Raises `cache_unavailable` when the cache hashes otherwise than the gateway can."""
    if info.hash_algorithm != "blake3":
        raise GatewayError(
            "cache_unavailable",
            f"LMCache hashes with {info.hash_algorithm!r}, whose keys the gateway cannot name",
            hint="start it with --hash-algorithm blake3",
        )
    size = chunk_size or info.chunk_size
    world = info.world_sizes.get(model.root, 1)
    return Plan(model, salt, tuple(ids), size, world, tuple(object_keys(model.root, ids, size, world, salt)))


async def ensure_stored(
    services: Services, engine: EngineClient, wanted: Plan, *, again: bool, progress: Progress
) -> tuple[Usage | None, list[str]]:
    """Have every object of the plan in some tier: compute what is missing, and wait until it is seen.

    With `again`, what is missing is first dropped from LMCache's memory: an object that is resident there is not
    written to a tier a second time. Returns the engine's count if it had to compute, and warnings. Raises what the
    engine raises.
    """
    found, warnings = await services.pins.present(wanted.names)
    if not found:
        return None, warnings
    there = set().union(*found.values())
    missing = [key for key, name in zip(wanted.keys, wanted.names, strict=True) if name not in there]
    usage = None
    if missing:
        if again and services.cache:
            await services.cache.delete(missing, tier="l1")
        progress("prefill", 0, len(missing))
        usage = await engine.prefill(wanted.model.id, wanted.ids[: wanted.chunks * wanted.chunk_size], wanted.salt)
    await _wait_until_stored(services, wanted, progress)
    return usage, warnings


async def _wait_until_stored(services: Services, wanted: Plan, progress: Progress) -> None:
    """Wait until all tiers have all objects, or nothing more comes, or `freeze_timeout_s` is over."""
    tiers = len((await services.pins.present(wanted.names[:1]))[0])
    goal = tiers * len(wanted.keys)
    started = moved = time.monotonic()
    seen = -1
    while True:
        found, _ = await services.pins.present(wanted.names)
        count = sum(len(have) for have in found.values())
        everywhere = set().union(*found.values()) if found else set()
        now = time.monotonic()
        if count > seen:
            seen, moved = count, now
            progress("barrier", len(everywhere), len(wanted.keys))
        patience = _SETTLE_S if len(everywhere) == len(wanted.keys) else _STALL_S
        if count >= goal or now - moved > patience or now - started > services.settings.freeze_timeout_s:
            return
        await asyncio.sleep(_POLL_S)


async def pin(services: Services, wanted: Plan) -> tuple[int, tuple[PinnedObject, ...]]:
    """Pin the plan's objects; return how many leading chunks are whole, and their objects.

    Raises TierFull. Call it under the shared lock.
    """
    known = await services.store.objects(wanted.keys)
    by_tier, _ = await services.pins.pin(wanted.keys, known)
    chunks = wanted.covered({key for have in by_tier.values() for key in have})
    names = wanted.names[: chunks * wanted.world_size]
    objects = tuple(have[name] for name in names for have in by_tier.values() if name in have)
    return chunks, objects

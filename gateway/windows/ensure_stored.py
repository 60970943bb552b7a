"""Get a window's KV into the tiers: name it, compute what is missing, wait until it is stored, and pin it."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gateway.engines.client import EngineClient, Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, object_keys
from gateway.kv.lmcache import CacheInfo
from gateway.records import KvState, PinnedObject, Usage, Window
from gateway.telemetry import genai
from gateway.windows.context import OperationContext, Services
from gateway.windows.delete import drop_from_cache

log = logging.getLogger(__name__)

NO_CACHE = "no cache is configured (cache_url and a tier, such as kv_dir): only text and token ids were kept"
_POLL_S = 0.02
# LMCache writes to all tiers at once but not at one speed. An object that only some tiers have is waited for only while
# the others still make progress: LMCache does not backfill a tier that was added or emptied later.
_SETTLE_S = 1.0
_STALL_S = 5.0


@dataclass(frozen=True)
class Plan:
    """The objects that a prefix of token ids consists of, in chunk order."""

    model: Model
    salt: str
    ids: Sequence[int]
    chunk_size: int
    world_size: int
    keys: tuple[ObjectKey, ...]
    layout_bytes: frozenset[int] = frozenset()  # sizes of a chunk as the engines have it, before a serde of LMCache's

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The keys as the store spells them."""
        return tuple(map(str, self.keys))

    @property
    def chunks(self) -> int:
        """Whole chunks in `ids`."""
        return len(self.keys) // self.world_size

    def covered(self, names: set[str]) -> int:
        """How many leading chunks have all their objects in `names`."""
        chunk, size = 0, self.world_size
        while chunk < self.chunks and names.issuperset(self.names[chunk * size : (chunk + 1) * size]):
            chunk += 1
        return chunk


def plan(model: Model, salt: str, ids: Sequence[int], info: CacheInfo, chunk_size: int) -> Plan:
    """Name the objects of `ids`. Raises `cache_unavailable` if the cache uses a hash that the gateway does not know."""
    if info.hash_algorithm != "blake3":
        raise GatewayError(
            "cache_unavailable",
            f"LMCache hashes with {info.hash_algorithm!r}, whose keys the gateway cannot name",
            hint="start it with --hash-algorithm blake3",
        )
    world_size = info.world_sizes.get(model.root, 1)
    keys = object_keys(model.root, ids, chunk_size, world_size, salt)
    layout_bytes = frozenset(size * chunk_size for size in info.token_bytes)
    return Plan(model, salt, ids, chunk_size, world_size, tuple(keys), layout_bytes)


async def ensure_stored(
    ctx: OperationContext, engine: EngineClient, plan: Plan, *, again: bool = False
) -> tuple[Usage | None, list[str]]:
    """Get every object of the plan into some tier: compute what is missing, and wait until it is there.

    With `again`, what is missing is first deleted from LMCache's memory: it does not write an object to a tier a second
    time while it is resident there. Returns the engine's token counts if it had to compute, and warnings. Raises what
    the engine raises.
    """
    services = ctx.services
    found, warnings = await services.pins.present(plan.names)
    if not found:
        return None, warnings
    present = set().union(*found.values())
    missing = [key for key, name in zip(plan.keys, plan.names, strict=True) if name not in present]
    usage = None
    if missing:
        if again and services.cache:
            answers = await services.cache.delete_each(missing, tier="l1")
            warnings += [answer.message for answer in answers.values() if isinstance(answer, GatewayError)]
        with ctx.step("prefill", len(missing)):
            usage = await engine.prefill(plan.model.id, plan.ids[: plan.chunks * plan.chunk_size], plan.salt)
    with services.traces.step("barrier") as seen:
        seen |= {genai.TOTAL: len(plan.keys), genai.DONE: await _wait_until_stored(ctx, plan)}
    return usage, warnings


async def _wait_until_stored(ctx: OperationContext, plan: Plan) -> int:
    """Wait until every tier has every object, or no more arrive, or `freeze_timeout_s` is over.

    Returns how many objects are in some tier.
    """
    pins, objects = ctx.services.pins, len(plan.keys)
    tiers = len((await pins.present(plan.names[:1]))[0])
    started = moved = time.monotonic()
    most = -1
    found: dict[str, set[str]] = {}
    while True:
        found = await pins.arrived(plan.names, found)
        count = sum(map(len, found.values()))
        somewhere = len(set().union(*found.values()))
        now = time.monotonic()
        if count > most:
            most, moved = count, now
            ctx.progress("barrier", somewhere, objects)
        patience = _SETTLE_S if somewhere == objects else _STALL_S
        if count >= tiers * objects or now - moved > patience or now - started > ctx.services.settings.freeze_timeout_s:
            return somewhere
        await asyncio.sleep(_POLL_S)


async def pin(services: Services, plan: Plan) -> tuple[int, tuple[PinnedObject, ...]]:
    """Pin the plan's objects; return how many leading chunks are complete, and their objects.

    An object of the wrong size is deleted instead. Raises TierFull. The keys have to be claimed
    (`gateway.windows.claims`).
    """
    existing = await services.store.objects(plan.keys)
    by_tier, _ = await services.pins.pin(plan.keys, existing)
    for tier, pinned in by_tier.items():
        for wrong in wrong_sizes(plan, pinned.values()):
            del pinned[str(wrong)]
            await _discard(services, tier, wrong)
    chunks = plan.covered(set().union(*by_tier.values()))
    names = plan.names[: chunks * plan.world_size]
    return chunks, tuple(pinned[name] for name in names for pinned in by_tier.values() if name in pinned)


def wrong_sizes(plan: Plan, pinned: Iterable[PinnedObject]) -> list[ObjectKey]:
    """The objects of one tier whose size cannot be right: those of a rank have the same, for all chunks are whole.

    Right is that of the engine's layout if any has it, for a serde may change it (LMCache 0.5.6, `distributed/serde`),
    else that of most. LMCache (0.5.6) loads an object of any size from S3, without a bound (`s3_l2_adapter.py`).
    """
    sizes = {one.key: one.size for one in pinned}
    by_rank: dict[int, list[ObjectKey]] = {}
    for key, name in zip(plan.keys, plan.names, strict=True):
        if name in sizes:
            by_rank.setdefault(key.rank, []).append(key)
    return [key for keys in by_rank.values() for key in _other_than_usual(keys, sizes, plan.layout_bytes)]


def _other_than_usual(keys: Sequence[ObjectKey], sizes: Mapping[str, int], layout: frozenset[int]) -> list[ObjectKey]:
    counts = Counter(sizes[str(key)] for key in keys)
    usual = max(counts, key=lambda size: (size in layout, counts[size], size))
    return [key for key in keys if sizes[str(key)] != usual]


async def _discard(services: Services, tier: str, key: ObjectKey) -> None:
    """Delete an object and its pin from a tier, and have LMCache forget it."""
    log.error("%s tier: %s had another size than the other chunks of its window: it is deleted", tier, key)
    await services.pins.remove([key], originals=True, only=[tier])
    await drop_from_cache(services, [key], [one for one in services.pins.tiers if one.name == tier])


def with_receipt(
    window: Window, chunks: int, objects: Sequence[PinnedObject], duration_ms: float, more: Mapping[str, Any]
) -> Window:
    """The window with its `chunks` pinned leading chunks, and a receipt of them that includes `more`."""
    pinned = replace(
        window, chunk_count=chunks, size_bytes=sum({o.key: o.size for o in objects}.values()), kv=_state(chunks, window)
    )
    receipt = {
        "tokens": pinned.token_count,
        "chunks": pinned.chunk_count,
        "chunk_size": pinned.chunk_size,
        "tail_tokens": pinned.tail_tokens,
        "bytes": pinned.size_bytes,
        "tiers": _tiers(objects),
        "kv": pinned.kv,
        **more,
        "duration_ms": duration_ms,
    }
    return replace(pinned, receipt=receipt)


def _state(chunks: int, window: Window) -> KvState:
    if not chunks:
        return "absent"
    return "complete" if chunks == window.whole_chunks else "partial"


def _tiers(objects: Sequence[PinnedObject]) -> dict[str, dict[str, int]]:
    tiers: dict[str, dict[str, int]] = {}
    for one in objects:
        tier = tiers.setdefault(one.tier, {"objects": 0, "bytes": 0})
        tier["objects"] += 1
        tier["bytes"] += one.size
    return tiers

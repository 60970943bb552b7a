"""Restore a window's KV: put back what was evicted from the tiers, and load it into LMCache's memory."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import LMCache
from gateway.kv.tiers.base import Restored
from gateway.records import Manifest, PinnedObject, Window
from gateway.runtime.progress import Progress
from gateway.windows.context import Services
from gateway.windows.receipt import whole_chunks

States = Mapping[str, Mapping[str, Restored]]
"""What became of each object, by tier and key."""


@dataclass(slots=True)
class Receipt:
    """What of a window's KV was found. `cached_tokens` is the engine's own count, None unless it was asked."""

    chunks_expected: int
    chunks_found: int = 0
    chunks_relinked: int = 0
    chunks_corrupt: int = 0
    chunks_prefetched: int | None = None
    cached_tokens: int | None = None
    prompt_tokens: int = 0
    partial: bool = False
    duration_ms: float = 0.0
    warnings: list[str] = field(default_factory=list)


async def restore(services: Services, window: Window, manifest: Manifest, progress: Progress) -> Receipt:
    """Put back what eviction took from the tiers, checking every byte; the receipt says what is lost.

    Raises `window_not_found` where the window was deleted since it was read.
    """
    progress("restore", 0, window.chunk_count)
    receipt = Receipt(chunks_expected=whole_chunks(window), prompt_tokens=window.token_count)
    states, receipt.warnings = await put_back(services, window, manifest.objects)
    if damaged := _count(window, manifest.objects, states, receipt):
        receipt.warnings.append(f"{receipt.chunks_corrupt} chunks did not match their checksum and were deleted")
        receipt.warnings += await _drop_from_memory(services, damaged)
    receipt.warnings += missing_kv(window, receipt.chunks_found)
    receipt.partial = window.kv != "complete" or receipt.chunks_found < receipt.chunks_expected
    return receipt


async def restore_and_load(services: Services, window: Window, manifest: Manifest, progress: Progress) -> Receipt:
    """Restore a window's KV and load it into LMCache's memory; where that fails, the receipt has a warning.

    Raises what `restore` raises.
    """
    receipt = await restore(services, window, manifest, progress)
    if receipt.chunks_found and services.cache is not None:
        try:
            receipt.chunks_prefetched = await load(
                services, services.cache, window, manifest, receipt.chunks_found, progress
            )
        except GatewayError as error:  # then the engine loads it itself, or computes it
            receipt.warnings.append(error.message)
    return receipt


async def load(
    services: Services, cache: LMCache, window: Window, manifest: Manifest, chunks: int, progress: Progress
) -> int:
    """Load leading chunks from the tiers into LMCache's memory; return how many. Raises `cache_unavailable`."""
    ids, within = manifest.token_ids[: chunks * window.chunk_size], services.settings.thaw_timeout_s
    objects, _ = await cache.prefetch(
        window.model_root, window.world_size, manifest.id, ids, window.salt, within, progress
    )
    return objects // window.world_size


async def put_back(services: Services, window: Window, objects: Sequence[PinnedObject]) -> tuple[States, list[str]]:
    """Restore objects of a window in every tier; return their states, and warnings. Raises `window_not_found`."""
    async with held(services, window):
        return await services.pins.restore(objects)


@asynccontextmanager
async def held(services: Services, window: Window) -> AsyncIterator[None]:
    """Keep a window and its pins from being deleted for the block. Raises `window_not_found` if that was done before.

    Whoever puts objects back pins what has lost its pin: of a window that was deleted nobody would take them away.
    """
    async with services.pins.lock.acquire(exclusive=False):
        await services.store.check_exists(window)
        yield


def missing_kv(window: Window, chunks_found: int) -> list[str]:
    """A warning about the part of a window's KV that will have to be computed again."""
    expected = whole_chunks(window)
    if window.kv == "absent":
        return [f"the window holds no KV: the engine computes its {window.token_count} tokens again"]
    if chunks_found < expected:
        return [f"the KV of {expected - chunks_found} of {expected} chunks is lost: the engine recomputes it"]
    return []


def _count(window: Window, objects: Sequence[PinnedObject], by_tier: States, receipt: Receipt) -> list[ObjectKey]:
    """Put into the receipt what became of each chunk; return the objects that were damaged in some tier."""
    keys = list(dict.fromkeys(one.key for one in objects))  # in chunk order
    chunk_of = {key: index // window.world_size for index, key in enumerate(keys)}
    with_state: dict[Restored, set[str]] = {state: set() for state in Restored}
    for states in by_tier.values():
        for key, state in states.items():
            with_state[state].add(key)
    usable = with_state[Restored.INTACT] | with_state[Restored.RELINKED]
    receipt.chunks_corrupt = len({chunk_of[key] for key in with_state[Restored.CORRUPT]})
    receipt.chunks_relinked = len({chunk_of[key] for key in with_state[Restored.RELINKED]})
    # What follows a lost chunk cannot be hit: LMCache matches from the front.
    receipt.chunks_found = min((chunk_of[key] for key in keys if key not in usable), default=window.chunk_count)
    return [ObjectKey.parse(key) for key in with_state[Restored.CORRUPT]]


async def _drop_from_memory(services: Services, keys: Sequence[ObjectKey]) -> list[str]:
    """Drop damaged objects from LMCache's memory too: it may have loaded them before we looked; return warnings."""
    if services.cache is None:
        return []
    try:
        await services.cache.delete(keys, tier="l1")
    except GatewayError as error:
        return [error.message]
    return []

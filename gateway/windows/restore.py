"""Restore a window's KV: put back what was evicted from the tiers, and load it into LMCache's memory."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.engines.node import EngineNode
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import LMCache
from gateway.kv.tiers.base import ObjectState
from gateway.records import Manifest, PinnedObject, Session, Window
from gateway.store.types import Saved, WindowQuery
from gateway.telemetry import genai
from gateway.telemetry.traces import clean
from gateway.windows.context import OperationContext, Services
from gateway.windows.delete import drop_from_cache
from gateway.windows.placement import load, place

log = logging.getLogger(__name__)

States = Mapping[str, Mapping[str, ObjectState]]
"""The state of each object, by tier and key."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was found of a window's KV. `cached_tokens` is the engine's own count, None unless it was measured.

    `expected_cached_tokens` are in the chunks that were found; `at_turn` is None for the whole window.
    """

    chunks_expected: int
    chunks_found: int = 0
    chunks_relinked: int = 0
    chunks_corrupt: int = 0
    chunks_prefetched: int | None = None
    cached_tokens: int | None = None
    prompt_tokens: int = 0
    partial: bool = False
    duration_ms: float = 0.0
    as_text: bool = False  # only the text was taken
    saved: Saved | None = None  # by the request that `cached_tokens` was counted in
    first_token_s: float = 0.0  # seconds that it took
    expected_cached_tokens: int = 0
    at_turn: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def computed_tokens(self) -> int:
        """Tokens that the engine has computed, or will compute in the first turn if that was not measured."""
        return self.prompt_tokens - (self.expected_cached_tokens if self.cached_tokens is None else self.cached_tokens)


async def check_and_restore(ctx: OperationContext, window: Window, manifest: Manifest) -> Receipt:
    """Put back what was evicted from the tiers, checking every byte; the receipt says what is lost.

    Raises `window_not_found` if the window has been deleted since it was read.
    """
    with ctx.step("restore", window.chunk_count) as seen:
        states, warnings = await put_back(ctx.services, window, manifest.objects)
        receipt = _receipt(window, manifest.objects, states)
        seen[genai.DONE] = receipt.chunks_found
    if receipt.chunks_corrupt:
        warnings.append(f"{receipt.chunks_corrupt} chunks did not match their checksum and were deleted")
    warnings += await _have_cache_forget(ctx.services, states)
    return replace(receipt, warnings=(*warnings, *missing_kv(window, receipt.chunks_found)))


async def restore_and_load(ctx: OperationContext, window: Window, manifest: Manifest, cache: LMCache | None) -> Receipt:
    """Restore a window's KV and load it into the memory of a cache; if that fails, the receipt has a warning.

    Raises what `check_and_restore` raises.
    """
    receipt = await check_and_restore(ctx, window, manifest)
    if cache is None or not receipt.chunks_found:
        return receipt
    try:
        objects = await load(ctx, cache, window, manifest, receipt.chunks_found)
    except GatewayError as error:  # then the engine loads it itself, or computes it
        return replace(receipt, warnings=(*receipt.warnings, error.message))
    return replace(receipt, chunks_prefetched=objects // window.world_size)


async def put_back(services: Services, window: Window, objects: Sequence[PinnedObject]) -> tuple[States, list[str]]:
    """Restore objects of a window in every tier; return their states, and warnings. Raises `window_not_found`."""
    await services.store.check_exists(window)
    restored = await services.pins.check_and_restore(objects)
    try:
        await services.store.check_exists(window)
    except GatewayError:
        await _unpin(services, objects)  # lost pins were restored too, of a window that was deleted meanwhile
        raise
    return restored


async def _unpin(services: Services, objects: Sequence[PinnedObject]) -> None:
    keys = [ObjectKey.parse(name) for name in dict.fromkeys(one.pin_key for one in objects)]
    async with services.claims.removing(keys) as removal:
        await removal.remove(removal.claimed.keys, originals=False)


def missing_kv(window: Window, chunks_found: int) -> list[str]:
    """A warning about the part of a window's KV that will have to be computed again."""
    expected = window.whole_chunks
    if window.kv == "absent":
        computed = f"the engine computes its {window.token_count} tokens again, unless its own cache has them"
        return [f"the window holds no KV: {computed}"]
    if chunks_found < expected:
        return [f"the KV of {expected - chunks_found} of {expected} chunks is lost: the engine recomputes it"]
    return []


def _receipt(window: Window, objects: Sequence[PinnedObject], by_tier: States) -> Receipt:
    """The receipt of what was restored."""
    keys = list(dict.fromkeys(one.key for one in objects))  # in chunk order
    chunk_of = {key: index // window.world_size for index, key in enumerate(keys)}
    with_state: dict[ObjectState, set[str]] = {state: set() for state in ObjectState}
    for states in by_tier.values():
        for key, state in states.items():
            with_state[state].add(key)
    usable = with_state[ObjectState.INTACT] | with_state[ObjectState.RELINKED]
    # What follows a lost chunk cannot be hit: LMCache matches from the front.
    found = min((chunk_of[key] for key in keys if key not in usable), default=window.chunk_count)
    return Receipt(
        chunks_expected=window.whole_chunks,
        chunks_found=found,
        chunks_relinked=len({chunk_of[key] for key in with_state[ObjectState.RELINKED]}),
        chunks_corrupt=len({chunk_of[key] for key in with_state[ObjectState.CORRUPT]}),
        prompt_tokens=window.token_count,
        # An engine computes at least the last token.
        expected_cached_tokens=max(min(found * window.chunk_size, window.token_count - 1), 0),
        partial=window.kv != "complete" or found < window.whole_chunks,
    )


async def _have_cache_forget(services: Services, states: States) -> list[str]:
    """Delete what is lost or damaged in a tier from LMCache too. Returns warnings.

    It may have loaded damaged bytes already, and it takes for present what it has seen in S3 and not deleted itself.
    """
    warnings: list[str] = []
    for tier in services.pins.tiers:
        lost = [ObjectKey.parse(key) for key, state in states.get(tier.name, {}).items() if not state.usable]
        warnings += await drop_from_cache(services, lost, [tier])
    return warnings


async def restore_for_turn(services: Services, session: Session, model: str = "") -> EngineNode | None:
    """Before the next turn of a frozen or thawed session, restore its window's KV and load it into LMCache's memory.

    Returns the engine into whose cache it was loaded, for the route of the turn; None if nothing was to be loaded.

    The engine could load it when the request arrives, which takes as long. But LMCache can report a miss while another
    request is loading the same objects (`LMCache.prefetch`), as the branches of a fanout do, and the engine would
    compute all of it again. So the request is sent when the load is done. What cannot be restored is computed again:
    nothing is raised.
    """
    if session.state not in ("frozen", "thawed") or not services.pins.tiers:
        return None
    window = await _window_of(services, session)
    if window is None or not window.chunk_count or window.salt != session.salt:
        return None
    tokens = window.chunk_count * window.chunk_size
    node, cache = place(services, session.lineage, prefer=session.engine, model=model, tokens=tokens)
    if cache and cache.has_loaded_lately(window.manifest, tokens, window.salt):
        return node
    with services.traces.step("resume") as seen:
        seen[genai.WINDOW] = clean(window.name)
        is_restored = await _restore_and_load_evicted(services, session, window, cache)
    return node if is_restored else None


async def _restore_and_load_evicted(
    services: Services, session: Session, window: Window, cache: LMCache | None
) -> bool:
    """Return whether the window is still there."""
    try:
        manifest, warnings = await _put_back_evicted(services, window)
    except GatewayError:  # deleted just now
        return False
    for warning in warnings:
        log.warning("session %s continues without all of its KV: %s", session.id, warning)
    if cache is None:
        return True
    try:
        await load(OperationContext(services, session.tenant), cache, window, manifest, window.chunk_count)
    except GatewayError as error:
        log.warning("could not load window %s for session %s: %s", window.name, session.id, error.message)
    return True


async def _put_back_evicted(services: Services, window: Window) -> tuple[Manifest, list[str]]:
    """Restore what is missing by name or size. Almost always that is nothing, and then no lock is taken."""
    manifest, sizes = await services.store.manifest(window), await services.store.sizes(window)
    objects, wanted = manifest.objects, window.chunk_count * window.world_size
    if any(len(by_key) > wanted for by_key in sizes.values()):  # of an earlier turn
        objects = leading(objects, wanted)
        sizes = _sizes_of(objects)
    missing = await services.pins.missing(sizes)
    evicted = [one for one in objects if one.key in missing.get(one.tier, ())]
    if not evicted:
        return manifest, []
    states, warnings = await put_back(services, window, evicted)
    for tier, by_key in states.items():
        if lost := sum(not state.usable for state in by_key.values()):
            warnings.append(f"{tier} tier: {lost} of {window.chunk_count * window.world_size} objects are lost")
    return manifest, warnings


def leading(objects: Sequence[PinnedObject], count: int) -> tuple[PinnedObject, ...]:
    """The objects with the first `count` keys, in every tier."""
    keys = list(dict.fromkeys(one.key for one in objects))
    if count >= len(keys):
        return tuple(objects)
    first = set(keys[:count])
    return tuple(one for one in objects if one.key in first)


def _sizes_of(objects: Sequence[PinnedObject]) -> dict[str, dict[str, int]]:
    sizes: dict[str, dict[str, int]] = {}
    for one in objects:
        sizes.setdefault(one.tier, {})[one.key] = one.size
    return sizes


async def _window_of(services: Services, session: Session) -> Window | None:
    """The window that the session was frozen into or thawed from; None if it was deleted."""
    if session.state == "frozen":
        windows, _ = await services.store.list_windows(session.tenant, WindowQuery(session_id=session.id, limit=1))
        return windows[0] if windows else None
    window = await services.store.window(session.tenant, session.window) if session.window else None
    # Another window may have the name since.
    if window is None or not await _begins_with(services, window, session.window_transcript):
        return None
    if window.transcript == session.window_transcript:
        return window
    # Thawed at an earlier turn: only that much of the window is needed.
    chunks = session.token_count // window.chunk_size if window.chunk_size else 0
    return replace(window, chunk_count=min(window.chunk_count, chunks))


async def _begins_with(services: Services, window: Window, transcript: bytes | None) -> bool:
    return window.transcript == transcript or await services.store.begins_with(window, transcript)

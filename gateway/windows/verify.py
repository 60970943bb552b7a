"""Verify: check every byte of every pinned KV object of a window. Nothing is changed.

In S3 the checksum that S3 keeps is compared, and the bytes are read only in a deep verification.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.memory import MEMORY_TIER
from gateway.kv.tiers.base import ObjectState, Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.runtime.progress import Progress
from gateway.windows import residency
from gateway.windows.catalog import get_window, pinned_keys
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.replay import Replay, replay

_BATCH = 64  # objects between two progress reports


@dataclass(frozen=True, slots=True)
class TierReport:
    """One tier: objects the window has there, the state of their pins, and how many LMCache finds itself.

    `checked` is False if the tier could not be reached; the counts are then 0 and mean nothing. `cpu` is LMCache's
    memory, which is never checked, because its bytes cannot be read; `present` counts there too.
    """

    checked: bool
    objects: int
    intact: int = 0
    damaged: int = 0
    missing: int = 0
    present: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that is not as it was pinned; `tier` is None if the window has it in no tier."""

    hash: str
    rank: int
    chunk: int
    tier: str | None
    state: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a verification. `ok`: the text exists, the window holds KV, everything that was ever pinned was
    found byte for byte in every tier, and in a deep verification the engine continued from each tier's KV as it does
    without (`deep`, None if it was not deep).

    `chunks_usable`: leading chunks that a thaw would find complete in one tier or another.
    """

    window_name: str
    ok: bool
    kv: str
    chunks_expected: int
    chunks_pinned: int
    chunks_usable: int
    tiers: Mapping[str, TierReport]
    damaged: tuple[Damage, ...]
    warnings: tuple[str, ...]
    duration_ms: float
    deep: tuple[Replay, ...] | None = None


States = dict[str, dict[str, ObjectState]]


@instrumented
async def verify(ctx: OperationContext, name: str, *, deep: bool = False) -> Verdict:
    """Check presence, size and checksum of every pinned object of a window. Raises `window_not_found`.

    A tier that cannot be reached raises nothing: it is not `checked`, and the window is not `ok`. `deep` has the engine
    use the KV too (`gateway.windows.replay`), and raises what that raises.
    """
    services = ctx.services
    window = await get_window(services, ctx.tenant, name)
    manifest = await services.store.manifest(window)
    used = dict.fromkeys(o.tier for o in manifest.objects)
    states, warnings = await services.pins.each(
        lambda tier: _states(tier, [o for o in manifest.objects if o.tier == tier.name], ctx.progress, deep=deep),
        only=used,
    )
    configured = {tier.name for tier in services.pins.tiers}
    unknown = [tier for tier in used if tier not in configured]
    warnings += [f"{tier} tier: the window has objects there, but it is not configured" for tier in unknown]
    present, _, _ = await residency.find(services, window, [o.key for o in manifest.objects])
    replays, not_compared = await replay(ctx, window, manifest, states) if deep else (None, [])
    lost_text = await _lost_text(services, window)  # raises if it was deleted: then what is missing is not damage
    verdict = _verdict(window, manifest, states, present)
    equal = replays is None or (len(replays) == len(states) and all(one.equal for one in replays))
    return replace(
        verdict,
        ok=verdict.ok and equal and not lost_text,
        warnings=(*warnings, *not_compared, *lost_text, *verdict.warnings),
        duration_ms=ctx.duration_ms(),
        deep=replays,
    )


async def _lost_text(services: Services, window: Window) -> list[str]:
    """A warning if the text is gone."""
    try:
        await services.store.text(window)
    except GatewayError as error:
        if error.code != "window_corrupted":
            raise
        return [f"{error.message}; {error.hint}"]
    return []


async def _states(
    tier: Tier, objects: Sequence[PinnedObject], progress: Progress, *, deep: bool
) -> dict[str, ObjectState]:
    states: dict[str, ObjectState] = {}
    for start in range(0, len(objects), _BATCH):
        progress(f"verify {tier.name}", start, len(objects))
        batch = objects[start : start + _BATCH]
        states |= zip((o.key for o in batch), await tier.verify(batch, deep=deep), strict=True)
    progress(f"verify {tier.name}", len(objects), len(objects))
    return states


def _verdict(window: Window, manifest: Manifest, states: States, present: Mapping[str, set[str]]) -> Verdict:
    """The verdict on the stored bytes alone."""
    expected = window.whole_chunks
    tiers = {
        name: _report([o for o in manifest.objects if o.tier == name], states.get(name), present.get(name, set()))
        for name in dict.fromkeys(o.tier for o in manifest.objects)
    }
    keys = pinned_keys(window, manifest.token_ids)
    damaged = tuple(_damage(window, manifest, keys, states))
    checked = all(tier.checked for tier in tiers.values())
    if MEMORY_TIER in present:
        tiers[MEMORY_TIER] = TierReport(checked=False, objects=len(keys), present=len(present[MEMORY_TIER]))
    return Verdict(
        window_name=window.name,
        ok=window.kv != "absent" and not damaged and checked,
        kv=window.kv,
        chunks_expected=expected,
        chunks_pinned=window.chunk_count,
        chunks_usable=_usable(window, keys, states),
        tiers=tiers,
        damaged=damaged,
        warnings=_incomplete(window),
        duration_ms=0.0,
    )


def _incomplete(window: Window) -> tuple[str, ...]:
    if window.kv == "complete":
        return ()
    if window.kv == "absent":
        return ("the window holds no KV to verify, only its text and token ids: a thaw computes it again",)
    return (f"the window was frozen with {window.chunk_count} of {window.whole_chunks} chunks",)


def _report(objects: Sequence[PinnedObject], by_key: Mapping[str, ObjectState] | None, present: set[str]) -> TierReport:
    if by_key is None:
        return TierReport(checked=False, objects=len(objects))
    states = list(by_key.values())
    return TierReport(
        checked=True,
        objects=len(objects),
        intact=states.count(ObjectState.INTACT),
        damaged=states.count(ObjectState.CORRUPT),
        missing=states.count(ObjectState.MISSING),
        present=sum(o.key in present for o in objects),
    )


def _damage(window: Window, manifest: Manifest, keys: Sequence[ObjectKey], states: States) -> Iterator[Damage]:
    """In chunk order. The keys come from the token ids, so an object that the manifest lacks is found too."""
    sizes = {o.key: o.size for o in manifest.objects}
    for index, key in enumerate(keys):
        chunk = index // window.world_size
        if str(key) not in sizes:
            yield Damage(key.chunk_hash, key.rank, chunk, None, "missing", None)
        for tier, by_key in states.items():
            state = by_key.get(str(key), ObjectState.INTACT)
            if state is not ObjectState.INTACT:
                word = "missing" if state is ObjectState.MISSING else "damaged"
                yield Damage(key.chunk_hash, key.rank, chunk, tier, word, sizes[str(key)])


def _usable(window: Window, keys: Sequence[ObjectKey], states: States) -> int:
    for index, key in enumerate(keys):
        if not any(by_key.get(str(key)) is ObjectState.INTACT for by_key in states.values()):
            return index // window.world_size
    return window.chunk_count

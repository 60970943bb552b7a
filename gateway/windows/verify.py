"""Verify: check every byte of every pinned KV object of a window. Nothing is changed."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Restored, Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.runtime.progress import Progress, silent
from gateway.windows.catalog import get_window, pinned_keys
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.receipt import whole_chunks
from gateway.windows.replay import Replay, replay

_AT_ONCE = 64  # objects between two words of progress


@dataclass(frozen=True, slots=True)
class TierReport:
    """One tier: objects the window has there, what their pins were found to be, and how many LMCache finds itself.

    `checked` is False where the tier could not be asked; the counts are 0 then, and mean nothing.
    """

    checked: bool
    objects: int
    intact: int = 0
    damaged: int = 0
    missing: int = 0
    present: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that is not as it was when it was pinned; `tier` is None where the window has it in none."""

    hash: str
    rank: int
    chunk: int
    tier: str | None
    state: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification saw. `ok`: the text is there, all that was ever pinned was found, byte for byte, in every
    tier, and, where it was asked for, the engine went on from each tier's KV as it does without (`deep`, None where
    nobody asked).

    `chunks_usable`: leading chunks that a thaw would find whole in one tier or another.
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


States = dict[str, dict[str, Restored]]


@instrumented
async def verify(
    services: Services, tenant: str, name: str, progress: Progress = silent, *, deep: bool = False
) -> Verdict:
    """Check every pinned object of a window: there, of its size, with its checksum. Raises `window_not_found`.

    A tier that cannot be reached raises nothing: it is not `checked`, and the window is not `ok`. `deep` has the engine
    use the KV too (`gateway.windows.replay`), and raises what that raises.
    """
    clock = time.monotonic()
    window = await get_window(services, tenant, name)
    manifest = await services.store.manifest(window)
    used = dict.fromkeys(o.tier for o in manifest.objects)
    states, warnings = await services.pins.each(
        lambda tier: _states(tier, [o for o in manifest.objects if o.tier == tier.name], progress), only=used
    )
    configured = {tier.name for tier in services.pins.tiers}
    unknown = [tier for tier in used if tier not in configured]
    warnings += [f"{tier} tier: the window has objects there, but it is not configured" for tier in unknown]
    present, _ = await services.pins.present([o.key for o in manifest.objects])
    replays, not_compared = await replay(services, window, manifest, states, progress) if deep else (None, [])
    lost_text = await _lost_text(services, window)  # raises if it was deleted: then what is missing is no damage
    verdict = _verdict(window, manifest, states, present, [*warnings, *not_compared, *lost_text], clock)
    same = replays is None or (len(replays) == len(states) and all(one.equal for one in replays))
    return replace(verdict, ok=verdict.ok and same and not lost_text, deep=replays)


async def _lost_text(services: Services, window: Window) -> list[str]:
    """A warning if the text is gone."""
    try:
        await services.store.text(window)
    except GatewayError as error:
        if error.code != "window_corrupted":
            raise
        return [f"{error.message}; {error.hint}"]
    return []


async def _states(tier: Tier, objects: Sequence[PinnedObject], progress: Progress) -> dict[str, Restored]:
    states: dict[str, Restored] = {}
    for start in range(0, len(objects), _AT_ONCE):
        progress(f"verify {tier.name}", start, len(objects))
        some = objects[start : start + _AT_ONCE]
        states |= zip((o.key for o in some), await tier.verify(some), strict=True)
    progress(f"verify {tier.name}", len(objects), len(objects))
    return states


def _verdict(
    window: Window, manifest: Manifest, states: States, present: Mapping[str, set[str]], warnings: Sequence[str],
    clock: float,
) -> Verdict:  # fmt: skip
    tiers = {
        name: _report([o for o in manifest.objects if o.tier == name], states.get(name), present.get(name, set()))
        for name in dict.fromkeys(o.tier for o in manifest.objects)
    }
    damaged = tuple(_damage(window, manifest, states))
    if window.kv != "complete":
        warnings = [*warnings, f"the window was frozen with {window.chunk_count} of {whole_chunks(window)} chunks"]
    return Verdict(
        window_name=window.name,
        ok=not damaged and all(tier.checked for tier in tiers.values()),
        kv=window.kv,
        chunks_expected=whole_chunks(window),
        chunks_pinned=window.chunk_count,
        chunks_usable=_usable(window, manifest, states),
        tiers=tiers,
        damaged=damaged,
        warnings=tuple(warnings),
        duration_ms=round((time.monotonic() - clock) * 1000, 1),
    )


def _report(objects: Sequence[PinnedObject], seen: Mapping[str, Restored] | None, present: set[str]) -> TierReport:
    if seen is None:
        return TierReport(checked=False, objects=len(objects))
    found_as = list(seen.values())
    return TierReport(
        checked=True,
        objects=len(objects),
        intact=found_as.count(Restored.INTACT),
        damaged=found_as.count(Restored.CORRUPT),
        missing=found_as.count(Restored.MISSING),
        present=sum(o.key in present for o in objects),
    )


def _damage(window: Window, manifest: Manifest, states: States) -> Iterable[Damage]:
    """In chunk order; the names come from the token ids, so an object that the manifest lacks is found too."""
    sizes = {o.key: o.size for o in manifest.objects}
    for chunk, key in _chunks(window, manifest):
        if str(key) not in sizes:
            yield Damage(key.chunk_hash, key.rank, chunk, None, "missing", None)
        for tier, seen in states.items():
            state = seen.get(str(key), Restored.INTACT)
            if state is not Restored.INTACT:
                yield Damage(key.chunk_hash, key.rank, chunk, tier, _word(state), sizes[str(key)])


def _usable(window: Window, manifest: Manifest, states: States) -> int:
    for chunk, key in _chunks(window, manifest):
        if not any(seen.get(str(key)) is Restored.INTACT for seen in states.values()):
            return chunk
    return window.chunk_count


def _chunks(window: Window, manifest: Manifest) -> Iterator[tuple[int, ObjectKey]]:
    return ((index // window.world_size, key) for index, key in enumerate(pinned_keys(window, manifest)))


def _word(state: Restored) -> str:
    return "missing" if state is Restored.MISSING else "damaged"

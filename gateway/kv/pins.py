"""Pins across tiers: they hold a window's KV objects, however many windows share them.

An object is pinned once, not once per window; which windows hold it is written in the store. So a clone costs no file
and a delete has to ask the store what nobody else holds. Between pinning and the commit of the manifest the store does
not know the pin yet, and between the commit of a deletion and the unpinning it knows it no more; `FileLock` keeps the
two apart, over all processes of this machine that share the store: freezes hold it shared, deletions and sweeps alone.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gateway.kv.file_lock import FileLock
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Restored, Tier, TierFull, TierUnavailable
from gateway.records import PinnedObject, Sizes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pins:
    """The configured tiers, in the order in which LMCache reads them, and the lock over their pins."""

    tiers: tuple[Tier, ...]
    lock: FileLock

    async def each(
        self, ask: Callable[[Tier], Awaitable[T]], *, only: Collection[str] | None = None, raise_full: bool = False
    ) -> tuple[dict[str, T], list[str]]:
        """Ask each tier, or `only` those of these names; return the answers by tier, and a warning for each that cannot
        be used. With `raise_full` a tier without room raises TierFull.

        Everywhere, warnings are returned like this, beside the value, or are a field of it; no argument collects them.
        """
        answers: dict[str, T] = {}
        warnings: list[str] = []
        for tier in self.tiers:
            if only is not None and tier.name not in only:
                continue
            try:
                answers[tier.name] = await ask(tier)
            except TierUnavailable as error:
                if raise_full and isinstance(error, TierFull):
                    raise
                warnings.append(str(error))
        return answers, warnings

    async def present(self, names: Sequence[str]) -> tuple[dict[str, set[str]], list[str]]:
        """Return which of these keys each reachable tier has, and warnings."""
        sizes, warnings = await self.each(lambda tier: tier.sizes(names))
        present = {
            tier: {name for name, size in zip(names, by_name, strict=True) if size} for tier, by_name in sizes.items()
        }
        return present, warnings

    async def missing(self, held: Sizes) -> dict[str, set[str]]:
        """Return by tier what LMCache would not find, going by names and sizes; all of a tier that cannot be asked."""
        sizes, _ = await self.each(lambda tier: tier.sizes(list(held[tier.name])), only=held)  # `restore` warns
        missing: dict[str, set[str]] = {}
        for tier, objects in held.items():
            there = sizes.get(tier, [0] * len(objects))  # no object is empty
            if there != list(objects.values()):
                missing[tier] = {key for (key, size), seen in zip(objects.items(), there, strict=True) if seen != size}
        return missing

    async def pin(
        self, keys: Sequence[ObjectKey], known: Sequence[PinnedObject]
    ) -> tuple[dict[str, dict[str, PinnedObject]], list[str]]:
        """Pin `keys` in every tier that can be reached; `known` is what windows hold already.

        The answer is by tier and key. Raises TierFull; call it under the shared lock.
        """
        pinned, warnings = await self.each(
            lambda tier: tier.pin(keys, {o.key: o for o in known if o.tier == tier.name}), raise_full=True
        )
        return {tier: {o.key: o for o in objects} for tier, objects in pinned.items()}, warnings

    async def restore(self, objects: Sequence[PinnedObject]) -> tuple[dict[str, dict[str, Restored]], list[str]]:
        """Put back what LMCache lost, checking every byte; the answer is by tier and key."""
        by_tier = {tier.name: [o for o in objects if o.tier == tier.name] for tier in self.tiers}
        states, warnings = await self.each(lambda tier: tier.restore(by_tier[tier.name]))
        return {
            tier: dict(zip((o.key for o in by_tier[tier]), found, strict=True)) for tier, found in states.items()
        }, warnings

    async def remove(self, keys: Sequence[ObjectKey], *, originals: bool) -> tuple[int, list[str]]:
        """Remove the pins, and LMCache's `originals` too if asked, in every tier; return the bytes freed.

        Call it under the exclusive lock.
        """
        freed, warnings = await self.each(lambda tier: tier.remove(keys) if originals else tier.unpin(keys))
        return sum(freed.values()), warnings

    async def under(self, salts: Collection[str]) -> tuple[set[ObjectKey], list[str]]:
        """Return what lies under `salts` in the tiers that can be reached, and a warning for each that cannot."""
        keys, warnings = await self.each(lambda tier: tier.keys_with_salt(salts))
        return set[ObjectKey]().union(*keys.values()), warnings

    async def check_room(self, reserve: int) -> None:
        """Raise TierFull where a tier has less than `reserve` bytes free."""
        by_tier, _ = await self.each(lambda tier: tier.free())  # whoever goes on to use one that hangs is warned
        for tier, free in by_tier.items():
            if free is not None and free < reserve:
                raise TierFull(f"{tier} tier: {free} bytes are free, {reserve} are kept free (disk_reserve_bytes)")

    async def sweep(self, held: Collection[ObjectKey]) -> tuple[int, list[str]]:
        """Unpin what no window holds: what a gateway left that died in mid-freeze. Call it under the exclusive lock."""
        swept, warnings = await self.each(lambda tier: tier.sweep(held))
        return sum(swept.values()), warnings

"""Pins across tiers: they keep a window's KV objects, however many windows share them.

An object is pinned once, not once per window; the store knows which windows hold it. So a clone costs no file, and a
deletion asks the store what no other window holds. A pin exists before its manifest is committed and after its deletion
is: whoever pins or unpins claims the keys (`gateway.windows.claims`), so that neither sees the other half-done.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import ObjectState, Tier, TierFull, TierUnavailable
from gateway.records import PinnedObject, Sizes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pins:
    """The configured tiers, in the order in which LMCache reads them."""

    tiers: tuple[Tier, ...]

    async def each(
        self, ask: Callable[[Tier], Awaitable[T]], *, only: Collection[str] | None = None, raise_full: bool = False
    ) -> tuple[dict[str, T], list[str]]:
        """Call `ask` for each tier, or `only` for those names; return the answers by tier, and a warning for each tier
        that cannot be used. With `raise_full` a full tier raises TierFull.
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
        """Return by tier which of these keys it has, and warnings."""
        sizes, warnings = await self.each(lambda tier: tier.sizes(names))
        present = {
            tier: {name for name, size in zip(names, by_name, strict=True) if size} for tier, by_name in sizes.items()
        }
        return present, warnings

    async def arrived(self, names: Sequence[str], seen: Mapping[str, set[str]]) -> dict[str, set[str]]:
        """Return `seen`, what each tier was seen to have of `names`, with what has been added to that since."""

        async def look(tier: Tier) -> set[str]:
            before = seen.get(tier.name, set())
            awaited = [name for name in names if name not in before]
            return before.union(n for n, size in zip(awaited, await tier.sizes(awaited), strict=True) if size)

        found, _ = await self.each(look)  # the next use of one that cannot be reached warns
        return {**seen, **found}

    async def missing(self, expected: Sizes) -> dict[str, set[str]]:
        """Return by tier what LMCache would not find, by name and size; everything of a tier that cannot be reached.

        Without a warning: `check_and_restore` has it.
        """
        found, _ = await self.each(lambda tier: tier.sizes(list(expected[tier.name]), lately=True), only=expected)
        missing: dict[str, set[str]] = {}
        for tier, objects in expected.items():
            sizes = found.get(tier, [0] * len(objects))  # no object is empty
            if sizes != list(objects.values()):
                missing[tier] = {key for (key, size), now in zip(objects.items(), sizes, strict=True) if now != size}
        return missing

    async def pin(
        self, keys: Sequence[ObjectKey], existing: Sequence[PinnedObject]
    ) -> tuple[dict[str, dict[str, PinnedObject]], list[str]]:
        """Pin `keys` in every tier that can be reached; `existing` is what windows have pinned already.

        Returns the pins by tier and key. Raises TierFull.
        """
        pinned, warnings = await self.each(
            lambda tier: tier.pin(keys, {o.key: o for o in existing if o.tier == tier.name}), raise_full=True
        )
        return {tier: {o.key: o for o in objects} for tier, objects in pinned.items()}, warnings

    async def check_and_restore(
        self, objects: Sequence[PinnedObject]
    ) -> tuple[dict[str, dict[str, ObjectState]], list[str]]:
        """Restore what LMCache lost, checking every byte; return the states by tier and key."""
        by_tier = {tier.name: [o for o in objects if o.tier == tier.name] for tier in self.tiers}
        states, warnings = await self.each(lambda tier: tier.check_and_restore(by_tier[tier.name]))
        return {
            tier: dict(zip((o.key for o in by_tier[tier]), found, strict=True)) for tier, found in states.items()
        }, warnings

    async def remove(
        self, keys: Sequence[ObjectKey], *, originals: bool, only: Collection[str] | None = None
    ) -> tuple[int, list[str]]:
        """Remove the pins, with `originals` LMCache's objects too, from every tier or `only` those; return the bytes
        freed.
        """
        remove = (lambda tier: tier.remove(keys)) if originals else (lambda tier: tier.unpin(keys))
        freed, warnings = await self.each(remove, only=only)
        return sum(freed.values()), warnings

    async def keys_with_salt(self, salts: Collection[str]) -> tuple[set[ObjectKey], list[str]]:
        """Return the objects and pins with one of `salts` in every tier that can be reached."""
        keys, warnings = await self.each(lambda tier: tier.keys_with_salt(salts))
        return set[ObjectKey]().union(*keys.values()), warnings

    async def check_room(self, reserve: int) -> None:
        """Raise TierFull where a tier has less than `reserve` bytes free."""
        by_tier, _ = await self.each(lambda tier: tier.free())  # the next use of an unreachable one warns
        for tier, free in by_tier.items():
            if free is not None and free < reserve:
                raise TierFull(f"{tier} tier: {free} bytes are free, {reserve} are kept free (disk_reserve_bytes)")

    async def discard_unfinished(self, running: Callable[[], Awaitable[Collection[str]]]) -> list[str]:
        """Remove the pins that processes other than those `running` were writing when they ended; return warnings.

        `running` is asked after the tiers, so that whoever has begun in the meantime is not taken for dead.
        """
        writers, warnings = await self.each(lambda tier: tier.writers())
        if not any(writers.values()):
            return warnings
        alive = await running()
        _, more = await self.each(
            lambda tier: tier.discard_unfinished(writers[tier.name].difference(alive)), only=writers
        )
        return [*warnings, *more]

    async def sweep(self, keep: Collection[ObjectKey]) -> tuple[int, list[str]]:
        """Remove all other pins, left by a gateway that died during a freeze."""
        swept, warnings = await self.each(lambda tier: tier.sweep(keep))
        return sum(swept.values()), warnings

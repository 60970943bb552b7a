"""How many objects and bytes are in each tier, and whose; the sums are what disk and Redis would report."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from gateway.kv.tiers.base import Stored
from gateway.windows.context import Services


@dataclass(frozen=True, slots=True)
class Share:
    """Some objects of a tier, and the bytes that they and their pins take."""

    objects: int
    bytes: int

    @classmethod
    def of(cls, found: Collection[Stored]) -> "Share":
        """Count them."""
        return cls(len(found), sum(one.size for one in found))


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier. `windows`, `sessions`, `forgotten` and `unknown` add up to the whole.

    windows: held by one · sessions: under the salt of one · forgotten: goes at a sweep · unknown: of nobody we know.
    """

    name: str
    total: Share
    pinned: Share
    windows: Share
    sessions: Share
    forgotten: Share
    unknown: Share


@dataclass(frozen=True, slots=True)
class _Known:
    held: frozenset[tuple[int, int, str, str]]
    used: frozenset[str]
    loose: frozenset[str]

    def owner(self, one: Stored) -> str:
        if one.key.address in self.held:
            return "windows"
        salt = one.key.salt
        return "sessions" if salt in self.used else "forgotten" if salt in self.loose else "unknown"


async def usage(services: Services) -> tuple[list[TierUse], list[str]]:
    """Look at each tier; return what it holds, and a warning for each that cannot be reached."""
    known = await _known(services)
    stored, warnings = await services.pins.each(lambda tier: tier.inventory())
    return [await asyncio.to_thread(_use, tier, objects, known) for tier, objects in stored.items()], warnings


async def _known(services: Services) -> _Known:
    held = await services.store.held_objects() | await services.store.isolated_names()
    used = frozenset(use.salt for use in await services.store.salt_uses())
    return _Known(
        frozenset(key.address for key in held),
        used,
        frozenset(gone.salt for gone in await services.store.orphaned_salts()),
    )


def _use(name: str, found: Sequence[Stored], known: _Known) -> TierUse:
    by_owner = {owner: Share.of(some) for owner, some in _grouped(found, known).items()}
    pinned = [one for one in found if one.pin]
    return TierUse(name, Share.of(found), Share(len(pinned), sum(one.pin for one in pinned)), **by_owner)


def _grouped(found: Iterable[Stored], known: _Known) -> dict[str, list[Stored]]:
    groups: dict[str, list[Stored]] = {"windows": [], "sessions": [], "forgotten": [], "unknown": []}
    for one in found:
        groups[known.owner(one)].append(one)
    return groups

"""How many objects and bytes are in each tier, and for whom; the sums are what disk and Redis would report."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway.kv.tiers.base import Stored
from gateway.windows.context import Services


@dataclass(frozen=True, slots=True)
class Share:
    """Some objects of a tier, and the bytes that they and their pins take."""

    objects: int
    bytes: int

    @classmethod
    def of(cls, objects: Collection[Stored]) -> "Share":
        """The share that these objects are."""
        return cls(len(objects), sum(one.size for one in objects))


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier. `windows`, `sessions`, `forgotten` and `unknown` add up to the total.

    `listed` is False for a tier that is never listed: then only the pins are counted, which are those that windows
    hold, as the store has them; how much else lies there is not known.

    windows: a window holds it · sessions: has the salt of a session · forgotten: the next sweep deletes it ·
    unknown: none of these.
    """

    name: str
    total: Share
    pinned: Share
    windows: Share
    sessions: Share
    forgotten: Share
    unknown: Share
    listed: bool = True


@dataclass(frozen=True, slots=True)
class _Owners:
    """What windows hold, by address, and the salts of sessions, and those that are orphaned."""

    held: frozenset[tuple[int, int, str, str]]
    used: frozenset[str]
    orphaned: frozenset[str]

    def owner(self, one: Stored) -> str:
        if one.key.address in self.held:
            return "windows"
        salt = one.key.salt
        return "sessions" if salt in self.used else "forgotten" if salt in self.orphaned else "unknown"


async def usage(services: Services) -> tuple[list[TierUse], list[str]]:
    """Return what each tier holds, and a warning for each that cannot be reached."""
    store = services.store
    held = await store.held_objects() | await store.isolated_names()
    owners = _Owners(
        frozenset(key.address for key in held),
        frozenset(use.salt for use in await store.salt_uses()),
        frozenset(one.salt for one in await store.orphaned_salts()),
    )
    listed = [tier.name for tier in services.pins.tiers if tier.lists]
    stored, warnings = await services.pins.each(lambda tier: tier.inventory(), only=listed)
    uses = [await asyncio.to_thread(_use, tier, objects, owners) for tier, objects in stored.items()]
    held_in = await store.tier_usage()
    unlisted = [tier.name for tier in services.pins.tiers if not tier.lists]
    return [*uses, *(_pins_use(name, Share(*held_in.get(name, (0, 0)))) for name in unlisted)], warnings


def _pins_use(name: str, pins: Share) -> TierUse:
    """The use of a tier that is never listed."""
    nothing = Share(0, 0)
    return TierUse(name, pins, pins, pins, nothing, nothing, nothing, listed=False)


def _use(name: str, stored: Sequence[Stored], owners: _Owners) -> TierUse:
    by_owner: dict[str, list[Stored]] = {"windows": [], "sessions": [], "forgotten": [], "unknown": []}
    for one in stored:
        by_owner[owners.owner(one)].append(one)
    pins = [one.pin for one in stored if one.pin]
    windows, sessions, forgotten, unknown = map(Share.of, by_owner.values())
    return TierUse(name, Share.of(stored), Share(len(pins), sum(pins)), windows, sessions, forgotten, unknown)

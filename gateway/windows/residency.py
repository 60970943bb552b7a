"""Where the KV objects of a window are now: in which durable tiers, and whether in LMCache's memory."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.kv.memory import MEMORY_TIER
from gateway.records import Window
from gateway.windows.context import Services

Present = dict[str, set[str]]
"""The keys that LMCache finds in each tier. `cpu` is there only where it is known (`gateway.kv.memory`)."""


class Residency(NamedTuple):
    """Which of a window's objects each tier has, whether the memory of each cache has all of them (None: not known),
    and a warning for each durable tier that cannot be reached.
    """

    present: Present
    caches: Mapping[str, bool | None]
    warnings: list[str]


async def find(services: Services, window: Window, names: Sequence[str]) -> Residency:
    """Find a window's objects."""
    present, warnings = await services.pins.present(names)
    caches: dict[str, bool | None] = {}
    if services.cache is not None and names:
        caches = await services.cache.in_memory(window.manifest, window.salt)
        is_there = _in_any(caches)
        if is_there is not None:
            present[MEMORY_TIER] = set(names) if is_there else set()
    return Residency(present, caches, warnings)


def _in_any(by_cache: Mapping[str, bool | None]) -> bool | None:
    """Whether a window is in the memory of some node; None if that is not known."""
    if True in by_cache.values():
        return True
    return None if None in by_cache.values() or not by_cache else False

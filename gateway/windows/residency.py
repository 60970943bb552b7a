"""Where the KV objects of a window are now: in which durable tiers, and whether in LMCache's memory."""

from collections.abc import Sequence

from gateway.kv.memory import MEMORY_TIER
from gateway.records import Window
from gateway.windows.context import Services

Present = dict[str, set[str]]
"""The keys that LMCache finds in each tier. `cpu` is there only where it is known (`gateway.kv.memory`)."""


async def find(services: Services, window: Window, names: Sequence[str]) -> tuple[Present, list[str]]:
    """Return which of a window's objects each tier has, and a warning for each durable tier that cannot be reached."""
    present, warnings = await services.pins.present(names)
    if services.cache is not None and names:
        is_there = await services.cache.is_in_memory(window.manifest, window.salt)
        if is_there is not None:
            present[MEMORY_TIER] = set(names) if is_there else set()
    return present, warnings

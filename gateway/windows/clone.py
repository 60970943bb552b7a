"""Clone: another name for the same pins. No KV byte is copied, no file is made."""

import time
from dataclasses import replace

from gateway.parts import Parts
from gateway.records import Manifest, Window
from gateway.windows.counted import counted
from gateway.windows.freeze import Naming, taken
from gateway.windows.thaw import found, not_found, usable


@counted
async def clone(parts: Parts, tenant: str, source: str, naming: Naming) -> Window:
    """Give a window a second name with a life of its own. Raises `window_not_found`, `window_already_exists`.

    What `naming` leaves empty is the source's.
    """
    original = await usable(parts, tenant, source)
    copy = copied(original, naming)
    await add(parts, copy, original, None)
    return copy


def copied(original: Window, naming: Naming) -> Window:
    """The window under its second name."""
    return replace(
        original,
        name=naming.name,
        description=naming.description or original.description,
        tags=naming.tags or original.tags,
        parent=original.name,
        created_at=time.time(),
        expires_at=None,
    )


async def add(parts: Parts, copy: Window, original: Window, manifest: Manifest | None) -> None:
    """Commit a copy. Raises `window_already_exists`, and `window_not_found` where its source has gone meanwhile."""
    # Between our reading and our writing the source may have been deleted, and its pins with it.
    async with parts.pins.lock.hold(alone=False):
        now = await found(parts, original.tenant, original.name)
        if now.manifest != original.manifest:  # another window has its name
            raise not_found(original.name)
        if not await parts.store.add_window(copy, manifest):
            raise taken(copy.name)

"""Clone: another name for the same pins. No KV byte is copied, no file is made."""

import time
from dataclasses import replace

from gateway.parts import Parts
from gateway.records import Window
from gateway.windows.counted import counted
from gateway.windows.freeze import Naming, taken
from gateway.windows.thaw import found, usable


@counted
async def clone(parts: Parts, tenant: str, source: str, naming: Naming) -> Window:
    """Give a window a second name with a life of its own. Raises `window_not_found`, `window_already_exists`.

    What `naming` leaves empty is the source's.
    """
    original = await usable(parts, tenant, source)
    copy = replace(
        original,
        name=naming.name,
        description=naming.description or original.description,
        tags=naming.tags or original.tags,
        parent=original.name,
        created_at=time.time(),
        expires_at=None,
    )
    # Between our reading and our writing the source may have been deleted, and its pins with it.
    async with parts.pins.lock.hold(alone=False):
        await found(parts, tenant, source)
        if not await parts.store.add_window(copy, None):
            raise taken(naming.name)
    return copy

"""Clone: another name for the same pins. No KV byte is copied, no file is created."""

import time
from dataclasses import replace

from gateway.records import Manifest, Window
from gateway.windows.catalog import get_usable_window
from gateway.windows.context import Services
from gateway.windows.freeze import Naming, window_name_taken
from gateway.windows.instrumented import instrumented


@instrumented
async def clone(services: Services, tenant: str, source: str, naming: Naming) -> Window:
    """Give a window a second name with a life of its own. Raises `window_not_found`, `window_already_exists`.

    What `naming` leaves empty is the source's.
    """
    original = await get_usable_window(services, tenant, source)
    return await add(services, copied(original, naming), original, None)


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


async def add(services: Services, copy: Window, original: Window, manifest: Manifest | None) -> Window:
    """Commit a copy. Raises `window_already_exists`, and `window_not_found` where its source has gone meanwhile.

    The store looks for the source when it commits, so no lock on the pins is needed: a deletion before that leaves no
    source, and one after it finds that the copy holds the pins.
    """
    committed = await services.store.copy_window(copy, original, manifest)
    if committed is None:
        raise window_name_taken(copy.name)
    return committed

"""Before a frozen session's next turn or a thawed one's first: restore its KV and load it."""

import logging

from gateway.errors import GatewayError
from gateway.kv.tiers.base import Restored
from gateway.records import Session, Window
from gateway.runtime.progress import silent
from gateway.store.types import WindowQuery
from gateway.windows.context import Services
from gateway.windows.restore import load, put_back

log = logging.getLogger(__name__)


async def resume(services: Services, session: Session) -> None:
    """Put back what eviction took of a session's window, and load it into the cache's memory, before the next turn.

    The engine would load it itself when the request arrives, and has to wait for it too. But of several that go on at
    once, as the branches of a fanout do, LMCache would tell some that there is nothing (see `LMCache.prefetch`), and
    the engine would compute all of it again. So the request follows when the load is done. What cannot be put back is
    computed again: nothing raises.
    """
    if session.state not in ("frozen", "thawed") or not services.pins.tiers:
        return
    window = await _window(services, session)
    if window is None or window.kv == "absent" or window.salt != session.salt:
        return
    whole = window.chunk_count * window.chunk_size
    if services.cache and services.cache.has_loaded_lately(window.manifest, whole, window.salt):
        return
    try:
        manifest, sizes = await services.store.manifest(window), await services.store.sizes(window)
        missing = await services.pins.missing(sizes)
        evicted = [o for o in manifest.objects if o.key in missing.get(o.tier, ())]
        # Nearly always there is nothing to put back: then no lock is waited for.
        states, warnings = await put_back(services, window, evicted) if evicted else ({}, [])
    except GatewayError:  # deleted just now
        return
    for tier, by_key in states.items():
        if lost := sum(state in (Restored.MISSING, Restored.CORRUPT) for state in by_key.values()):
            warnings.append(f"{tier} tier: {lost} of {window.chunk_count * window.world_size} objects are lost")
    for warning in warnings:
        log.warning("session %s continues without all of its KV: %s", session.id, warning)
    if services.cache is None:
        return
    try:
        await load(services, services.cache, window, manifest, window.chunk_count, silent)
    except GatewayError as error:
        log.warning("could not load window %s for session %s: %s", window.name, session.id, error.message)


async def _window(services: Services, session: Session) -> Window | None:
    """The window that the session was frozen into, or thawed from. None where it was deleted."""
    if session.state == "frozen":
        windows, _ = await services.store.list_windows(session.tenant, WindowQuery(session_id=session.id, limit=1))
        return windows[0] if windows else None
    window = await services.store.window(session.tenant, session.window) if session.window else None
    # Another one may have the name since.
    return window if window and window.transcript == session.window_transcript else None

"""A frozen session goes on: its KV is put back where LMCache looks for it, and loaded into memory, by itself."""

import logging

from gateway.errors import GatewayError
from gateway.parts import Parts
from gateway.progress import silent
from gateway.records import Session
from gateway.store.contract import WindowQuery

log = logging.getLogger(__name__)


async def resume(parts: Parts, session: Session) -> None:
    """Put back what eviction took of a frozen session's KV, and load it into the cache's memory.

    The engine would load it itself when the request arrives, and has to wait for it too. But who asks LMCache (0.5.6)
    for objects that somebody else is just loading may be told that there are none: of 12 sessions that went on while
    their prefetch was on its way, one had nothing cached. So the request follows when it is done. What cannot be put
    back is computed again: nothing raises.
    """
    if session.state != "frozen" or parts.cache is None or not parts.pins.tiers:
        return
    windows, _ = await parts.store.list_windows(session.tenant, WindowQuery(session_id=session.id, limit=1))
    window = windows[0] if windows else None
    if window is None or window.kv == "absent" or window.salt != session.salt:
        return
    try:
        manifest, sizes = await parts.store.manifest(window), await parts.store.sizes(window)
    except GatewayError:  # deleted just now
        return
    missing = await parts.pins.missing(sizes)
    _, warnings = await parts.pins.restore([o for o in manifest.objects if o.key in missing.get(o.tier, ())])
    for warning in warnings:
        log.warning("session %s goes on without all of its KV: %s", session.id, warning)
    whole = manifest.token_ids[: window.chunk_count * window.chunk_size]
    try:
        await parts.cache.prefetch(
            window.model_root, window.world_size, whole, window.salt, parts.settings.thaw_timeout_s, silent
        )
    except GatewayError as error:
        log.warning("could not load window %s for session %s: %s", window.name, session.id, error.message)

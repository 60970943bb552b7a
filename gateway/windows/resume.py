"""A frozen session goes on: its KV is put back where LMCache looks for it, and on its way into memory, by itself."""

import logging

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.parts import Parts
from gateway.progress import silent
from gateway.records import Session, Window
from gateway.store.contract import WindowQuery

log = logging.getLogger(__name__)


async def resume(parts: Parts, session: Session) -> None:
    """Put back what eviction took of a frozen session's KV, and start to load it; return before it is loaded.

    The engine asks the cache when the request arrives, so what is missing must be there before; loading it into memory
    only saves time. What cannot be put back is computed again, so nothing raises.
    """
    if session.state != "frozen" or parts.cache is None or not parts.pins.tiers:
        return
    windows, _ = await parts.store.list_windows(session.tenant, WindowQuery(session_id=session.id, limit=1))
    window = windows[0] if windows else None
    if window is None or window.kv == "absent" or window.salt != session.salt:
        return
    try:
        manifest = await parts.store.manifest(window.manifest)
    except GatewayError:  # deleted just now
        return
    keys = [ObjectKey.parse(one.key) for one in manifest.objects]
    present, warnings = await parts.pins.present(keys)
    lost = [one for one, key in zip(manifest.objects, keys, strict=True) if key not in present.get(one.tier, set())]
    if lost:
        _, more = await parts.pins.restore(lost)
        warnings += more
    for warning in warnings:
        log.warning("session %s goes on without all of its KV: %s", session.id, warning)
    parts.chores.begin(_load(parts, window, manifest.token_ids), f"prefetch for session {session.id}")


async def _load(parts: Parts, window: Window, ids: tuple[int, ...]) -> None:
    if parts.cache is None:
        return
    whole = ids[: window.chunk_count * window.chunk_size]
    try:
        await parts.cache.prefetch(
            window.model_root, window.world_size, whole, window.salt, parts.settings.thaw_timeout_s, silent
        )
    except GatewayError as error:
        log.warning("could not prefetch window %s: %s", window.name, error.message)

"""Delete what is no longer needed in periodic sweeps; one of several workers runs them."""

import asyncio
import logging
import time

from gateway.errors import GatewayError
from gateway.kv.file_lock import FileLock
from gateway.records import Window
from gateway.runtime.clock import Clock
from gateway.windows.context import Services
from gateway.windows.delete import delete
from gateway.windows.retention import orphans
from gateway.windows.retention.quota import keep_budgets

log = logging.getLogger(__name__)

_WINDOWS_AT_ONCE = 100


async def run_sweeper(services: Services) -> None:
    """Sweep every `sweep_every_s`, for ever."""
    every = services.settings.sweep_every_s
    # Held for life: a worker that dies lets go of it, and another takes over.
    async with FileLock(services.settings.data_path / "sweep.lock", poll_s=every).acquire(exclusive=True):
        clock, doubt = Clock(services.settings.clock_hold_s), ""
        clock.started_after(await services.store.newest())
        while True:
            await asyncio.sleep(every)
            before, doubt = doubt, clock.doubt()
            if doubt and not before:
                log.warning("nothing expires for up to %g s (clock_hold_s): %s", services.settings.clock_hold_s, doubt)
            await sweep(services, expire=not doubt)


async def sweep(services: Services, *, expire: bool = True) -> None:
    """One round. A step that fails is logged and keeps the others from nothing; with `expire` age is a reason to go."""
    if expire:
        await services.background.run_logged(_windows(services), "deleting expired windows")
    await services.background.run_logged(_sessions(services, expire=expire), "forgetting idle sessions")
    await services.background.run_logged(_loose(services), "removing KV that nobody needs")
    await services.background.run_logged(keep_budgets(services), "keeping the budgets")


async def _windows(services: Services) -> None:
    by = time.time() - services.settings.expiry_grace_s
    while expired := await services.store.expired_windows(by, _WINDOWS_AT_ONCE):
        for window in expired:
            await _expire(services, window, by)


async def _expire(services: Services, window: Window, by: float) -> None:
    try:
        done = await delete(services, window.tenant, window.name, expired_by=by)
    except GatewayError as error:
        if error.code != "window_not_found":  # else somebody was faster, or has given it more time
            raise
        return
    freed = f"{done.blocks_deleted} KV objects, {done.space_freed_bytes} bytes"
    log.info("window %s has expired and was deleted: %s", window.name, freed)
    for warning in done.warnings:
        log.warning("window %s: %s", window.name, warning)


async def _sessions(services: Services, *, expire: bool) -> None:
    beyond, expired = await orphans.forget_sessions(services, expire=expire)
    if beyond:
        log.info("forgot %d sessions that were idle longest: more than sessions_kept", beyond)
    if expired:
        log.info("forgot %d sessions that were idle longer than session_ttl_s", expired)


async def _loose(services: Services) -> None:
    done = await orphans.forget_loose(services)
    if done.blocks_deleted:
        log.info("removed %d KV objects (%d bytes) that nobody needs", done.blocks_deleted, done.space_freed_bytes)
    for warning in done.warnings:
        log.warning("could not remove all KV that nobody needs: %s", warning)

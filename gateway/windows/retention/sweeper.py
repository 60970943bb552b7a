"""Garbage: what nobody asks for any more goes by itself, in rounds; of several workers one does them."""

import asyncio
import logging
import time

from gateway.errors import GatewayError
from gateway.kv.pins import Lock
from gateway.records import Window
from gateway.runtime.clock import Clock
from gateway.windows.context import Parts
from gateway.windows.delete import delete
from gateway.windows.retention import orphans
from gateway.windows.retention.quota import keep_budgets

log = logging.getLogger(__name__)

_WINDOWS_AT_ONCE = 100


async def keep_tidy(parts: Parts) -> None:
    """Sweep every `sweep_every_s`, for ever."""
    every = parts.settings.sweep_every_s
    # Held for life: a worker that dies lets go of it, and another takes over.
    async with Lock(parts.settings.data_path / "sweep.lock", poll_s=every).hold(alone=True):
        clock, doubt = Clock(parts.settings.clock_hold_s), ""
        clock.started_after(await parts.store.newest())
        while True:
            await asyncio.sleep(every)
            before, doubt = doubt, clock.doubt()
            if doubt and not before:
                log.warning("nothing expires for up to %g s (clock_hold_s): %s", parts.settings.clock_hold_s, doubt)
            await sweep(parts, expire=not doubt)


async def sweep(parts: Parts, *, expire: bool = True) -> None:
    """One round. A step that fails is logged and keeps the others from nothing; with `expire` age is a reason to go."""
    if expire:
        await parts.chores.attempt(_windows(parts), "deleting expired windows")
    await parts.chores.attempt(_sessions(parts, expire=expire), "forgetting idle sessions")
    await parts.chores.attempt(_loose(parts), "removing KV that nobody needs")
    await parts.chores.attempt(keep_budgets(parts), "keeping the budgets")


async def _windows(parts: Parts) -> None:
    by = time.time() - parts.settings.expiry_grace_s
    while expired := await parts.store.expired_windows(by, _WINDOWS_AT_ONCE):
        for window in expired:
            await _expire(parts, window, by)


async def _expire(parts: Parts, window: Window, by: float) -> None:
    try:
        done = await delete(parts, window.tenant, window.name, expired_by=by)
    except GatewayError as error:
        if error.code != "window_not_found":  # else somebody was faster, or has given it more time
            raise
        return
    freed = f"{done.blocks_deleted} KV objects, {done.space_freed_bytes} bytes"
    log.info("window %s has expired and was deleted: %s", window.name, freed)
    for warning in done.warnings:
        log.warning("window %s: %s", window.name, warning)


async def _sessions(parts: Parts, *, expire: bool) -> None:
    beyond, expired = await orphans.forget_sessions(parts, expire=expire)
    if beyond:
        log.info("forgot %d sessions that were idle longest: more than sessions_kept", beyond)
    if expired:
        log.info("forgot %d sessions that were idle longer than session_ttl_s", expired)


async def _loose(parts: Parts) -> None:
    done = await orphans.forget_loose(parts)
    if done.blocks_deleted:
        log.info("removed %d KV objects (%d bytes) that nobody needs", done.blocks_deleted, done.space_freed_bytes)
    for warning in done.warnings:
        log.warning("could not remove all KV that nobody needs: %s", warning)

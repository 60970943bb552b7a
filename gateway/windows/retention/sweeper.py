"""Delete what is no longer needed in periodic sweeps; one of the gateways that share a store runs them."""

import asyncio
import logging
import time
from collections.abc import Awaitable

from gateway.errors import GatewayError
from gateway.records import Window
from gateway.runtime.clock import Clock, since_boot
from gateway.store.types import StoreUnavailable
from gateway.telemetry import genai
from gateway.windows.context import OperationContext, Services
from gateway.windows.delete import delete
from gateway.windows.retention import orphans
from gateway.windows.retention.quota import enforce_quotas

log = logging.getLogger(__name__)

_BATCH = 100  # windows


async def run_sweeper(services: Services) -> None:
    """Sweep every `sweep_every_s` while this gateway has the lease to do so, until it is cancelled.

    The lease ends with the gateway: then another takes over.
    """
    while True:
        if await _may_sweep(services):
            await _sweep_while_leased(services)
        await asyncio.sleep(services.settings.sweep_every_s)


async def _may_sweep(services: Services) -> bool:
    try:
        return await services.leases.keep("sweep")
    except StoreUnavailable as error:
        log.warning("could not tell which gateway sweeps: %s", error.message)
        return False


async def _sweep_while_leased(services: Services) -> None:
    every, hold_s = services.settings.sweep_every_s, services.settings.clock_hold_s
    clock, doubt = Clock(hold_s), ""
    clock.started_after(await services.store.newest())
    held_at: float | None = None
    while await _may_sweep(services):
        held_at = await _add_up_held(services, held_at, doubt=clock.doubt())
        await asyncio.sleep(every)
        before, doubt = doubt, clock.doubt()
        if doubt and not before:
            log.warning("nothing expires for up to %g s (clock_hold_s): %s", hold_s, doubt)
        await sweep(services, expire=not doubt)


async def _add_up_held(services: Services, before: float | None, *, doubt: str) -> float:
    """Add up the bytes that windows have held since `before`, a time since boot; return the time now.

    Without `before` by the wall clock, for KV is held while no gateway runs, unless that clock is in doubt.
    """
    now = since_boot()
    elapsed_s = now - before if before is not None else 0.0 if doubt else None
    await _run_logged(_hold(services, elapsed_s), "adding up what windows hold")
    return now


async def _hold(services: Services, elapsed_s: float | None) -> None:
    tiers = await services.store.tier_usage()
    await services.store.hold(sum(size for _, size in tiers.values()), time.time(), elapsed_s)


async def sweep(services: Services, *, expire: bool = True) -> None:
    """Sweep once; with `expire`, also what is too old. A step that fails is logged, and does not stop the others."""
    if expire:
        await _run_logged(_expire_windows(services), "deleting expired windows")
    await _run_logged(_delete_sessions(services, expire=expire), "deleting idle sessions")
    await _run_logged(_delete_orphans(services), "deleting KV that nobody needs")
    await _run_logged(enforce_quotas(services), "enforcing the quotas")


async def _run_logged(step: Awaitable[None], name: str) -> None:
    try:
        await step
    except StoreUnavailable as error:
        log.warning("%s failed: %s", name, error.message)
    except Exception:
        log.exception("%s failed", name)


async def _expire_windows(services: Services) -> None:
    by = time.time() - services.settings.expiry_grace_s
    while expired := await services.store.expired_windows(by, _BATCH):
        for window in expired:
            await _expire(services, window, by)


async def _expire(services: Services, window: Window, by: float) -> None:
    try:
        with services.traces.automatic("expiry", None, {genai.REASON: "expired"}):
            deleted = await delete(OperationContext(services, window.tenant), window.name, expired_by=by)
    except GatewayError as error:
        if error.code != "window_not_found":  # else it was deleted or its expiry was extended meanwhile
            raise
        return
    freed = f"{deleted.blocks_deleted} KV objects, {deleted.space_freed_bytes} bytes"
    log.info("window %s has expired and was deleted: %s", window.name, freed)
    for warning in deleted.warnings:
        log.warning("window %s: %s", window.name, warning)


async def _delete_sessions(services: Services, *, expire: bool) -> None:
    beyond, expired = await orphans.delete_idle_sessions(services, expire=expire)
    if beyond:
        log.info("deleted %d sessions that were idle longest: more than sessions_kept", beyond)
    if expired:
        log.info("deleted %d sessions that were idle longer than session_ttl_s", expired)


async def _delete_orphans(services: Services) -> None:
    deleted = await orphans.delete_orphans(services)
    if deleted.blocks_deleted:
        freed = deleted.space_freed_bytes
        log.info("deleted %d KV objects (%d bytes) that nobody needs", deleted.blocks_deleted, freed)
    for warning in deleted.warnings:
        log.warning("could not delete all KV that nobody needs: %s", warning)

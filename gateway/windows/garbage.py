"""Garbage: what nobody asks for any more goes by itself, in rounds; of several workers one does them."""

import asyncio
import logging

from gateway.kv.pins import Lock
from gateway.parts import Parts
from gateway.windows import forget

log = logging.getLogger(__name__)


async def keep_tidy(parts: Parts) -> None:
    """Sweep every `sweep_every_s`, for ever; a round that fails is logged, and the next one comes."""
    every = parts.settings.sweep_every_s
    # Held for life: a worker that dies lets go of it, and another takes over.
    async with Lock(parts.settings.data_path / "sweep.lock", poll_s=every).hold(alone=True):
        while True:
            await parts.chores.attempt(sweep(parts), "the sweep")
            await asyncio.sleep(every)


async def sweep(parts: Parts) -> None:
    """One round."""
    await _sessions(parts)
    await _loose(parts)


async def _sessions(parts: Parts) -> None:
    beyond, expired = await forget.forget_sessions(parts)
    if beyond:
        log.info("forgot %d sessions that were idle longest: more than sessions_kept", beyond)
    if expired:
        log.info("forgot %d sessions that were idle longer than session_ttl_s", expired)


async def _loose(parts: Parts) -> None:
    done = await forget.forget_loose(parts)
    if done.blocks_deleted:
        log.info("removed %d KV objects (%d bytes) that nobody needs", done.blocks_deleted, done.space_freed_bytes)
    for warning in done.warnings:
        log.warning("could not remove all KV that nobody needs: %s", warning)

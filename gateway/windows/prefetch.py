"""Prefetch: load a window's KV into LMCache's memory before it is needed."""

import time

from gateway.errors import GatewayError
from gateway.runtime.progress import Progress, silent
from gateway.windows.catalog import get_usable_window, served_model
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.restore import Receipt, load, restore


@instrumented
async def prefetch(services: Services, tenant: str, name: str, progress: Progress = silent) -> Receipt:
    """Load a window's chunks from disk or Redis into the cache's memory; make no session.

    Raises `window_not_found`, `model_mismatch`, `cache_unavailable`. Chunks that are lost or damaged raise nothing: the
    receipt says `partial`.
    """
    clock = time.monotonic()
    window = await get_usable_window(services, tenant, name)
    await served_model(services, window)
    if services.cache is None:
        raise GatewayError("cache_unavailable", "no cache is configured to load into", hint="set cache_url")
    manifest = await services.store.manifest(window)
    receipt = await restore(services, window, manifest, progress)
    if chunks := receipt.chunks_found:
        receipt.chunks_prefetched = await load(services, services.cache, window, manifest, chunks, progress)
    receipt.partial = (receipt.chunks_prefetched or 0) < receipt.chunks_expected
    receipt.duration_ms = round((time.monotonic() - clock) * 1000, 1)
    return receipt

"""Prefetch: a window's KV goes up a tier, into LMCache's memory, before anybody asks for it."""

import time

from gateway.errors import GatewayError
from gateway.runtime.progress import Progress, silent
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.receipt import whole_chunks
from gateway.windows.thaw import Receipt, load, restore, served, usable


@instrumented
async def prefetch(services: Services, tenant: str, name: str, progress: Progress = silent) -> Receipt:
    """Load a window's chunks from disk or Redis into the cache's memory; make no session.

    Raises `window_not_found`, `model_mismatch`, `cache_unavailable`. Chunks that are lost or damaged raise nothing: the
    receipt says `partial`.
    """
    clock = time.monotonic()
    window = await usable(services, tenant, name)
    await served(services, window)
    if services.cache is None:
        raise GatewayError("cache_unavailable", "no cache is configured to load into", hint="set cache_url")
    manifest = await services.store.manifest(window)
    receipt = Receipt(chunks_expected=whole_chunks(window), prompt_tokens=window.token_count)
    await restore(services, window, manifest.objects, receipt, progress)
    if receipt.chunks_found:
        await load(services, services.cache, window, manifest, receipt, progress)
    receipt.partial = (receipt.chunks_prefetched or 0) < receipt.chunks_expected
    receipt.duration_ms = round((time.monotonic() - clock) * 1000, 1)
    return receipt

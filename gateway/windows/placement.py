"""Where the next turn of a lineage will be served: its engine, and the cache that this engine loads from."""

import time
from typing import NamedTuple

from gateway.engines.node import EngineNode
from gateway.kv.lmcache import LMCache
from gateway.records import Manifest, Window
from gateway.telemetry import genai
from gateway.windows.context import OperationContext, Services


class Placement(NamedTuple):
    """An engine, None if none can be reached, and its cache, None if there is none that can be loaded into."""

    node: EngineNode | None
    cache: LMCache | None

    @property
    def engine(self) -> str:
        """The engine's URL, "" without one."""
        return self.node.url if self.node else ""


def place(services: Services, lineage: str, *, prefer: str = "", model: str = "", tokens: int = 0) -> Placement:
    """Choose the engine for a lineage's next turn of so many tokens; `prefer` is the URL of the one it was at last."""
    node = services.engines.place(lineage, prefer, model, tokens)
    cache = services.cache.at(node.cache if node else "") if services.cache else None
    return Placement(node, cache)


async def load(ctx: OperationContext, cache: LMCache, window: Window, manifest: Manifest, chunks: int) -> int:
    """Load leading chunks from the tiers into a cache's memory; return how many objects are there.

    Raises `cache_unavailable`.
    """
    ids, within = manifest.token_ids[: chunks * window.chunk_size], ctx.services.settings.thaw_timeout_s
    began = time.monotonic()
    with ctx.services.traces.step("prefetch") as seen:
        objects, wanted = await cache.prefetch(
            window.model_root, window.world_size, manifest.id, ids, window.salt, within, ctx.progress
        )
        seen |= {genai.DONE: objects, genai.TOTAL: wanted}
    if ctx.services.cache and objects == wanted:
        ctx.services.cache.loaded(cache, len(ids), began)
    return objects

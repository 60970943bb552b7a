"""The nodes: engines and the caches beside them, as the settings and the name servers say.

An engine that is found while the gateway runs is taken in; one whose address has gone is drained: it gets no more
requests while there are others, finishes its streams, and is forgotten once it does not answer. With several caches,
each is asked periodically whether it still stores KV as the others do.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from gateway.engines.node import EngineNode
from gateway.engines.pool import EnginePool
from gateway.errors import GatewayError
from gateway.kv.cache_pool import CachePool
from gateway.runtime.addresses import Lookup, Resolve, look_up
from gateway.telemetry.metrics import Metrics
from gateway.validation.addresses import EngineEntry, same_url

log = logging.getLogger(__name__)

MakeNode = Callable[[str, str], EngineNode]
"""Makes the client of an engine, of its URL and that of its cache ("" if that has to be found out)."""


class Nodes:
    """Keeps the engines and the caches as they are configured and discovered."""

    def __init__(
        self, entries: tuple[EngineEntry, ...], engines: EnginePool, caches: CachePool | None, make: MakeNode,
        check_s: float, metrics: Metrics, resolve: Resolve = look_up,
    ) -> None:  # fmt: skip
        self._engines = engines
        self._caches = caches
        self._make = make
        self._check_s = check_s
        self._metrics = metrics
        self._fixed_caches = list(dict.fromkeys(entry.cache for entry in entries if entry.cache))
        self._entries = [entry for entry in entries if entry.discover]
        self._found: dict[str, set[str]] = {}  # by name: the URLs of its addresses
        cache_names = dict.fromkeys(entry.cache_discover for entry in entries if entry.cache_discover)
        self._lookups = [
            *(Lookup(name, check_s, partial(self._on_caches, name), resolve) for name in cache_names),
            *(Lookup(entry.discover, check_s, partial(self._on_engines, entry), resolve) for entry in self._entries),
        ]

    async def __aenter__(self) -> "Nodes":
        for url in self._fixed_caches:
            await self._add_cache(url)
        await self.look_up()
        jobs = [self._watch(), *(lookup.run() for lookup in self._lookups)]
        self._tasks = [asyncio.create_task(job, name="nodes") for job in jobs]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def look_up(self) -> None:
        """Look all names up now."""
        await asyncio.gather(*(lookup.once() for lookup in self._lookups))
        self._say_missing()

    async def check(self) -> None:
        """Compare the caches, and forget what is gone. Raises nothing."""
        self._say_missing()
        if self._caches is not None and len(self._caches.urls) > 1:
            try:
                await self._caches.info()
            except GatewayError as error:
                log.warning("no cache can be asked: %s", error.message)
        await self._forget_gone()
        if self._caches is not None:
            self._tell_engines(self._caches)

    def _tell_engines(self, caches: CachePool) -> None:
        """Tell each engine what is wrong with its cache, if anything: then others come first."""
        for member in self._engines.members:
            trouble = caches.left_out.get(member.cache) or caches.silent.get(member.cache) or ""
            if trouble and not member.cache_trouble:
                log.warning("engine %s comes after the others: its cache %s: %s", member.url, member.cache, trouble)
            elif member.cache_trouble and not trouble:
                log.info("cache %s of engine %s is of use again", member.cache, member.url)
            member.cache_trouble = trouble

    async def _watch(self) -> None:
        while True:
            try:
                await self.check()
            except Exception:  # must not end; the next check may succeed
                log.exception("could not check the nodes")
            await asyncio.sleep(self._check_s)

    async def _on_engines(self, entry: EngineEntry, addresses: list[str]) -> None:
        """Take over the addresses of a name of engines."""
        self._found[entry.discover] = {f"http://{address}" for address in addresses}
        known = {same_url(member.url) for member in self._engines.members}
        for address in addresses:
            if (url := f"http://{address}") not in known:
                await self._add_engine(entry, url, address)
        self._mark_leaving()

    async def _add_engine(self, entry: EngineEntry, url: str, address: str) -> None:
        cache = ""
        if entry.cache_port:
            cache = f"http://{address.rpartition(':')[0]}:{entry.cache_port}"
            await self._add_cache(cache)
        node = self._make(url, cache)
        node.finds_cache = bool(entry.cache_discover)
        node.discovered = True
        self._engines.add(node)
        log.info("engine %s was found (%s)", url, entry.discover)

    def _mark_leaving(self) -> None:
        """Drain each engine that no name has any more, and those no longer that have come back."""
        there = {url for name in (entry.discover for entry in self._entries) for url in self._found.get(name, ())}
        for member in self._engines.members:
            leaving = member.discovered and member.url not in there
            if leaving != member.leaving:
                log.info("engine %s %s", member.url, "has left its name: it is drained" if leaving else "is back")
            member.leaving = leaving

    async def _on_caches(self, name: str, addresses: list[str]) -> None:
        """Take over the addresses of a name of caches."""
        self._found[name] = {f"http://{address}" for address in addresses}
        for url in sorted(self._found[name]):
            await self._add_cache(url)

    async def _add_cache(self, url: str) -> None:
        if self._caches is not None:
            await self._caches.add(url)
            self._watch_caches(self._caches)

    def _watch_caches(self, caches: CachePool) -> None:
        """Show in the metrics which caches are of use. One alone is never asked but when it is needed."""
        if len(caches.urls) > 1:
            for url in caches.urls:
                self._metrics.watch_address("cwg_cache_up", url, partial(_is_of_use, caches, url))

    async def _forget_gone(self) -> None:
        """Forget engines that have left and do not answer, and then caches that nobody has any more."""
        for member in [one for one in self._engines.members if one.leaving and one.state == "ejected"]:
            log.info("engine %s is forgotten: it has left its name and does not answer", member.url)
            await self._engines.remove(member)
            self._metrics.forget_address(member.url)
        if self._caches is None:
            return
        there = {url for urls in self._found.values() for url in urls}
        used = (
            {*self._fixed_caches} | there | {member.cache for member in self._engines.members if not member.finds_cache}
        )
        for url in [one for one in self._caches.urls if one not in used and one in self._caches.silent]:
            log.info("cache %s is forgotten: it belongs to no engine and does not answer", url)
            await self._caches.remove(url)
            self._metrics.forget_address(url)

    def _say_missing(self) -> None:
        """Say for which names no address is known, so that errors and health can."""
        failed = {lookup.name: lookup.trouble for lookup in self._lookups if lookup.trouble}
        self._engines.missing = {e.discover: failed[e.discover] for e in self._entries if e.discover in failed}
        if self._caches is not None:
            names = (entry.cache_discover for entry in self._entries)
            self._caches.missing = {name: failed[name] for name in names if name in failed}


def _is_of_use(caches: CachePool, url: str) -> bool:
    return url not in caches.silent and url not in caches.left_out

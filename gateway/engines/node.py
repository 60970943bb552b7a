"""One engine of several: its two clients and its health."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from gateway.engines.breaker import LIMIT, CircuitBreaker
from gateway.engines.client import HttpEngineClient
from gateway.engines.connection_pool import Upstream
from gateway.engines.queue import Queue
from gateway.errors import GatewayError
from gateway.runtime.stalls import LostSince, caused_by_own_stall, never_lost

log = logging.getLogger(__name__)

State = Literal["unknown", "healthy", "draining", "suspect", "resting", "ejected"]
HEALTHY, DEGRADED, DRAINING, EJECTED = range(4)  # ranks; lower ones get requests first

# Between two probes of an engine that is not healthy, and the minimum between any two.
_SOON_S = 0.5
# An engine that takes longer than this to refuse a connection would make every request wait for it.
_SLOW_S = 1.0


class EngineNode:
    """One engine. Its health is probed periodically; a request that it does not answer brings the next probe forward.

    Two things take it out of use: `LIMIT` failed probes in a row eject it, until the first good one; `LIMIT` requests
    in a row without a response open its circuit (`CircuitBreaker`), even if its probes succeed. A probe that fails
    while this process itself did not run, or could open no file, does not count.

    `cache` is the URL of its node's cache: as configured, or as the self-test has found; "" if there is none, or it is
    not known yet.
    """

    def __init__(
        self, upstream: Upstream, engine: HttpEngineClient, lost_since: LostSince = never_lost, *, cache: str = ""
    ) -> None:
        self.url = engine.url
        self.cache = self.configured_cache = cache
        self.cache_trouble = ""  # why its cache is of no use now
        self.drained = False  # an operator wants it empty
        self.discovered = False  # by a name, which may lose it
        self.leaving = False  # that name has it no more
        self.finds_cache = False  # which cache is its is not configured: the self-test finds it out
        self.has_rivals = False  # whether there are other engines, and so a choice
        self.queue = Queue()
        self._lost_since = lost_since
        self.upstream = upstream
        self.engine = engine
        self.breaker = CircuitBreaker()
        self.last_error = ""
        # Counts up at each ejection: what was learned about it before may no longer be true. It never begins at the
        # same number, because an engine that was removed may come back as another object.
        self.generation = time.monotonic_ns()
        self._seed = hashlib.blake2b(self.url.encode(), digest_size=8)
        self._was_healthy = False
        self._failed_probes = 0
        self._slow_to_fail = False
        self._probed_at = 0.0
        self._probe_soon = asyncio.Event()

    async def close(self) -> None:
        """Close the connections of both clients."""
        async with self.upstream, self.engine:
            return  # leaving the block closes them

    @property
    def up(self) -> bool:
        """Whether it was healthy at one of the last `LIMIT` probes."""
        return self._was_healthy and self._failed_probes < LIMIT

    @property
    def is_unreachable(self) -> bool:
        """Whether not even to try it if there is no other: requests would fail, and only after a while."""
        return self._failed_probes >= LIMIT and self._slow_to_fail

    @property
    def draining(self) -> bool:
        """Whether it gets no request while another engine is healthy or degraded."""
        return self.drained or self.leaving

    @property
    def state(self) -> State:
        """Its state in one word."""
        if self._failed_probes >= LIMIT:
            return "ejected"
        if self.breaker.open:
            return "resting"
        if self._failed_probes or self.breaker.failures:
            return "suspect"
        if self.draining:
            return "draining"
        return "healthy" if self._was_healthy else "unknown"

    def rank(self, now: float, *, first: bool) -> int:
        """Its rank for a request; one that would go to it `first` may be the trial that closes its circuit.

        A probe that took too long only means that the engine is busy: its sessions stay with it.
        """
        if self._failed_probes >= LIMIT:
            return EJECTED
        if self.draining:
            return EJECTED if self.breaker.open else DRAINING
        if self.breaker.open:
            return HEALTHY if first and self.breaker.allow_request(now) else EJECTED
        failing = self._failed_probes and not self._slow_to_fail
        return DEGRADED if not self._was_healthy or failing or self.cache_trouble else HEALTHY

    def weight(self, lineage: bytes) -> bytes:
        """Its random weight for a lineage (rendezvous hashing), the same in every process."""
        draw = self._seed.copy()
        draw.update(lineage)
        return draw.digest()

    def answered(self) -> None:
        """Record that it answered a request."""
        if self.breaker.failures:
            self.breaker.answered()

    def unanswered(self, why: str) -> None:
        """Record that it did not answer a request, or did not accept it."""
        was_open = self.breaker.open
        self.breaker.failed(time.monotonic())
        self.last_error = why
        if self.breaker.open and not was_open:
            log.warning(
                "engine %s: circuit open after %d requests in a row without an answer; %s", self.url, LIMIT, why
            )
        self.probe_soon()

    def probe_soon(self) -> None:
        """Make the next probe soon."""
        self._probe_soon.set()

    async def probe(self) -> None:
        """Probe its health now, unless that has just been done: frequent probes must not eject it sooner."""
        if time.monotonic() - self._probed_at >= _SOON_S:
            await self._probe()

    async def _probe(self) -> None:
        clock = time.monotonic()
        try:
            await self.engine.check()
        except GatewayError as error:
            if error.code == "rate_limited" or caused_by_own_stall(self._lost_since, clock):
                self._probe_soon.set()
            else:
                self._slow_to_fail = time.monotonic() - clock > _SLOW_S
                self._on_failed(error.message)
        else:
            self._on_healthy()
            if self.has_rivals:
                await self.read_queue()
        self._probed_at = time.monotonic()

    async def read_queue(self) -> None:
        """Ask how many requests it computes, and how many wait. An engine that does not say has no queue."""
        self.queue.read(await self.engine.metrics(), time.monotonic())

    async def watch(self, every_s: float, on_probed: Callable[[], None]) -> None:
        """Probe it periodically, calling `on_probed` each time; ends only when cancelled."""
        while True:
            self._probe_soon.clear()
            try:
                await self._probe()
                on_probed()
            except Exception:  # must not end; the last result stands until the next probe
                log.exception("could not check engine %s", self.url)
            soon = min(_SOON_S, every_s)
            await asyncio.sleep(soon)
            if not self._failed_probes and self._was_healthy:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._probe_soon.wait(), every_s - soon)

    def report(self) -> dict[str, Any]:
        """What the health report says about it."""
        return {
            "url": self.url,
            "state": self.state,
            "failures": max(self._failed_probes, self.breaker.failures),
            "last_error": self.last_error or None,
            "models": [str(card["id"]) for card in self.engine.cards],
            "cache_url": self.cache or None,
        }

    def _on_healthy(self) -> None:
        if self._failed_probes:
            if self._failed_probes >= LIMIT:
                log.info("engine %s is back", self.url)
            self.breaker.answered()  # it was down: requests that failed before no longer count
        self._was_healthy, self._failed_probes, self._slow_to_fail = True, 0, False

    def _on_failed(self, why: str) -> None:
        self._failed_probes += 1
        self.last_error = why
        if self._failed_probes == LIMIT:
            self.generation += 1
            log.warning("engine %s is ejected: %s", self.url, why)

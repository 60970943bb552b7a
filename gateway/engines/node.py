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
from gateway.errors import GatewayError
from gateway.runtime.stalls import LostSince, is_ours, never_lost

log = logging.getLogger(__name__)

State = Literal["unknown", "healthy", "suspect", "resting", "ejected"]
HEALTHY, DEGRADED, EJECTED = range(3)  # how gladly it is given a request

# Between two looks at an engine that is not well, and the least between any two.
_SOON_S = 0.5
# One that takes longer than this to say that it is not there would make every request wait for it.
_SLOW_S = 1.0


class EngineNode:
    """One engine. Its health is probed periodically; a request that it does not answer brings the next probe forward.

    Two things take it out: `LIMIT` failed looks in a row eject it, until the first good one; `LIMIT` requests in a row
    that it left without an answer make it rest (`CircuitBreaker`), even where its health looks good. A look that
    failed while this process itself did not run, or could open no file, says nothing about the engine.
    """

    def __init__(self, upstream: Upstream, engine: HttpEngineClient, lost_since: LostSince = never_lost) -> None:
        self.url = engine.url
        self._lost_since = lost_since
        self.upstream = upstream
        self.engine = engine
        self.breaker = CircuitBreaker()
        self.last_error = ""
        self.generation = 0  # how often it has been ejected: what was found out before may not hold after
        self._seed = hashlib.blake2b(self.url.encode(), digest_size=8)
        self._seen = False  # it was well once
        self._failed_looks = 0
        self._slow_to_fail = False
        self._looked_at = 0.0
        self._hasten = asyncio.Event()

    async def close(self) -> None:
        """Close the connections of both clients."""
        async with self.upstream, self.engine:
            return  # leaving is what closes

    @property
    def up(self) -> bool:
        """Whether it was healthy when last probed, or has only just stopped being so."""
        return self._seen and self._failed_looks < LIMIT

    @property
    def is_unreachable(self) -> bool:
        """Whether it is not worth a try even where there is no other: it would fail, and only after a while."""
        return self._failed_looks >= LIMIT and self._slow_to_fail

    @property
    def state(self) -> State:
        """What it is in one word."""
        if self._failed_looks >= LIMIT:
            return "ejected"
        if self.breaker.open:
            return "resting"
        if self._failed_looks or self.breaker.failures:
            return "suspect"
        return "healthy" if self._seen else "unknown"

    def rank(self, now: float, *, first: bool) -> int:
        """How gladly it is given a request; one that would go to it `first` may be the trial after a rest.

        A look that took too long says only that the engine is busy: its sessions do not leave for that alone.
        """
        if self._failed_looks >= LIMIT:
            return EJECTED
        if self.breaker.open:
            return HEALTHY if first and self.breaker.allow_request(now) else EJECTED
        return DEGRADED if not self._seen or (self._failed_looks and not self._slow_to_fail) else HEALTHY

    def weight(self, lineage: bytes) -> bytes:
        """How much a lineage is drawn to it: the same in every process, and as if at random."""
        draw = self._seed.copy()
        draw.update(lineage)
        return draw.digest()

    def answered(self) -> None:
        """It answered a request."""
        if self.breaker.failures:
            self.breaker.answered()

    def unanswered(self, why: str) -> None:
        """It left a request without an answer, or was not there to take it."""
        was_open = self.breaker.open
        self.breaker.failed(time.monotonic())
        self.last_error = why
        if self.breaker.open and not was_open:
            log.warning(
                "engine %s: circuit open after %d requests in a row without an answer; %s", self.url, LIMIT, why
            )
        self.probe_soon()

    def probe_soon(self) -> None:
        """Have the next look soon."""
        self._hasten.set()

    async def probe(self) -> None:
        """Look at its health now, unless that has just been done: asking often must not make it look worse."""
        if time.monotonic() - self._looked_at >= _SOON_S:
            await self._look()

    async def _look(self) -> None:
        clock = time.monotonic()
        try:
            await self.engine.check()
        except GatewayError as error:
            if error.code == "rate_limited" or is_ours(self._lost_since, clock):
                self._hasten.set()
            else:
                self._slow_to_fail = time.monotonic() - clock > _SLOW_S
                self._sick(error.message)
        else:
            self._well()
        self._looked_at = time.monotonic()

    async def watch(self, every_s: float, looked: Callable[[], None]) -> None:
        """Look at it again and again, and tell so; ends only when cancelled."""
        while True:
            self._hasten.clear()
            try:
                await self._look()
                looked()
            except Exception:  # the watch must not end; what it saw last stands until the next look
                log.exception("could not check engine %s", self.url)
            soon = min(_SOON_S, every_s)
            await asyncio.sleep(soon)
            if not self._failed_looks and self._seen:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hasten.wait(), every_s - soon)

    def report(self) -> dict[str, Any]:
        """What health shows of it."""
        return {
            "url": self.url,
            "state": self.state,
            "failures": max(self._failed_looks, self.breaker.failures),
            "last_error": self.last_error or None,
            "models": [str(card["id"]) for card in self.engine.cards],
        }

    def _well(self) -> None:
        if self._failed_looks:
            if self._failed_looks >= LIMIT:
                log.info("engine %s is back", self.url)
            self.breaker.answered()  # it was away: what it failed at before does not count any more
        self._seen, self._failed_looks, self._slow_to_fail = True, 0, False

    def _sick(self, why: str) -> None:
        self._failed_looks += 1
        self.last_error = why
        if self._failed_looks == LIMIT:
            self.generation += 1
            log.warning("engine %s is ejected: %s", self.url, why)

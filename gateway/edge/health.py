"""Is it alive, is it ready, and if not, what is the matter.

The parts are watched in the background, so that asking is cheap.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gateway import __version__
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.contract import TierUnavailable
from gateway.parts import Parts
from gateway.proof import Check, prove

log = logging.getLogger(__name__)

COMPONENTS = ("engine", "cache", "tiers", "store", "isolation")
_NOBODYS = ObjectKey("health", 0, 0, "0" * 64, "0" * 32)
_EVERY_S = 5.0
_UNTIL_UP_S = 0.5


class Health:
    """What was seen when the parts were last looked at, and what the self-test said."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started = time.monotonic()
        self.checks: list[Check] | None = None
        self.engine_up = False

    async def __aenter__(self) -> "Health":
        self._task = asyncio.create_task(self._watch(), name="health")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    @property
    def ready(self) -> bool:
        """Whether requests will succeed: the engine is up, and the self-test has run and found no leak."""
        return self.engine_up and self.checks is not None and not self.leaking

    @property
    def leaking(self) -> bool:
        """Whether the self-test saw one salt's KV under another."""
        return any(c.name == "isolation" and c.status == "failed" for c in self.checks or ())

    async def test(self) -> list[Check]:
        """Run the self-test now."""
        self.checks = await prove(self._parts)
        for check in self.checks:
            if check.status != "ok":
                level = logging.ERROR if check.status == "failed" else logging.WARNING
                log.log(
                    level,
                    "self-test: %s: %s%s",
                    check.name,
                    check.message,
                    f" ({check.remedy})" if check.remedy else "",
                )
        return self.checks

    async def components(self, only: str | None = None) -> dict[str, Mapping[str, Any]]:
        """Look at the parts now; `only` names one of them."""
        looks = {
            "engine": self._engine,
            "cache": self._cache,
            "tiers": self._tiers,
            "store": self._store,
            "isolation": self._isolation,
        }
        wanted = {only: looks[only]} if only else looks
        found: dict[str, Mapping[str, Any]] = {}
        for name, look in wanted.items():
            clock = time.monotonic()
            status, message = await look()
            found[name] = {
                "status": status,
                "message": message,
                "latency_ms": round((time.monotonic() - clock) * 1000, 1),
            }
        return found

    def summary(self, components: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """All components in one word: the gateway serves without a cache, but not without an engine or isolation."""
        down = {name for name, seen in components.items() if seen["status"] == "unhealthy"}
        well = all(seen["status"] == "healthy" for seen in components.values())
        status = "unhealthy" if down & {"engine", "isolation", "store"} else "healthy" if well else "degraded"
        return {
            "status": status,
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "components": dict(components),
        }

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:  # the watch must not end; what it saw last stands until the next look
                log.exception("could not look at the parts")
            await asyncio.sleep(_EVERY_S if self.engine_up else _UNTIL_UP_S)

    async def _look(self) -> None:
        try:
            models = await self._parts.engine.models()
        except GatewayError as error:
            if self.engine_up:
                log.warning("%s", error.message)
            self.engine_up = False
            return
        if self.checks is None or self.checks[0].status == "failed":
            await self.test()
        self.engine_up = True
        for model in models.values():
            if not self._parts.estimator.knows(model.id):
                await asyncio.to_thread(self._parts.estimator.learn, model.id, model.root)

    async def _engine(self) -> tuple[str, str]:
        try:
            models = await self._parts.engine.models()
        except GatewayError as error:
            return "unhealthy", error.message
        return "healthy", f"serves {', '.join(models)}"

    async def _cache(self) -> tuple[str, str]:
        cache = self._parts.cache
        if cache is None:
            return "degraded", "no cache is configured"
        return ("healthy", "answers") if await cache.healthy() else ("unhealthy", "LMCache does not answer")

    async def _tiers(self) -> tuple[str, str]:
        if not self._parts.pins.tiers:
            return "degraded", "no tier is configured"
        try:
            for tier in self._parts.pins.tiers:
                await tier.present((_NOBODYS,))
        except TierUnavailable as error:
            return "degraded", str(error)
        return "healthy", ", ".join(tier.name for tier in self._parts.pins.tiers)

    async def _store(self) -> tuple[str, str]:
        await self._parts.store.tier_usage()
        return "healthy", "answers"

    async def _isolation(self) -> tuple[str, str]:
        if self.checks is None:
            return "degraded", "the self-test has not run yet"
        failed = [c for c in self.checks if c.status == "failed"]
        if self.leaking:
            return "unhealthy", "; ".join(c.message for c in failed)
        return ("degraded", "; ".join(c.message for c in failed)) if failed else ("healthy", "proved at start")

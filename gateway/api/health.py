"""Liveness, readiness, and the health of every component, most of which is checked in the background."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gateway import __version__
from gateway.api.selftest import Check, run
from gateway.engines.node import EngineNode
from gateway.errors import GatewayError
from gateway.kv.cache_pool import CachePool
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import TierUnavailable
from gateway.runtime.stalls import caused_by_own_stall
from gateway.windows.catalog import WITHOUT_TEXT_HINT, windows_without_text
from gateway.windows.context import Services
from gateway.windows.tier_risks import find_risks

log = logging.getLogger(__name__)

COMPONENTS = ("engine", "cache", "tiers", "store", "isolation")
_UNUSED_KEY = str(ObjectKey("health", 0, 0, "0" * 64, "0" * 32))
_INTERVAL_S = 0.5  # needs no request: the engines are probed by their pool
_WRITE_INTERVAL_S = 10.0  # between checks whether the store can be written: each is a commit
_WRITE_RETRY_S = 1.0  # the same while it cannot, or on demand
_FIRST_INTERVAL_S = 0.05  # until an engine is up for the first time: readiness waits for it
_PROOF_S = 120.0  # a self-test that takes longer may run beside another one
_RETRY_S = 15.0  # between self-tests that failed: the engine may only have been restarting


@dataclass(frozen=True, slots=True)
class _TestResult:
    """The result of a self-test of one generation of an engine, and when it was run."""

    checks: list[Check]
    generation: int
    at: float

    @property
    def leaks(self) -> bool:
        return any(check.leaks for check in self.checks)

    def outdated(self, now: float) -> bool:
        return self.leaks and now - self.at > _RETRY_S


class Health:
    """The state of each component when it was last checked, and the results of the self-tests."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._started = time.monotonic()
        self._results: dict[str, _TestResult] = {}  # by engine
        self._caches: list[dict[str, Any]] = []  # what health says of each
        self._store_trouble = ""
        self._wrote_at = -_WRITE_INTERVAL_S

    async def __aenter__(self) -> "Health":
        self._task = asyncio.create_task(self._watch(), name="health")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    @property
    def checks(self) -> list[Check] | None:
        """The self-test's checks of the engines that are up; None if it has not run yet."""
        return [check for result in self._valid for check in result.checks] or None

    @property
    def _valid(self) -> list[_TestResult]:
        """The results for engines that are up and have not restarted since."""
        found = ((member, self._results.get(member.url)) for member in self._services.engines.up)
        return [result for member, result in found if result and result.generation == member.generation]

    @property
    def waiting_for(self) -> tuple[str, str] | None:
        """The component that makes requests fail, and why: the self-test must have run and found no leak."""
        if self.leaking:
            return "isolation", "one salt's KV was found under another"
        if not self._services.engines.up:
            return "engine", self._services.engines.trouble()
        if not self._valid:
            return "self-test", "it has not run yet"
        trouble = self._services.recorder.trouble or self._store_trouble
        return ("store", trouble) if trouble else None

    @property
    def leaking(self) -> bool:
        """Whether the self-test found one salt's KV under another."""
        return any(result.leaks for result in self._valid)

    async def test(self) -> list[Check]:
        """Run the self-test on every engine now, and check the store for damage and the windows for missing text."""
        checks = [check for member in self._services.engines.members for check in await self._test(member)]
        return [*checks, await self._test_store(), await self._test_windows()]

    async def _test_store(self) -> Check:
        found = await self._services.store.examine()
        return Check("store", found.status, found.message, found.remedy)

    async def _test_windows(self) -> Check:
        problem = await windows_without_text(self._services)
        if not problem:
            return Check("windows", "ok", "every window has its text")
        return Check("windows", "warning", problem, WITHOUT_TEXT_HINT)

    async def _test(self, member: EngineNode) -> list[Check]:
        """Test one engine, not at the same time as another gateway: that would distort the time until objects land."""
        generation = member.generation
        async with self._services.leases.hold(f"proof:{member.url}", _PROOF_S):
            checks = await run(self._services, member)
        if len(self._services.engines.members) > 1:
            checks = [replace(check, message=f"{member.url}: {check.message}") for check in checks]
        if not any(check.is_unreachable for check in checks):
            self._results[member.url] = _TestResult(checks, generation, time.monotonic())
        for check in checks:
            if check.status != "ok":
                level = logging.ERROR if check.status == "failed" else logging.WARNING
                remedy = f" ({check.remedy})" if check.remedy else ""
                log.log(level, "self-test: %s: %s%s", check.name, check.message, remedy)
        return checks

    async def components(self, only: str | None = None) -> dict[str, Mapping[str, Any]]:
        """Check all components now, or `only` one."""
        probes = {
            "engine": self._engine,
            "cache": self._cache,
            "tiers": self._tiers,
            "store": self._store,
            "isolation": self._isolation,
        }
        found: dict[str, Mapping[str, Any]] = {}
        for name in (only,) if only else probes:
            clock = time.monotonic()
            status, message = await probes[name]()
            found[name] = {
                "status": status,
                "message": message,
                "latency_ms": round((time.monotonic() - clock) * 1000, 1),
                **self._details(name),
            }
        return found

    def _details(self, name: str) -> dict[str, Any]:
        if name == "cache" and self._services.cache is not None:
            return {"caches": self._caches}
        if name != "engine":
            return {}
        engines = self._services.engines
        return {"engines": [m.report() for m in engines.members], "models_differ": engines.differing}

    def summary(self, components: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The health of the gateway, which works without a cache, but not without an engine, isolation or store."""
        unhealthy = {name for name, component in components.items() if component["status"] == "unhealthy"}
        healthy = all(component["status"] == "healthy" for component in components.values())
        status = "unhealthy" if unhealthy & {"engine", "isolation", "store"} else "healthy" if healthy else "degraded"
        return {
            "status": status,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "components": dict(components),
        }

    async def _watch(self) -> None:
        while True:
            try:
                await self._check()
            except Exception:  # the watch must not end; until the next check the last results count
                log.exception("could not check the components")
            await asyncio.sleep(_INTERVAL_S if self._results else _FIRST_INTERVAL_S)

    async def _check(self) -> None:
        await self._write_to_store(_WRITE_RETRY_S if self._store_trouble else _WRITE_INTERVAL_S)
        for member in self._services.engines.up:
            result = self._results.get(member.url)
            now = time.monotonic()
            if result is None or result.generation != member.generation or result.outdated(now):
                await self._test(member)
            elif self._lacks_cache(member) and now - result.at > _RETRY_S:
                await self._test(member)  # its cache may have come since
            for model in member.engine.served:
                if not self._services.estimator.knows(model.id):
                    await asyncio.to_thread(self._services.estimator.load_tokenizer, model.id, model.root)

    def _lacks_cache(self, member: EngineNode) -> bool:
        """Whether it has still to be found out which cache is the engine's."""
        caches = self._services.cache
        return member.finds_cache and caches is not None and member.cache not in caches.urls

    async def _engine(self) -> tuple[str, str]:
        engines = self._services.engines
        await engines.probe()
        healthy = [member for member in engines.members if member.state in ("healthy", "draining")]
        if not healthy:
            return "unhealthy", engines.trouble()
        models = dict.fromkeys(str(card["id"]) for member in healthy for card in member.engine.cards)
        serving = f"serves {', '.join(models)}"
        if len(engines.members) == 1:
            return "healthy", serving
        if engines.differing:
            serving += f"; not the same on all of them: {', '.join(engines.differing)}"
        if draining := sum(member.draining for member in healthy):
            serving += f"; {draining} draining"
        if engines.missing:
            serving += "; " + "; ".join(engines.missing.values())
        complete = len(healthy) == len(engines.members) and not engines.differing and not engines.missing
        return "healthy" if complete else "degraded", f"{len(healthy)} of {len(engines.members)} engines; {serving}"

    def _failed(self, component: str) -> str:
        """What the self-test found wrong with a component; empty if nothing."""
        failed = (check for check in self.checks or () if check.status == "failed")
        return "; ".join(check.message for check in failed if check.component == component)

    async def _cache(self) -> tuple[str, str]:
        caches = self._services.cache
        if caches is None:
            return "degraded", "no cache is configured"
        began = time.monotonic()
        troubles = await caches.troubles()
        if any(troubles.values()) and caused_by_own_stall(self._services.stalls.lost_since, began):
            troubles = await caches.troubles()
        self._caches = [self._cache_state(caches, url, trouble) for url, trouble in troubles.items()]
        named = len(troubles) > 1
        found = [f"cache {one['url']}: {one['message']}" if named else one["message"] for one in self._caches]
        answering = [one for one in self._caches if one["status"] != "unhealthy"]
        wrong = [text for text, one in zip(found, self._caches, strict=True) if one["status"] != "healthy"]
        problem = "; ".join(filter(None, [*wrong, *caches.missing.values(), *map(self._failed, ("cache", "pairing"))]))
        if not answering:
            return "unhealthy", problem or "no cache is known yet"
        return ("degraded", problem) if problem else ("healthy", "answers")

    def _cache_state(self, caches: CachePool, url: str, trouble: str) -> dict[str, Any]:
        """What health says of one cache."""
        difference = caches.left_out.get(url, "")
        return {
            "url": url,
            "status": "unhealthy" if trouble else "left out" if difference else "healthy",
            "message": trouble or difference or "answers",
            "engines": self._services.engines.beside(url, only=len(caches.urls) == 1),
        }

    async def _tiers(self) -> tuple[str, str]:
        if not self._services.pins.tiers:
            return "degraded", "no tier is configured"
        try:
            for tier in self._services.pins.tiers:
                await tier.sizes((_UNUSED_KEY,))
        except TierUnavailable as error:
            return "degraded", str(error)
        risks = await find_risks(self._services)
        if problem := "; ".join(filter(None, (self._failed("tiers"), *risks))):
            return "degraded", problem
        return "healthy", ", ".join(tier.name for tier in self._services.pins.tiers)

    async def _write_to_store(self, interval_s: float) -> None:
        """Check whether the store can be written, unless that was done less than `interval_s` ago."""
        if time.monotonic() - self._wrote_at < interval_s:
            return
        try:
            await self._services.store.check()
        except GatewayError as error:
            self._store_trouble = error.message
        else:
            self._store_trouble = ""
        self._wrote_at = time.monotonic()

    async def _store(self) -> tuple[str, str]:
        await self._write_to_store(_WRITE_RETRY_S)
        await self._services.store.tier_usage()
        if trouble := self._services.recorder.trouble or self._store_trouble:
            return "unhealthy", trouble
        problem = await windows_without_text(self._services)
        return ("degraded", f"{problem}; {WITHOUT_TEXT_HINT}") if problem else ("healthy", "answers")

    async def _isolation(self) -> tuple[str, str]:
        if self.checks is None:
            return "degraded", "the self-test has not run yet"
        failed = self._failed("isolation")
        if self.leaking:
            return "unhealthy", failed
        if not failed and (cache := self._failed("cache")):
            failed = f"not proved in the tiers: {cache}"
        return ("degraded", failed) if failed else ("healthy", "passed the self-test")

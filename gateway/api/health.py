"""Liveness, readiness, and the health of every component.

The parts are watched in the background, so that asking is cheap.
"""

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
from gateway.kv.file_lock import FileLock
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import TierUnavailable
from gateway.runtime.stalls import is_ours
from gateway.store.damage import REMEDY as RESCUE
from gateway.store.damage import damage
from gateway.windows.context import Services
from gateway.windows.missing_text import REMEDY, textless

log = logging.getLogger(__name__)

COMPONENTS = ("engine", "cache", "tiers", "store", "isolation")
_NOBODYS = str(ObjectKey("health", 0, 0, "0" * 64, "0" * 32))
_ALL_WHOLE = Check("windows", "ok", "every window has its text")
_EVERY_S = 0.5  # it costs no request: the engines watch themselves
_WRITE_EVERY_S = 10.0  # between two looks whether the store can be written: each is a commit
_WRITE_AGAIN_S = 1.0  # the same while it cannot, or when somebody asks
_FIRST_S = 0.05  # until an engine was seen for the first time: readiness waits for it
_TRY_AGAIN_S = 15.0  # between self-tests that failed: the engine may only have been restarting


@dataclass(frozen=True, slots=True)
class _Proof:
    """What the self-test said of an engine, in which of its lives, and when."""

    checks: list[Check]
    life: int
    at: float

    @property
    def leaks(self) -> bool:
        return any(check.leaks for check in self.checks)

    def outdated(self, now: float) -> bool:
        return self.leaks and now - self.at > _TRY_AGAIN_S


class Health:
    """What was seen when the parts were last looked at, and what the self-test said."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._started = time.monotonic()
        self._proofs: dict[str, _Proof] = {}  # by engine
        self._store_trouble = ""
        self._wrote_at = -_WRITE_EVERY_S
        self._one_by_one = FileLock(services.settings.data_path / "proof.lock")

    async def __aenter__(self) -> "Health":
        self._task = asyncio.create_task(self._watch(), name="health")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    @property
    def checks(self) -> list[Check] | None:
        """What the self-test said of the engines that are up; None if it has not run yet."""
        return [check for proof in self._standing for check in proof.checks] or None

    @property
    def _standing(self) -> list[_Proof]:
        found = ((member, self._proofs.get(member.url)) for member in self._services.engines.up)
        return [proof for member, proof in found if proof and proof.life == member.generation]

    @property
    def engine_up(self) -> bool:
        """Whether an engine is up."""
        return bool(self._services.engines.up)

    @property
    def ready(self) -> bool:
        """Whether requests will succeed."""
        return self.waiting_for is None

    @property
    def waiting_for(self) -> tuple[str, str] | None:
        """Which part requests would fail for, and why: the self-test must have run on an engine and found no leak."""
        if self.leaking:
            return "isolation", "one salt's KV was found under another"
        if not self.engine_up:
            return "engine", self._services.engines.trouble()
        if not self._standing:
            return "self-test", "it has not run yet"
        trouble = self._services.recorder.trouble or self._store_trouble
        return ("store", trouble) if trouble else None

    @property
    def leaking(self) -> bool:
        """Whether the self-test saw one salt's KV under another."""
        return any(proof.leaks for proof in self._standing)

    async def test(self) -> list[Check]:
        """Run the self-test now, on every engine, and look for damage in the store and windows without their text."""
        members = self._services.engines.members
        checks = [check for member in members for check in await self._prove(member)]
        checks.append(await self._pages())
        lost = await textless(self._services)
        return [*checks, Check("windows", "warning", lost, REMEDY) if lost else _ALL_WHOLE]

    async def _pages(self) -> Check:
        wrong = await asyncio.to_thread(damage, self._services.settings.store_path)
        if not wrong:
            return Check("store", "ok", "every page is intact")
        return Check("store", "failed", f"the store is damaged: {'; '.join(wrong)}", RESCUE)

    async def _prove(self, member: EngineNode) -> list[Check]:
        """Test one engine, after the tests of other workers, because it bounds the time that the stack takes."""
        life = member.generation
        async with self._one_by_one.acquire(exclusive=True):
            checks = await run(self._services, member.engine)
        if len(self._services.engines.members) > 1:
            checks = [replace(check, message=f"{member.url}: {check.message}") for check in checks]
        if checks[0].status != "failed":  # it was there
            self._proofs[member.url] = _Proof(checks, life, time.monotonic())
        for check in checks:
            if check.status != "ok":
                level = logging.ERROR if check.status == "failed" else logging.WARNING
                log.log(
                    level,
                    "self-test: %s: %s%s",
                    check.name,
                    check.message,
                    f" ({check.remedy})" if check.remedy else "",
                )
        return checks

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
                **self._details(name),
            }
        return found

    def _details(self, name: str) -> dict[str, Any]:
        if name != "engine":
            return {}
        engines = self._services.engines
        return {"engines": [m.report() for m in engines.members], "models_differ": engines.differing}

    def summary(self, components: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """All components in one word: the gateway serves without a cache, but not without an engine or isolation."""
        down = {name for name, seen in components.items() if seen["status"] == "unhealthy"}
        well = all(seen["status"] == "healthy" for seen in components.values())
        status = "unhealthy" if down & {"engine", "isolation", "store"} else "healthy" if well else "degraded"
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
                await self._look()
            except Exception:  # the watch must not end; what it saw last stands until the next look
                log.exception("could not check the components")
            await asyncio.sleep(_EVERY_S if self._proofs else _FIRST_S)

    async def _look(self) -> None:
        await self._write_to_store(_WRITE_AGAIN_S if self._store_trouble else _WRITE_EVERY_S)
        for member in self._services.engines.up:
            proof = self._proofs.get(member.url)
            if proof is None or proof.life != member.generation or proof.outdated(time.monotonic()):
                await self._prove(member)
            for model in member.engine.served:
                if not self._services.estimator.knows(model.id):
                    await asyncio.to_thread(self._services.estimator.learn, model.id, model.root)

    async def _engine(self) -> tuple[str, str]:
        engines = self._services.engines
        await engines.look()
        well = [member for member in engines.members if member.state == "healthy"]
        if not well:
            return "unhealthy", engines.trouble()
        models = dict.fromkeys(str(card["id"]) for member in well for card in member.engine.cards)
        serving = f"serves {', '.join(models)}"
        if len(engines.members) == 1:
            return "healthy", serving
        if engines.differing:
            serving += f"; not the same on all of them: {', '.join(engines.differing)}"
        whole = len(well) == len(engines.members) and not engines.differing
        return "healthy" if whole else "degraded", f"{len(well)} of {len(engines.members)} engines; {serving}"

    async def _cache(self) -> tuple[str, str]:
        cache = self._services.cache
        if cache is None:
            return "degraded", "no cache is configured"
        began = time.monotonic()
        well = await cache.healthy()
        if not well and is_ours(self._services.stalls.lost_since, began):
            well = await cache.healthy()
        return ("healthy", "answers") if well else ("unhealthy", "LMCache does not answer")

    async def _tiers(self) -> tuple[str, str]:
        if not self._services.pins.tiers:
            return "degraded", "no tier is configured"
        try:
            for tier in self._services.pins.tiers:
                await tier.sizes((_NOBODYS,))
        except TierUnavailable as error:
            return "degraded", str(error)
        return "healthy", ", ".join(tier.name for tier in self._services.pins.tiers)

    async def _write_to_store(self, every_s: float) -> None:
        """Find out whether the store can be written, unless that was done less than `every_s` ago."""
        if time.monotonic() - self._wrote_at < every_s:
            return
        try:
            await self._services.store.check()
        except GatewayError as error:
            self._store_trouble = error.message
        else:
            self._store_trouble = ""
        self._wrote_at = time.monotonic()

    async def _store(self) -> tuple[str, str]:
        await self._write_to_store(_WRITE_AGAIN_S)
        await self._services.store.tier_usage()
        if trouble := self._services.recorder.trouble or self._store_trouble:
            return "unhealthy", trouble
        lost = await textless(self._services)
        return ("degraded", f"{lost}; {REMEDY}") if lost else ("healthy", "answers")

    async def _isolation(self) -> tuple[str, str]:
        if self.checks is None:
            return "degraded", "the self-test has not run yet"
        failed = [c for c in self.checks if c.status == "failed"]
        if self.leaking:
            return "unhealthy", "; ".join(c.message for c in failed)
        return ("degraded", "; ".join(c.message for c in failed)) if failed else ("healthy", "proved at start")

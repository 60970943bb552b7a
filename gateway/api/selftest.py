"""The self-test: does this stack isolate salts, store where the gateway looks, and report cached tokens?

It runs on the live stack with throw-away prompts of random token ids, at start and in `cwg doctor`. Nothing here trusts
configuration: LMCacheConnectorV1, for one, takes a salt and ignores it (LMCache#2878).
"""

import asyncio
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from gateway.engines.client import Model
from gateway.engines.node import EngineNode
from gateway.errors import GatewayError
from gateway.kv import message_port
from gateway.kv.cache_pool import Answers, CachePool
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import CacheInfo
from gateway.kv.tiers.base import ObjectState, Tier, TierUnavailable
from gateway.validation.addresses import same_url
from gateway.windows.context import Services
from gateway.windows.ensure_stored import Plan, plan

Status = Literal["ok", "warning", "failed"]
_ENGINE = "engine"
_ISOLATION = "isolation"
_PINS = "pins"
_PAIRING = "pairing"
_ADDRESS_OF_CACHE = "lmcache.mp.host and lmcache.mp.port are those of its node's LMCache"
_CONNECTOR = "AbortSafeLMCacheConnector (kv_connector_module_path gateway.stack.connector)"
_CHUNKS = 2
_LAND_S = 3.0
_POLL_S = 0.05
_DEFAULT_TOKENS = 513  # without a cache, and so without its chunk size


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check, and the remedy unless it is ok."""

    name: str
    status: Status
    message: str
    remedy: str = ""

    @property
    def component(self) -> str:
        """The component of the gateway's health that a failure of it belongs to; `pairing` is a part of the cache's."""
        if self.name.startswith(_ISOLATION):
            return "isolation"
        if self.name.endswith((" tier", " pins")):
            return "tiers"
        if self.name == _PAIRING:
            return "pairing"
        return "cache" if self.name in ("cache", "chunk size") else "isolation"

    @property
    def leaks(self) -> bool:
        """Whether KV of one salt was found under another."""
        return self.status == "failed" and self.name.startswith(_ISOLATION)

    @property
    def is_unreachable(self) -> bool:
        """Whether the engine could not be tested at all."""
        return self.status == "failed" and self.name == _ENGINE


def keeps_kv(services: Services, checks: Collection[Check]) -> bool | None:
    """Whether KV was seen to survive in a tier, as a window needs it; None if that could not be tested."""
    pins = [check.status for check in checks if check.name.endswith(_PINS)]
    if not pins and services.cache is not None and services.pins.tiers:
        return None
    return "ok" in pins


async def run(services: Services, node: EngineNode, land_s: float = _LAND_S) -> list[Check]:
    """Test one engine for all that windows depend on. Failures are in the list, not raised.

    Also finds out which cache is the engine's, and tells the node. An object may take `land_s` seconds to appear in a
    tier.
    """
    test = _SelfTest(services, node, land_s)
    await test.run()
    return test.checks


class _SelfTest:
    def __init__(self, services: Services, node: EngineNode, land_s: float) -> None:
        self._services = services
        self._node = node
        self._engine = node.engine
        self._land_s = land_s
        self.checks: list[Check] = []

    def _add(self, name: str, status: Status, message: str, remedy: str = "") -> None:
        self.checks.append(Check(name, status, message, remedy))

    async def run(self) -> None:
        """Run every check that is possible with this stack."""
        try:
            models = await self._engine.models()
        except GatewayError as error:
            self._add(_ENGINE, "failed", error.message, error.hint)
            return
        self._add(_ENGINE, "ok", f"{self._engine.url} serves {', '.join(models)}")
        await self._check_aborts()
        model = next(iter(models.values()))
        planned = await self._plan(model)
        try:
            await self._check_salts(model, planned)
        except GatewayError as error:
            self._add(_ISOLATION, "failed", error.message, error.hint)

    async def _check_aborts(self) -> None:
        """Check whether a client that disconnects may crash this engine, as far as its metrics tell."""
        if self._engine.abort_risk == "patched":
            self._add("aborts", "ok", "a client may disconnect while its KV is being loaded")
        elif self._engine.abort_risk == "exposed":
            version = await self._engine.version() or "of an unknown version"
            self._add(
                "aborts",
                "warning",
                "a client that disconnects while its KV is being loaded may crash this engine "
                f"(vLLM {version}; vllm#46240, LMCache#4938)",
                f"start it with kv_connector {_CONNECTOR} (docs/own-vllm.md)",
            )

    async def _plan(self, model: Model) -> Plan | None:
        """The objects of a random prompt; None without a cache that works."""
        cache = self._services.cache
        if cache is None:
            self._add("cache", "warning", "no cache is configured: windows keep text and ids only", "set cache_url")
            return None
        try:
            info = await cache.info()
            if not await self._has_usable_cache(cache, info):
                return None
            if not self._services.pins.tiers:
                message = "no tier is configured: windows keep text and ids only"
                self._add("tiers", "warning", message, "set kv_dir, kv_redis_url or s3_bucket")
            if model.root not in info.world_sizes:
                message = f"no engine has registered model {model.root!r} with this LMCache yet"
                remedy = f"start vLLM with {_CONNECTOR} or LMCacheMPConnector, and lmcache.mp.host/port of this server"
                self._add("connector", "warning", message, remedy)
            ids = await self._random_ids(model, cache.chunk_size * _CHUNKS + 1)
            return plan(model, "", ids, info, cache.chunk_size)
        except GatewayError as error:
            self._add("cache", "failed", error.message, error.hint)
            return None

    async def _has_usable_cache(self, pool: CachePool, info: CacheInfo) -> bool:
        """Check the cache of this engine, if it is known, else that there is one. Raises `cache_unavailable`."""
        wanted, own = self._services.settings.chunk_size, pool.own(self._node.cache)
        if own is not None:
            reported = info if len(pool.urls) == 1 else await own.info()
            if not await own.reads_messages():
                self._add("cache", "failed", message_port.ENDED, message_port.RESTART)
                return False
            self._add("cache", "ok", f"LMCache answers, chunk size {reported.chunk_size}")
            if difference := pool.left_out.get(own.url):
                self._add("chunk size", "failed", f"cache {own.url} is left out: {difference}", "see the message")
                return False
        if wanted and wanted != info.chunk_size:
            # With another chunk size, no object would be found under its name.
            message = f"the gateway is set to {wanted}, LMCache to {info.chunk_size}"
            self._add("chunk size", "failed", message, "leave chunk_size at 0")
            return False
        return True

    async def _check_salts(self, model: Model, planned: Plan | None) -> None:
        """Send the same prompt with salt A, A again, then B: A must hit its own KV, B must hit nothing."""
        ids = planned.ids if planned else await self._random_ids(model, _DEFAULT_TOKENS)
        a, b = secrets.token_hex(16), secrets.token_hex(16)
        await self._engine.prefill(model.id, ids, a)
        again = await self._engine.prefill(model.id, ids, a)
        if again.cached is None:
            message = "the engine does not report cached_tokens: no hit can be proved"
            self._add("cached_tokens", "failed", message, "start vLLM with --enable-prompt-tokens-details")
            return
        message = f"a repeated prompt hit {again.cached} of {again.prompt} tokens"
        self._add("cached_tokens", "ok" if again.cached else "failed", message, "--enable-prefix-caching")
        mine, theirs = _with_salt(planned, a), _with_salt(planned, b)
        for tier in self._services.pins.tiers if planned else ():
            await self._check_tier(tier, mine, theirs)
        other = await self._engine.prefill(model.id, ids, b, store=False)
        if other.cached:
            message = f"the same prompt under another salt hit {other.cached} tokens: sessions are NOT isolated"
            remedy = f"use {_CONNECTOR} or LMCacheMPConnector; LMCacheConnectorV1 ignores the salt"
            self._add(_ISOLATION, "failed", message, remedy)
        else:
            self._add(_ISOLATION, "ok", "the same prompt under another salt hit nothing")
        if planned:
            await self._clean_up([*mine, *theirs])

    async def _check_tier(self, tier: Tier, mine: list[ObjectKey], theirs: list[ObjectKey]) -> None:
        name = f"{tier.name} tier"
        remedy = {
            "disk": "is kv_dir the base_path of LMCache's fs adapter?",
            "redis": "are kv_redis_url, kv_redis_prefix and kv_redis_adapter those of LMCache's adapter?",
            "s3": "is s3_bucket the bucket of LMCache's s3 adapter, and has that not switched itself off (cwg health)?",
        }[tier.name]
        try:
            count = await self._landed(tier, mine)
            if count < len(mine):
                where = f"under their own names within {self._land_s:g} s"
                self._add(name, "failed", f"{count} of {len(mine)} objects of a prompt were found {where}", remedy)
                return
            if any(await tier.sizes([str(key) for key in theirs])):
                message = f"the {tier.name} tier has objects of one salt under another: sessions are NOT isolated"
                self._add(f"{_ISOLATION} in the {name}", "failed", message, f"use {_CONNECTOR} or LMCacheMPConnector")
                return
            self._add(name, "ok", f"{count} objects were found under their salt, none under another")
        except TierUnavailable as error:
            self._add(name, "failed", str(error), remedy)
            return
        async with self._services.claims.keep(mine):
            await self._check_pins(tier, mine)

    async def _check_pins(self, tier: Tier, keys: list[ObjectKey]) -> None:
        """Pin objects, drop the originals, and restore them, as after an eviction."""
        name = f"{tier.name} {_PINS}"
        try:
            pinned = await tier.pin(keys, {})
            await tier.drop_original(keys)
            states = await tier.check_and_restore(pinned)
        except TierUnavailable as error:
            on_disk = "pins_dir must be writable and on the file system of kv_dir"
            self._add(name, "failed", str(error), on_disk if tier.name == "disk" else "")
            return
        if len(pinned) < len(keys):
            message = f"{len(pinned)} of {len(keys)} objects could be pinned"
            self._add(name, "failed", message, "give LMCache's storage more room")
        elif all(state is ObjectState.RELINKED for state in states):
            self._add(name, "ok", f"{len(pinned)} objects survived the removal of their originals")
        else:
            message = f"after the removal of the originals: {', '.join(state.value for state in states)}"
            self._add(name, "failed", message)

    async def _landed(self, tier: Tier, keys: list[ObjectKey]) -> int:
        """Wait for all of these objects, and return how many there are."""
        names = [str(key) for key in keys]
        end = time.monotonic() + self._land_s
        while not all(sizes := await tier.sizes(names)) and time.monotonic() < end:  # noqa: ASYNC110 - no event
            await asyncio.sleep(_POLL_S)
        return sum(map(bool, sizes))

    async def _clean_up(self, keys: list[ObjectKey]) -> None:
        async with self._services.claims.removing(keys) as removal:
            await removal.remove(keys, originals=True)
        if self._services.cache is not None:
            answers = await self._services.cache.delete_each(keys, tier="l1")
            if len(answers) > 1 or len(self._services.engines.members) > 1 or self._node.finds_cache:
                self._check_pairing(answers)

    def _check_pairing(self, answers: Answers[tuple[int, int]]) -> None:
        """Conclude from what each cache had in its memory which one this engine stores in, and tell the node.

        Nobody else has sent these token ids, and objects that are being read or written have not been deleted, but are
        there all the same.
        """
        had = {url: sum(answer) for url, answer in answers.items() if not isinstance(answer, GatewayError)}
        found, node = max(had, key=had.__getitem__, default=""), self._node
        if not had.get(found):
            message = "what it computed came into the memory of no cache that answers: which one is its is not proved"
            if node.finds_cache:
                node.cache = ""
            self._add(_PAIRING, "warning", message, f"{_ADDRESS_OF_CACHE}; list that server's HTTP address here")
            return
        node.cache = found
        if node.configured_cache and same_url(found) != same_url(node.configured_cache):
            message = f"what it computed came into the memory of {found}, not of {node.configured_cache} as configured"
            remedy = f"set its cache_url to {found}, or correct the engine: {_ADDRESS_OF_CACHE}"
            self._add(_PAIRING, "failed", message, remedy)
        else:
            self._add(_PAIRING, "ok", f"what it computed came into the memory of {found}")

    async def _random_ids(self, model: Model, count: int) -> tuple[int, ...]:
        """Token ids that nobody has sent before."""
        ids: list[int] = []
        while len(ids) < count:
            ids += await self._engine.tokenize(model.id, secrets.token_hex(4 * count))
        return tuple(ids[:count])


def _with_salt(planned: Plan | None, salt: str) -> list[ObjectKey]:
    keys = planned.keys if planned else ()
    return [ObjectKey(key.model, key.rank, key.group, key.chunk_hash, salt) for key in keys]

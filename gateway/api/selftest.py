"""The self-test: does this stack isolate salts, store where the gateway looks, and report cached tokens?

It runs on the live stack with throw-away prompts of random token ids, at start and in `cwg doctor`. Nothing here trusts
configuration: LMCacheConnectorV1, for one, takes a salt and ignores it (LMCache#2878).
"""

import asyncio
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from gateway.engines.client import HttpEngineClient, Model
from gateway.errors import GatewayError
from gateway.kv.file_lock import FileLock
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Restored, Tier, TierUnavailable
from gateway.windows.context import Services
from gateway.windows.materialize import Plan, plan

Status = Literal["ok", "warning", "failed"]
_ENGINE = "engine"
_ISOLATION = "isolation"
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
    def leaks(self) -> bool:
        """Whether KV of one salt was found under another."""
        return self.status == "failed" and self.name.startswith(_ISOLATION)

    @property
    def is_unreachable(self) -> bool:
        """Whether the engine could not be tested at all."""
        return self.status == "failed" and self.name == _ENGINE


async def run(services: Services, engine: HttpEngineClient, land_s: float = _LAND_S) -> list[Check]:
    """Test one engine for all that windows depend on. Failures are in the list, not raised.

    An object may take `land_s` seconds to appear in a tier.
    """
    checks: list[Check] = []
    try:
        models = await engine.models()
    except GatewayError as error:
        return [Check(_ENGINE, "failed", error.message, error.hint)]
    model = next(iter(models.values()))
    checks.append(Check(_ENGINE, "ok", f"{engine.url} serves {', '.join(models)}"))
    checks += await _aborts(engine)
    first = await _plan(services, engine, model, checks)
    try:
        checks += await _salts(services, engine, model, first, land_s)
    except GatewayError as error:
        checks.append(Check(_ISOLATION, "failed", error.message, error.hint))
    return checks


async def _aborts(engine: HttpEngineClient) -> list[Check]:
    """Check whether a client that disconnects may crash this engine, as far as its metrics tell."""
    if engine.abort_risk == "mended":
        return [Check("aborts", "ok", "a client may disconnect while its KV is being loaded")]
    if engine.abort_risk != "exposed":
        return []
    return [
        Check(
            "aborts",
            "warning",
            "a client that disconnects while its KV is being loaded may crash this engine "
            f"(vLLM {await engine.version() or 'of an unknown version'}; vllm#46240, LMCache#4938)",
            "start it with kv_connector AbortSafeLMCacheConnector of gateway.stack.connector (docs/own-vllm.md)",
        )
    ]


async def _plan(services: Services, engine: HttpEngineClient, model: Model, checks: list[Check]) -> Plan | None:
    if services.cache is None:
        checks.append(
            Check("cache", "warning", "no cache is configured: windows keep text and ids only", "set cache_url")
        )
        return None
    try:
        info = await services.cache.info()
    except GatewayError as error:
        checks.append(Check("cache", "failed", error.message, error.hint))
        return None
    checks.append(Check("cache", "ok", f"LMCache answers, chunk size {info.chunk_size}"))
    wanted = services.settings.chunk_size
    if wanted and wanted != info.chunk_size:
        # With another chunk size, no object would be found under its name.
        checks.append(
            Check(
                "chunk size",
                "failed",
                f"the gateway is set to {wanted}, LMCache to {info.chunk_size}",
                "leave chunk_size at 0",
            )
        )
        return None
    if model.root not in info.world_sizes:
        checks.append(
            Check(
                "connector",
                "warning",
                f"no engine has registered model {model.root!r} with this LMCache yet",
                "start vLLM with LMCacheMPConnector and lmcache.mp.host/port of this server",
            )
        )
    try:
        ids = await _random_ids(engine, model, (wanted or info.chunk_size) * _CHUNKS + 1)
        return plan(model, "", ids, info, wanted)
    except GatewayError as error:
        checks.append(Check("cache", "failed", error.message, error.hint))
        return None


async def _salts(
    services: Services, engine: HttpEngineClient, model: Model, planned: Plan | None, land_s: float
) -> list[Check]:
    """The same prompt under salt A, A again, then B: A must hit its own, B must hit nothing."""
    ids = planned.ids if planned else await _random_ids(engine, model, _DEFAULT_TOKENS)
    a, b = secrets.token_hex(16), secrets.token_hex(16)
    await engine.prefill(model.id, ids, a)
    again = await engine.prefill(model.id, ids, a)
    checks: list[Check] = []
    if again.cached is None:
        flag = "start vLLM with --enable-prompt-tokens-details"
        return [
            Check("cached_tokens", "failed", "the engine does not report cached_tokens: no hit can be proved", flag)
        ]
    status: Status = "ok" if again.cached else "failed"
    checks.append(
        Check(
            "cached_tokens",
            status,
            f"a repeated prompt hit {again.cached} of {again.prompt} tokens",
            "--enable-prefix-caching",
        )
    )
    if planned:
        checks += await _tiers(services, planned, a, b, land_s)
    other = await engine.prefill(model.id, ids, b, store=False)
    leak = f"the same prompt under another salt hit {other.cached} tokens: sessions are NOT isolated"
    remedy = "use --kv-transfer-config with LMCacheMPConnector; LMCacheConnectorV1 ignores the salt"
    checks.append(
        Check(_ISOLATION, "failed", leak, remedy)
        if other.cached
        else Check(_ISOLATION, "ok", "the same prompt under another salt hit nothing")
    )
    if planned:
        await _clean_up(services, [*_under(planned, a), *_under(planned, b)])
    return checks


async def _tiers(services: Services, planned: Plan, a: str, b: str, land_s: float) -> list[Check]:
    lock = services.pins.lock
    return [check for tier in services.pins.tiers for check in await _tier(tier, planned, a, b, lock, land_s)]


async def _tier(tier: Tier, planned: Plan, a: str, b: str, lock: FileLock, land_s: float) -> list[Check]:
    mine, theirs = _under(planned, a), _under(planned, b)
    name = f"{tier.name} tier"
    where = {
        "disk": "is kv_dir the base_path of LMCache's fs adapter?",
        "redis": "is kv_redis_url LMCache's resp adapter?",
    }
    try:
        count = await _landed(tier, mine, land_s)
        if count < len(mine):
            message = f"{count} of {len(mine)} objects of a prompt were found under their own names within {land_s:g} s"
            return [Check(name, "failed", message, where[tier.name])]
        if any(await tier.sizes([str(key) for key in theirs])):
            leak = f"the {tier.name} tier has objects of one salt under another: sessions are NOT isolated"
            return [Check(f"{_ISOLATION} in the {name}", "failed", leak, "use LMCacheMPConnector")]
        checks = [Check(name, "ok", f"{count} objects were found under their salt, none under another")]
        async with lock.acquire(exclusive=False):  # a worker that starts sweeps pins without a window
            return [*checks, await _pinning(tier, mine)]
    except TierUnavailable as error:
        return [Check(name, "failed", str(error), where[tier.name])]


async def _pinning(tier: Tier, keys: list[ObjectKey]) -> Check:
    """Pin objects, drop the originals, and restore them, as after an eviction."""
    name = f"{tier.name} pins"
    try:
        pinned = await tier.pin(keys, {})
        await tier.drop_original(keys)
        states = await tier.restore(pinned)
    except TierUnavailable as error:
        return Check(name, "failed", str(error), "pins_dir must be writable and on the file system of kv_dir")
    if len(pinned) < len(keys):
        return Check(
            name, "failed", f"{len(pinned)} of {len(keys)} objects could be pinned", "give LMCache's storage more room"
        )
    if all(state is Restored.RELINKED for state in states):
        return Check(name, "ok", f"{len(pinned)} objects survived the removal of their originals")
    return Check(name, "failed", f"after the removal of the originals: {', '.join(s.value for s in states)}")


async def _landed(tier: Tier, keys: list[ObjectKey], land_s: float) -> int:
    """Wait for all of these objects, and return how many there are."""
    names = [str(key) for key in keys]
    end = time.monotonic() + land_s
    while not all(sizes := await tier.sizes(names)) and time.monotonic() < end:  # noqa: ASYNC110 - no event to wait for
        await asyncio.sleep(_POLL_S)
    return sum(map(bool, sizes))


async def _clean_up(services: Services, keys: list[ObjectKey]) -> None:
    async with services.pins.lock.acquire(exclusive=True):
        await services.pins.remove(keys, originals=True)
    if services.cache is not None:
        await services.cache.delete(keys, tier="l1")


def _under(planned: Plan, salt: str) -> list[ObjectKey]:
    return [ObjectKey(k.model, k.rank, k.group, k.chunk_hash, salt) for k in planned.keys]


async def _random_ids(engine: HttpEngineClient, model: Model, count: int) -> tuple[int, ...]:
    """Token ids that nobody has sent before."""
    ids: list[int] = []
    while len(ids) < count:
        ids += await engine.tokenize(model.id, secrets.token_hex(4 * count))
    return tuple(ids[:count])

"""What health says of tiers that answer, and still do not keep KV."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.api.health import Health
from gateway.windows.tier_risks import find_risks
from tests.support.fakes.engine import FakeEngine
from tests.support.harness import BOTH_WORK, cache_server, open_harness
from tests.support.tier_harness import RedisServer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("adapters", "risk"),
    [
        (BOTH_WORK, ""),
        ({"fs": True}, "redis tier: LMCache has no adapter of type resp, only fs; start it with that --l2-adapter"),
        ({}, "disk tier: LMCache has no adapter of type fs, and no other; start it"),
        ({"resp": True, "fs": False}, "disk tier: LMCache's fs adapter has stopped; restart LMCache"),
    ],
)
async def test_health_names_adapters_that_keep_nothing(
    engine: FakeEngine, redis_server: RedisServer, tmp_path: Path, adapters: Mapping[str, bool], risk: str
) -> None:
    with cache_server(adapters=adapters) as cache:
        async with open_harness(engine, cache, redis_server, tmp_path) as harness:
            found = (await Health(harness.services).components("tiers"))["tiers"]
            assert found["status"] == ("degraded" if risk else "healthy")
            assert str(found["message"]).startswith(risk)


async def test_health_names_a_redis_that_evicts(
    engine: FakeEngine, cache: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with open_harness(engine, cache, redis_server, tmp_path) as harness:
        harness.redis.client.config_set("maxmemory-policy", "allkeys-lfu")
        try:
            (risk,) = await find_risks(harness.services)
            assert risk.endswith(
                "maxmemory-policy is allkeys-lfu, by which windows may be evicted; set it to noeviction"
            )
        finally:
            harness.redis.client.config_set("maxmemory-policy", "noeviction")

"""A hung Redis costs all operations together a few seconds, and each a warning; nothing waits for it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from gateway.kv.keys import ObjectKey
from gateway.windows.archive.export import export
from gateway.windows.catalog import pinned_keys
from gateway.windows.clone import clone
from gateway.windows.context import Services
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming
from gateway.windows.retention import orphans
from gateway.windows.retention.usage import usage
from gateway.windows.thaw import thaw
from gateway.windows.verify import verify
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import gateway_in_front_of
from tests.support.harness import CHUNKS, GatewayHarness, open_harness, window
from tests.support.tier_harness import RedisServer

pytestmark = pytest.mark.anyio

# Each operation alone would take over ten seconds for one call that times out.
ALL_OPERATIONS_S = 15


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


@pytest.fixture
async def hung(
    engine: FakeEngine, cache: str, own_server: RedisServer, tmp_path: Path
) -> AsyncIterator[GatewayHarness]:
    """A harness with a window in both tiers, whose Redis hangs."""
    async with open_harness(engine, cache, own_server, tmp_path) as harness:
        await window(harness.services)
        own_server.hang()
        yield harness
        own_server.resume()


async def test_every_operation_works_without_the_tier(hung: GatewayHarness) -> None:
    parts = hung.services
    async with asyncio.timeout(ALL_OPERATIONS_S):
        verdict = await verify(hung.ctx, "w")
        assert (verdict.tiers["redis"].checked, verdict.tiers["disk"].intact) == (False, CHUNKS)
        assert "redis tier: it hangs" in verdict.warnings[0]
        _, _, receipt, _ = await thaw(hung.ctx, "w", new_session_id="t", warm="none")
        assert receipt.chunks_found == CHUNKS
        assert "redis tier: it hangs" in receipt.warnings[0]
        await clone(hung.ctx, "w", Naming("again"))
        assert [name async for name in (await export(hung.ctx, "w")).pieces]
        tiers, warnings = await usage(parts)
        assert ([tier.name for tier in tiers], len(warnings)) == (["disk"], 1)
        assert (await delete(hung.ctx, "w")).warnings
        assert (await orphans.delete_session(hung.ctx, "t")).warnings
        deleted = await delete(hung.ctx, "again")
        assert deleted.blocks_deleted == CHUNKS
        assert any("redis tier: it hangs" in warning for warning in deleted.warnings)
        assert await parts.claims.release_strays() == 0


async def test_deletion_keeps_a_freeze_waiting_only_briefly(hung: GatewayHarness) -> None:
    parts = hung.services
    found = await parts.store.window("default", "w")
    assert found is not None
    keys = pinned_keys(found, (await parts.store.manifest(found)).token_ids)
    async with asyncio.timeout(ALL_OPERATIONS_S):
        async with asyncio.TaskGroup() as both:
            both.create_task(delete(hung.ctx, "w"))
            await asyncio.sleep(0)  # it begins first
            both.create_task(_hold(parts, keys))


async def _hold(services: Services, keys: Sequence[ObjectKey]) -> None:
    async with services.claims.keep(keys):
        pass


async def test_health_reports_the_hung_tier(engine: FakeEngine, own_server: RedisServer, tmp_path: Path) -> None:
    redis = f"redis://127.0.0.1:{own_server.port}"
    with gateway_in_front_of(engine.url, tmp_path, kv_redis_url=redis) as gateway:
        own_server.hang()
        seen = gateway.http.get("/admin/health?component=tiers").json()["components"]["tiers"]
        assert (seen["status"], "redis tier: it hangs" in seen["message"]) == ("degraded", True)

"""Harnesses with KV on disk and in Redis."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gateway.app import open_services
from tests.support.fakes.engine import FakeEngine
from tests.support.retention_rig import RetentionHarness, settings
from tests.support.tier_harness import DiskTierHarness, RedisServer, RedisTierHarness


@pytest.fixture
async def harness(tmp_path: Path, engine: FakeEngine, redis_server: RedisServer) -> AsyncIterator[RetentionHarness]:
    async with AsyncExitStack() as stack:
        disk = DiskTierHarness(tmp_path)
        parts = await stack.enter_async_context(open_services(settings(tmp_path, engine, redis_server)))
        disk.pins = tmp_path / "kv-pins" / parts.store.store_id
        redis = RedisTierHarness(redis_server.port, parts.store.store_id)
        stack.callback(redis.client.close)
        yield RetentionHarness(parts, (disk, redis))

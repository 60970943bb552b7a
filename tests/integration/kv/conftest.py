"""A tier of each kind, for the tests of what they promise."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.s3_harness import S3TierHarness
from tests.support.tier_harness import DiskTierHarness, RedisServer, RedisTierHarness, TierHarness


@pytest.fixture(params=["disk", "redis", "s3"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TierHarness]:
    """Each tier in turn, empty."""
    if request.param == "disk":
        disk = DiskTierHarness(tmp_path)
        async with disk.tier:
            yield disk
    elif request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        redis = RedisTierHarness(server.port)
        async with redis.tier:
            yield redis
        redis.client.close()
    else:
        s3 = S3TierHarness(request.getfixturevalue("s3_server"))
        async with s3.tier:
            yield s3
        s3.close()

"""A tier whose server is slow, hangs, or is gone."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.kv.tiers.base import Tier, TierFull, TierUnavailable
from gateway.records import PinnedObject
from tests.support.held_answers import HeldAnswers
from tests.support.s3_harness import S3Server, s3_tier
from tests.support.tier_harness import RedisServer, key, keys, redis_tier, spelled

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["redis", "s3"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer | S3Server]:
    """A server of a tier, to be stopped."""
    own = RedisServer(tmp_path).start() if request.param == "redis" else S3Server(tmp_path).start()
    yield own
    own.stop()


def tier_of(server: RedisServer | S3Server, port: int, now: Callable[[], float] = time.monotonic) -> Tier:
    """The tier of a server, as seen through a port."""
    return redis_tier(port, now=now) if isinstance(server, RedisServer) else s3_tier(port, now=now)


async def every_operation(tier: Tier) -> None:
    """Each operation reports that it cannot reach the server."""
    objects = [PinnedObject(str(key(0)), tier.name, 1, b"")]
    for call in (
        tier.sizes(spelled(*keys(1))), tier.pin(keys(1), {}), tier.pin(keys(1), {objects[0].key: objects[0]}),
        tier.check_and_restore(objects), tier.verify(objects), tier.read(objects[0]), tier.put(key(0), b"x"),
        tier.unpin(keys(1)), tier.remove(keys(1)), tier.drop_original(keys(1)), tier.expose_pin(objects), tier.risks(),

    ):  # fmt: skip
        with pytest.raises(TierUnavailable, match=f"{tier.name} tier: ") as refused:
            await call
        assert not isinstance(refused.value, TierFull)


async def test_server_down_fails_every_operation(server: RedisServer | S3Server) -> None:
    server.stop()
    async with asyncio.timeout(10), tier_of(server, server.port) as tier:
        await every_operation(tier)
        assert not tier.suspended


async def test_slow_answer_is_awaited(server: RedisServer | S3Server) -> None:
    async with HeldAnswers(server.port) as held, tier_of(server, held.port) as tier:
        asked = asyncio.create_task(tier.sizes(spelled(*keys(3))))
        await held.until_asked(4 if isinstance(server, S3Server) else 2)  # a sign of life is asked for too
        held.release()
        assert await asked == [0] * 3
        assert not tier.suspended


async def test_hung_server_is_skipped_for_a_while(server: RedisServer | S3Server) -> None:
    now = time.monotonic()
    async with tier_of(server, server.port, lambda: now) as tier:
        assert await tier.sizes(spelled(*keys(1))) == [0]
        server.hang()
        async with asyncio.timeout(10):
            with pytest.raises(TierUnavailable, match=f"{tier.name} tier: it hangs .* skipped for 30 s"):
                await tier.sizes(spelled(*keys(1)))
            assert tier.suspended
            await every_operation(tier)
        server.resume()
        now += 30
        assert await tier.sizes(spelled(*keys(1))) == [0]
        assert not tier.suspended

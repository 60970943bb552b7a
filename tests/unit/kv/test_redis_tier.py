"""The Redis tier on a real redis-server: copies, full memory, many objects, other stores, a server that dies."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway.kv.tiers.base import ObjectState, Stored, TierFull, TierUnavailable
from gateway.kv.tiers.liveness import Hung, Liveness
from gateway.kv.tiers.redis import RedisOptions, RedisTier
from gateway.records import PinnedObject
from tests.support.gateway_process import eventually, free_port
from tests.support.tier_harness import RedisServer, RedisTierHarness, key, keys, redis_tier, spelled, value

pytestmark = pytest.mark.anyio


@pytest.fixture
async def rig(redis_server: RedisServer) -> AsyncIterator[RedisTierHarness]:
    rig = RedisTierHarness(redis_server.port)
    async with rig.tier:
        yield rig
    rig.client.config_set("maxmemory", 0)
    rig.client.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server to stop and to kill."""
    server = RedisServer(tmp_path).start()
    yield server
    server.stop()


def fill(rig: RedisTierHarness, count: int, size: int = 5000) -> list[bytes]:
    """Objects as LMCache writes them."""
    values = [value(size) for _ in range(count)]
    for one, content in zip(keys(count), values, strict=True):
        rig.put(one, content)
    return values


async def test_pin_is_a_copy_that_outlives_the_original(rig: RedisTierHarness) -> None:
    (content,) = fill(rig, 1)
    await rig.tier.pin(keys(1), {})
    assert sorted(rig.client.scan_iter()) == sorted(
        [b"cwg:0123456789ab:pin:" + str(key(0)).encode(), str(key(0)).encode()]
    )
    rig.put(key(0), value())  # not a link: what happens to one does not happen to the other
    assert rig.pinned(key(0)) == content


async def test_pin_never_expires_even_if_original_does(rig: RedisTierHarness) -> None:
    rig.client.set(str(key(0)), value(), ex=1000)
    await rig.tier.pin(keys(1), {})
    assert rig.client.ttl(f"cwg:0123456789ab:pin:{key(0)}") == -1


async def test_sizes_work_without_scripting_permission(rig: RedisTierHarness, redis_server: RedisServer) -> None:
    fill(rig, 2)
    rig.client.acl_setuser("plain", enabled=True, passwords=["+word"], keys=["*"], commands=["+@all", "-@scripting"])
    async with redis_tier(redis_server.port, "other", user="plain:word@") as tier:
        assert await tier.sizes(spelled(*keys(3))) == [5000, 5000, 0]
    rig.client.acl_deluser("plain")


async def test_many_objects_pass_every_operation(rig: RedisTierHarness) -> None:
    count = 1203  # more than one call of names, and no whole number of calls of values
    values = fill(rig, count, size=100)
    assert await rig.tier.sizes(spelled(*keys(count))) == [100] * count
    objects = await rig.tier.pin(keys(count), {})
    assert [o.key for o in objects] == [str(one) for one in keys(count)]
    assert await rig.tier.pin(keys(count), {o.key: o for o in objects}) == objects
    lost = [one for number, one in enumerate(keys(count)) if number % 3 == 0]
    await rig.tier.drop_original(lost)
    wanted = [ObjectState.RELINKED if number % 3 == 0 else ObjectState.INTACT for number in range(count)]
    assert await rig.tier.check_and_restore(objects) == wanted
    assert [rig.live(one) for one in keys(count)] == values
    assert await rig.tier.verify(objects) == [ObjectState.INTACT] * count
    assert await rig.tier.sweep(set(keys(count))) == 0
    assert await rig.tier.unpin(keys(count)) == count * 100
    assert await rig.tier.remove(keys(count)) == count * 100
    assert rig.client.dbsize() == 0


async def test_bytes_freed_count_every_copy(rig: RedisTierHarness) -> None:
    fill(rig, 2, size=1000)
    await rig.tier.pin(keys(1), {})
    assert await rig.tier.remove(keys(2)) == 3000


async def test_two_stores_in_one_redis_keep_pins_apart(rig: RedisTierHarness, redis_server: RedisServer) -> None:
    values = fill(rig, 3)
    async with redis_tier(redis_server.port, "ba9876543210") as other:
        await rig.tier.pin(keys(3), {})
        objects = await other.pin(keys(3), {})
        assert await rig.tier.sweep([]) == 3
        assert await rig.tier.remove(keys(3)) == sum(map(len, values))
        assert await other.verify(objects) == [ObjectState.INTACT] * 3
        assert await other.check_and_restore(objects) == [ObjectState.RELINKED] * 3
        assert await other.sweep([]) == 3
    assert [rig.live(one) for one in keys(3)] == values


async def test_foreign_keys_are_never_touched(rig: RedisTierHarness) -> None:
    foreign = {b"cwg:0123456789ab:other": b"1", b"cwg:0123456789abc:pin:x": b"2", b"x": b"3", b"cwg:": b"4"}
    rig.client.mset(foreign)
    fill(rig, 1)
    await rig.tier.pin(keys(1), {})
    await rig.tier.sweep([])
    await rig.tier.remove(keys(1))
    assert {name: rig.client.get(name) for name in rig.client.scan_iter()} == foreign


async def test_value_of_another_type_is_unavailable(rig: RedisTierHarness) -> None:
    rig.client.lpush(str(key(0)), "x")
    with pytest.raises(TierUnavailable, match=r"redis tier: .*WRONGTYPE"):
        await rig.tier.sizes(spelled(*keys(1)))


async def test_full_memory_raises_tier_full(rig: RedisTierHarness) -> None:
    values = fill(rig, 20, size=200_000)
    rig.client.config_set("maxmemory-policy", "noeviction")
    rig.client.config_set("maxmemory", int(rig.client.info("memory")["used_memory"]) + 1_000_000)
    with pytest.raises(TierFull, match="maxmemory"):
        await rig.tier.pin(keys(20), {})
    assert [rig.live(one) for one in keys(20)] == values
    assert await rig.tier.sweep([]) > 0  # removing needs no memory
    rig.client.config_set("maxmemory", 0)
    assert len(await rig.tier.pin(keys(20), {})) == 20


async def test_restore_into_full_memory_keeps_pins(rig: RedisTierHarness) -> None:
    values = fill(rig, 5, size=200_000)
    objects = await rig.tier.pin(keys(5), {})
    await rig.tier.drop_original(keys(5))
    rig.client.config_set("maxmemory", 1_000_000)
    with pytest.raises(TierFull):
        await rig.tier.check_and_restore(objects)
    assert [rig.pinned(one) for one in keys(5)] == values
    rig.client.config_set("maxmemory", 0)
    assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED] * 5


async def every_operation(tier: RedisTier) -> None:
    """Each operation reports that it cannot reach the server."""
    objects = [PinnedObject(str(key(0)), "redis", 1, b"")]
    for call in (
        tier.sizes(spelled(*keys(1))), tier.pin(keys(1), {}), tier.pin(keys(1), {objects[0].key: objects[0]}),
        tier.check_and_restore(objects), tier.verify(objects), tier.unpin(keys(1)), tier.remove(keys(1)),
        tier.drop_original(keys(1)), tier.sweep([]),
    ):  # fmt: skip
        with pytest.raises(TierUnavailable, match="redis tier: ") as refused:
            await call
        assert not isinstance(refused.value, TierFull)


async def test_server_down_fails_every_operation_at_once() -> None:
    async with redis_tier(free_port()) as tier:
        clock = time.monotonic()
        await every_operation(tier)
        assert time.monotonic() - clock < 3


async def test_server_that_comes_back_is_used_again(own_server: RedisServer) -> None:
    rig = RedisTierHarness(own_server.port)
    async with rig.tier:
        fill(rig, 1)
        assert all(await rig.tier.sizes(spelled(*keys(1))))
        own_server.stop()
        with pytest.raises(TierUnavailable):
            await rig.tier.sizes(spelled(*keys(1)))
        own_server.start()
        assert await rig.tier.sizes(spelled(*keys(1))) == [0]
    rig.client.close()


# --- a server that hangs

_REST_S = 30


async def test_hung_server_delays_only_one_call(own_server: RedisServer) -> None:
    now = time.monotonic()
    async with redis_tier(own_server.port, now=lambda: now) as tier:
        assert await tier.sizes(spelled(*keys(1))) == [0]
        own_server.hang()
        async with asyncio.timeout(8):  # by their timeouts they would take more than ten seconds each
            with pytest.raises(TierUnavailable, match=r"redis tier: it hangs .* skipped for 30 s"):
                await tier.sizes(spelled(*keys(1)))
            assert tier.suspended
            await every_operation(tier)
        own_server.resume()
        with pytest.raises(TierUnavailable, match="skipped for 30 s"):
            await tier.sizes(spelled(*keys(1)))
        now += _REST_S
        assert await tier.sizes(spelled(*keys(1))) == [0]
        assert not tier.suspended


async def test_server_still_hung_is_suspended_again(own_server: RedisServer) -> None:
    now = time.monotonic()
    async with redis_tier(own_server.port, timeout_s=0.5, now=lambda: now) as tier:
        own_server.hang()
        for _ in range(2):
            async with asyncio.timeout(5):
                with pytest.raises(TierUnavailable, match="skipped for 30 s"):
                    await tier.sizes(spelled(*keys(1)))
            now += _REST_S


async def test_server_that_hangs_during_a_call_is_noticed(own_server: RedisServer) -> None:
    rig = RedisTierHarness(own_server.port)
    fill(rig, 40, size=2**20)
    async with rig.tier:
        objects = await rig.tier.pin(keys(40), {})
        going = asyncio.create_task(rig.tier.verify(objects * 50))
        before = int(rig.client.info("stats")["total_commands_processed"])
        while int(rig.client.info("stats")["total_commands_processed"]) < before + 5:  # noqa: ASYNC110 - it reads
            await asyncio.sleep(0)
        own_server.hang()
        async with asyncio.timeout(8):
            with pytest.raises(TierUnavailable, match="hangs"):
                await going
    rig.client.close()


async def test_slow_call_to_responsive_server_is_awaited() -> None:
    slow = asyncio.Event()
    asked = 0

    async def probe() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            slow.set()

    liveness = Liveness(probe, 5.0)
    assert await liveness.run(slow.wait)
    assert not liveness.suspended


async def test_own_stall_does_not_suspend_the_server() -> None:
    answered = asyncio.Event()
    asked = 0

    async def probe() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            time.sleep(0.6)  # noqa: ASYNC251 - the whole process stalls
            await asyncio.sleep(0.01)
        answered.set()

    liveness = Liveness(probe, 0.2)
    assert await liveness.run(answered.wait)
    assert not liveness.suspended
    assert asked == 2


async def test_failure_during_a_probe_is_retrieved() -> None:
    asked = asyncio.Event()

    async def call() -> None:
        await asked.wait()
        raise TimeoutError("the call")

    async def probe() -> None:
        asked.set()
        await asyncio.sleep(0.01)  # the call has failed by now
        raise TimeoutError("the sign of life")

    forgotten: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: forgotten.append(context))
    with pytest.raises(Hung):
        await Liveness(probe, 5.0).run(call)
    gc.collect()  # asyncio logs an exception never retrieved when its task is collected
    assert forgotten == []


async def test_cancelling_the_caller_cancels_the_call() -> None:
    ended = asyncio.Event()

    async def call() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    going = asyncio.create_task(Liveness(lambda: asyncio.sleep(0), 5.0).run(call))
    await asyncio.sleep(0.01)
    going.cancel()
    await ended.wait()
    with pytest.raises(asyncio.CancelledError):
        await going


# --- other ways in which LMCache uses a server


async def test_prefix_of_the_valkey_adapter_is_part_of_every_key(
    rig: RedisTierHarness, redis_server: RedisServer
) -> None:
    options = RedisOptions(url=f"redis://127.0.0.1:{redis_server.port}", adapter="valkey", prefix="team")
    content, foreign = value(), value()
    rig.client.set(f"team@{key(0)}", content)
    rig.put(key(1), foreign)  # of another deployment, without a prefix
    async with RedisTier(options, "0123456789ab", 5) as tier:
        assert tier.adapter == "valkey"
        assert await tier.sizes(spelled(*keys(2))) == [5000, 0]
        objects = await tier.pin(keys(2), {})
        assert [o.key for o in objects] == [str(key(0))]
        assert rig.pinned(key(0)) == content
        assert await tier.keys_with_salt({"salt"}) == {key(0)}
        assert await tier.inventory() == [Stored(key(0), 5000, 5000, 10_000)]
        await tier.drop_original(keys(2))
        assert await tier.check_and_restore(objects) == [ObjectState.RELINKED]
        assert rig.client.get(f"team@{key(0)}") == content
        assert await tier.remove(keys(2)) == 10_000
    assert rig.live(key(1)) == foreign


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_policy_that_evicts_is_a_risk(rig: RedisTierHarness, policy: str) -> None:
    rig.client.config_set("maxmemory-policy", policy)
    try:
        (risk,) = await rig.tier.risks()
        assert risk == (
            f"redis tier: its maxmemory-policy is {policy}, by which windows may be evicted; set it to noeviction"
        )
    finally:
        rig.client.config_set("maxmemory-policy", "noeviction")
    assert await rig.tier.risks() == []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Two masters that share the slots."""
    servers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        servers.append(RedisServer(tmp_path / name, "--cluster-enabled", "yes").start())
    one, other = (RedisTierHarness(server.port).client for server in servers)
    one.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8191)
    other.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
    one.execute_command("CLUSTER MEET", "127.0.0.1", servers[1].port)
    for client in (one, other):
        eventually(lambda: client.cluster("info")["cluster_state"] == "ok", "the cluster is up")  # noqa: B023
        eventually(lambda: len(client.cluster("nodes")) == 2, "the nodes know each other")  # noqa: B023
        client.close()
    yield servers
    for server in servers:
        server.stop()


async def test_cluster_keeps_a_pin_in_the_slot_of_its_object(cluster: list[RedisServer]) -> None:
    url, count = f"redis://127.0.0.1:{cluster[0].port}", 20
    options = RedisOptions(url=url, adapter="valkey", prefix="team", cluster=True)
    values = [value(100) for _ in range(count)]
    with redis.RedisCluster.from_url(url) as client:
        for one, content in zip(keys(count), values, strict=True):
            client.set(f"team@{one}", content)
        async with RedisTier(options, "0123456789ab", 5) as tier:
            assert await tier.sizes(spelled(*keys(count), key(99))) == [100] * count + [0]
            objects = await tier.pin(keys(count), {})
            assert len(objects) == count
            assert client.get(f"cwg:0123456789ab:pin:{{team@{key(3)}}}") == values[3]
            await tier.drop_original(keys(count))
            assert await tier.check_and_restore(objects) == [ObjectState.RELINKED] * count
            assert await tier.verify(objects) == [ObjectState.INTACT] * count
            assert [client.get(f"team@{one}") for one in keys(count)] == values
            assert await tier.keys_with_salt({"salt"}) == set(keys(count))
            assert len(await tier.inventory()) == count
            assert await tier.risks() == []
            assert await tier.sweep(keys(5)) == count - 5
            assert await tier.remove(keys(count)) == (count + 5) * 100
        assert [*client.scan_iter()] == []

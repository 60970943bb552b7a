"""Pins over both tiers at once."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.kv.pins import Pins
from gateway.kv.tiers.base import ObjectState, TierFull
from gateway.records import PinnedObject
from tests.support.gateway_process import free_port
from tests.support.tier_harness import (
    DiskTierHarness,
    RedisServer,
    RedisTierHarness,
    key,
    keys,
    redis_tier,
    spelled,
    value,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[DiskTierHarness]:
    rig = DiskTierHarness(tmp_path)
    async with rig.tier:
        yield rig


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[RedisTierHarness]:
    rig = RedisTierHarness(redis_server.port)
    async with rig.tier:
        yield rig
    rig.client.config_set("maxmemory", 0)
    rig.client.close()


@pytest.fixture
def pins(disk: DiskTierHarness, redis: RedisTierHarness) -> Pins:
    return Pins((disk.tier, redis.tier))


@pytest.fixture
async def half(disk: DiskTierHarness) -> AsyncIterator[Pins]:
    """Disk, and a Redis that is down."""
    async with redis_tier(free_port()) as down:
        yield Pins((down, disk.tier))


async def test_each_tier_answers_separately(pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness) -> None:
    disk.put(key(0), b"on disk")
    redis.put(key(1), b"in redis")
    for rig in (disk, redis):
        rig.put(key(2), b"in both")
    found, warnings = await pins.present(spelled(*keys(4)))
    both = {"disk": set(spelled(key(0), key(2))), "redis": set(spelled(key(1), key(2)))}
    assert (found, warnings) == (both, [])
    pinned, warnings = await pins.pin(keys(4), [])
    assert {tier: set(have) for tier, have in pinned.items()} == {
        "disk": {str(key(0)), str(key(2))},
        "redis": {str(key(1)), str(key(2))},
    }
    assert warnings == []


async def test_tier_gets_only_its_own_existing_pins(pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness) -> None:
    # The same chunk computed twice need not have the same bytes in both tiers.
    values = {"disk": value(), "redis": value()}
    disk.put(key(0), values["disk"])
    redis.put(key(0), values["redis"])
    first, _ = await pins.pin(keys(1), [])
    known = [have[str(key(0))] for have in first.values()]
    assert known[0].checksum != known[1].checksum
    again, _ = await pins.pin(keys(1), known)
    assert again == first
    restored, _ = await pins.check_and_restore(known)
    assert restored == {"disk": {str(key(0)): ObjectState.INTACT}, "redis": {str(key(0)): ObjectState.INTACT}}
    assert (disk.live(key(0)), redis.live(key(0))) == (values["disk"], values["redis"])


async def test_missing_compares_presence_and_size_by_tier(
    pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness
) -> None:
    for rig in (disk, redis):
        for one in keys(3):
            rig.put(one, value(100))
    pinned, _ = await pins.pin(keys(3), [])
    held = {tier: {key: one.size for key, one in have.items()} for tier, have in pinned.items()}
    assert await pins.missing(held) == {}
    await disk.tier.drop_original([key(0)])
    redis.put(key(2), value(99))
    assert await pins.missing(held) == {"disk": {str(key(0))}, "redis": {str(key(2))}}
    assert await pins.missing({}) == {}


async def test_loss_in_one_tier_is_reported_despite_the_other(
    pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness
) -> None:
    for rig in (disk, redis):
        rig.put(key(0), value())
    pinned, _ = await pins.pin(keys(1), [])
    await disk.tier.remove(keys(1))
    await redis.tier.drop_original(keys(1))
    restored, warnings = await pins.check_and_restore([o for have in pinned.values() for o in have.values()])
    assert restored == {"disk": {str(key(0)): ObjectState.MISSING}, "redis": {str(key(0)): ObjectState.RELINKED}}
    assert warnings == []


@pytest.mark.parametrize("originals", [True, False])
async def test_remove_frees_bytes_in_all_tiers(
    pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness, originals: bool
) -> None:
    for rig in (disk, redis):
        rig.put(key(0), value(1000))
    await pins.pin(keys(1), [])
    await disk.tier.drop_original(keys(1))  # so that the bytes on disk hang on the pin alone
    freed, warnings = await pins.remove(keys(1), originals=originals)
    assert (freed, warnings) == (3000 if originals else 2000, [])
    assert disk.pinned(key(0)) is redis.pinned(key(0)) is None
    assert (redis.live(key(0)) is None) is originals


async def test_sweep_counts_removals_of_all_tiers(pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness) -> None:
    for rig in (disk, redis):
        for one in keys(3):
            rig.put(one, value(10))
    await pins.pin(keys(3), [])
    assert await pins.sweep({key(0)}) == (4, [])
    assert await pins.sweep({key(0)}) == (0, [])


async def test_unreachable_tier_is_a_warning(half: Pins, disk: DiskTierHarness) -> None:
    content = value(1000)
    disk.put(key(0), content)
    found, warnings = await half.present(spelled(*keys(1)))
    assert found == {"disk": {str(key(0))}}  # no empty set for Redis: it was not read
    assert len(warnings) == 1
    assert warnings[0].startswith("redis tier: ")
    pinned, warnings = await half.pin(keys(1), [])
    assert (list(pinned), len(warnings)) == (["disk"], 1)
    (one,) = pinned["disk"].values()
    held = {tier: {one.key: one.size} for tier in ("disk", "redis", "a tier of former days")}
    assert await half.missing(held) == {"redis": {one.key}, "a tier of former days": {one.key}}
    restored, warnings = await half.check_and_restore([one, PinnedObject(one.key, "redis", one.size, one.checksum)])
    assert (restored, len(warnings)) == ({"disk": {str(key(0)): ObjectState.INTACT}}, 1)
    assert (await half.sweep([key(0)]))[0] == 0
    await disk.tier.drop_original(keys(1))
    freed, warnings = await half.remove(keys(1), originals=False)
    assert (freed, len(warnings)) == (1000, 1)


async def test_full_tier_fails_the_pinning(pins: Pins, disk: DiskTierHarness, redis: RedisTierHarness) -> None:
    for rig in (disk, redis):
        rig.put(key(0), value(200_000))
    redis.client.config_set("maxmemory", 1)  # what is there stays, nothing more may come
    with pytest.raises(TierFull, match="redis tier"):
        await pins.pin(keys(1), [])

"""What a tier promises that lists what it holds: S3 does not."""

import pytest

from gateway.kv.tiers.base import Stored
from tests.support.tier_harness import DiskTierHarness, RedisTierHarness, TierHarness, key, keys, pinned, spelled, value

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("rig", ["disk", "redis"], indirect=True)]


async def test_sweep_removes_strays_of_any_model_name(rig: TierHarness) -> None:
    models = ["org/model", "a/b/c", "plain", "/abs/path/to/model", "with space", "x-SEP-y", "é/ü", "[glob]*?"]
    held = [key(1, model=model) for model in models]
    strays = [key(2, model=model) for model in models] + [key(1, model="org/model", salt="other")]
    for one in [*held, *strays]:
        rig.put(one, value(10))
    await rig.tier.pin([*held, *strays], {})
    assert await rig.tier.sweep(set(held)) == len(strays)
    assert all(rig.pinned(one) for one in held)
    assert not any(rig.pinned(one) for one in strays)
    assert all(await rig.tier.sizes(spelled(*held, *strays)))
    assert await rig.tier.sweep(set(held)) == 0


async def test_sweep_keeping_nothing_removes_only_pins(rig: TierHarness) -> None:
    values, _ = await pinned(rig, 30)
    assert await rig.tier.sweep([]) == 30
    assert [rig.pinned(one) for one in keys(30)] == [None] * 30
    assert [rig.live(one) for one in keys(30)] == values


async def test_keys_with_salt_finds_objects_and_pins(rig: TierHarness) -> None:
    models = ["org/model", "plain", "/abs/path", "with space", "é/ü", "[glob]*?"]
    live = {key(1, model=model, salt=salt) for model in models for salt in ("a", "b", "xa")}
    pins = {key(2, model="plain", salt="a"), key(2, model="plain", salt="b")}
    for one in (*live, *pins):
        rig.put(one, value(10))
    await rig.tier.pin(list(pins), {})
    await rig.tier.drop_original(pins)
    assert await rig.tier.keys_with_salt({"a"}) == {one for one in live | pins if one.salt == "a"}
    assert await rig.tier.keys_with_salt({"a", "b", "none"}) == {one for one in live | pins if one.salt in ("a", "b")}
    assert await rig.tier.keys_with_salt(set()) == set()


async def test_inventory_has_every_object_once(rig: TierHarness) -> None:
    for number, size in enumerate((10, 20, 30, 40)):
        rig.put(key(number), value(size))
    await rig.tier.pin([key(1), key(2), key(3)], {})
    await rig.tier.drop_original([key(2)])
    rig.put(key(3), value(45))  # LMCache has written it again
    both = 20 if isinstance(rig, DiskTierHarness) else 40
    assert sorted(await rig.tier.inventory(), key=lambda one: str(one.key)) == [
        Stored(key(0), 10, 0, 10), Stored(key(1), 20, 20, both), Stored(key(2), 0, 30, 30), Stored(key(3), 45, 40, 85),
    ]  # fmt: skip
    free = await rig.tier.free()
    assert (free is None) == isinstance(rig, RedisTierHarness)

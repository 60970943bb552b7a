"""What every tier promises, tested on each: nothing here depends on whether a pin is a link or a copy."""

import asyncio

import pytest

from gateway.kv.tiers.base import ObjectState
from gateway.records import PinnedObject
from tests.support.tier_harness import DiskTierHarness, TierHarness, key, keys, pinned, spelled, value

pytestmark = pytest.mark.anyio


def known(objects: list[PinnedObject]) -> dict[str, PinnedObject]:
    """The pins of windows, as the store returns them."""
    return {o.key: o for o in objects}


# --- sizes


async def test_sizes_are_those_of_existing_objects(rig: TierHarness) -> None:
    there = [key(1), key(2), key(3, rank=0x02010200), key(4, model="plain")]
    for one in there:
        rig.put(one, value(10))
    near = [
        key(1, salt="other"),
        key(1, rank=0x01010100),
        key(1, model="org/some-mode"),
        key(1, model="org-SEP-some-mode"),
        key(5),
    ]
    assert await rig.tier.sizes(spelled(*near, *there)) == [0] * len(near) + [10] * len(there)
    assert await rig.tier.sizes([]) == []


async def test_pin_alone_has_no_size(rig: TierHarness) -> None:
    await pinned(rig, 1)
    await rig.tier.drop_original(keys(1))
    assert await rig.tier.sizes(spelled(*keys(1))) == [0]


# --- pin


async def test_pins_keep_order_and_skip_missing_objects(rig: TierHarness) -> None:
    sizes = [1, 5000, 3, 70_000, 2]
    values = {number: value(size) for number, size in enumerate(sizes)}
    for number, content in values.items():
        rig.put(key(number), content)
    asked = [key(4), key(9), key(0), key(3), key(8), key(1), key(2)]
    done = await rig.tier.pin(asked, {})
    assert [o.key for o in done] == [str(key(n)) for n in (4, 0, 3, 1, 2)]
    for o, number in zip(done, (4, 0, 3, 1, 2), strict=True):
        content = values[number]
        assert (o.tier, o.size, o.checksum) == (rig.tier.name, len(content), rig.checksum(content))
        assert rig.pinned(key(number)) == content
    assert rig.pinned(key(9)) is None
    assert await rig.tier.pin([], {}) == []


async def test_matching_pin_is_kept_if_original_changed(rig: TierHarness) -> None:
    (content,), objects = await pinned(rig, 1)
    rig.put(key(0), value())
    assert await rig.tier.pin(keys(1), known(objects)) == objects
    assert rig.pinned(key(0)) == content
    await rig.tier.drop_original(keys(1))
    assert await rig.tier.pin(keys(1), known(objects)) == objects


@pytest.mark.parametrize("harm", ["flip", "truncate", "grow", "empty"])
async def test_damaged_pin_is_replaced_from_good_original(rig: TierHarness, harm: str) -> None:
    (content,), objects = await pinned(rig, 1)
    rig.put_pin(key(0), harmed(content, harm))
    (again,) = await rig.tier.pin(keys(1), known(objects))
    assert again == objects[0]
    assert rig.pinned(key(0)) == rig.live(key(0)) == content


async def test_damage_in_pin_and_original_removes_both(rig: TierHarness) -> None:
    (content, other), objects = await pinned(rig, 2)
    bad = harmed(content, "flip")
    if isinstance(rig, DiskTierHarness):
        rig.flip(key(0))
    else:
        rig.put(key(0), bad)
        rig.put_pin(key(0), bad)
    assert rig.live(key(0)) == rig.pinned(key(0)) == bad
    assert await rig.tier.pin(keys(2), known(objects)) == objects[1:]
    assert rig.live(key(0)) is rig.pinned(key(0)) is None
    assert rig.live(key(1)) == rig.pinned(key(1)) == other


async def test_unknown_pin_is_replaced_from_the_original(rig: TierHarness) -> None:
    content = value()
    rig.put(key(0), content)
    rig.put_pin(key(0), value())
    (one,) = await rig.tier.pin(keys(1), {})
    assert one.checksum == rig.checksum(content)
    assert rig.pinned(key(0)) == content


async def test_pin_of_another_freeze_survives_lost_original(rig: TierHarness) -> None:
    # Two freezes of one lineage hold the lock together; between them LMCache evicts. The first is about to commit.
    (content,), objects = await pinned(rig, 1)
    await rig.tier.drop_original(keys(1))
    await rig.tier.pin(keys(1), {})
    assert rig.pinned(key(0)) == content
    assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED]


# --- restore


async def test_untouched_object_is_intact(rig: TierHarness) -> None:
    values, objects = await pinned(rig, 9)
    assert await rig.tier.check_and_restore(objects) == [ObjectState.INTACT] * 9
    assert [rig.live(one) for one in keys(9)] == values
    assert await rig.tier.check_and_restore([]) == []


async def test_evicted_originals_are_restored_from_pins(rig: TierHarness) -> None:
    values, objects = await pinned(rig, 9)
    await rig.tier.drop_original(keys(9))
    assert await rig.tier.sizes(spelled(*keys(9))) == [0] * 9
    assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED] * 9
    assert [rig.live(one) for one in keys(9)] == values
    assert await rig.tier.check_and_restore(objects) == [ObjectState.INTACT] * 9


def harmed(content: bytes, harm: str) -> bytes:
    """Wrong bytes, of the right size or not."""
    match harm:
        case "flip":
            return bytes([content[0] ^ 1]) + content[1:]
        case "flip at the end":
            return content[:-1] + bytes([content[-1] ^ 0x80])
        case "truncate":
            return content[:-1]
        case "empty":
            return b""
        case "grow":
            return content + b"\0"
        case _:
            return value(len(content))


HARMS = ["flip", "flip at the end", "truncate", "empty", "grow", "another object"]


@pytest.mark.parametrize("harm", HARMS)
async def test_damaged_original_is_replaced_by_the_pin(rig: TierHarness, harm: str) -> None:
    (content,), objects = await pinned(rig, 1)
    rig.put(key(0), harmed(content, harm))
    assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED]
    assert rig.live(key(0)) == rig.pinned(key(0)) == content


@pytest.mark.parametrize("harm", [*HARMS, "gone"])
async def test_damaged_or_lost_pin_is_restored_from_original(rig: TierHarness, harm: str) -> None:
    (content,), objects = await pinned(rig, 1)
    if harm == "gone":
        rig.drop_pin(key(0))
    else:
        rig.put_pin(key(0), harmed(content, harm))
    assert await rig.tier.check_and_restore(objects) == [ObjectState.INTACT]
    assert rig.live(key(0)) == rig.pinned(key(0)) == content
    assert await rig.tier.verify(objects) == [ObjectState.INTACT]


@pytest.mark.parametrize("harm", HARMS)
async def test_damage_in_both_places_is_deleted(rig: TierHarness, harm: str) -> None:
    (content, other), objects = await pinned(rig, 2)
    rig.put(key(0), harmed(content, harm))
    rig.put_pin(key(0), harmed(content, "truncate"))
    assert await rig.tier.check_and_restore(objects) == [ObjectState.CORRUPT, ObjectState.INTACT]
    assert rig.live(key(0)) is rig.pinned(key(0)) is None
    assert rig.live(key(1)) == rig.pinned(key(1)) == other
    assert await rig.tier.check_and_restore(objects) == [ObjectState.MISSING, ObjectState.INTACT]


async def test_damaged_remainder_of_a_pair_is_deleted(rig: TierHarness) -> None:
    contents, objects = await pinned(rig, 2)
    rig.drop_pin(key(0))
    rig.put(key(0), harmed(contents[0], "flip"))
    await rig.tier.drop_original([key(1)])
    rig.put_pin(key(1), harmed(contents[1], "flip"))
    assert await rig.tier.check_and_restore(objects) == [ObjectState.CORRUPT] * 2
    assert [rig.live(one) for one in keys(2)] == [rig.pinned(one) for one in keys(2)] == [None, None]


async def test_object_in_neither_place_is_missing(rig: TierHarness) -> None:
    _, objects = await pinned(rig, 1)
    await rig.tier.remove(keys(1))
    assert await rig.tier.check_and_restore(objects) == [ObjectState.MISSING]
    assert [state.usable for state in ObjectState] == [True, True, False, False]


# --- verify


async def test_verify_reports_pin_states_and_changes_nothing(rig: TierHarness) -> None:
    contents, objects = await pinned(rig, 5)
    rig.put_pin(key(1), harmed(contents[1], "flip"))
    rig.put_pin(key(2), harmed(contents[2], "truncate"))
    rig.drop_pin(key(3))
    rig.put(key(4), value())
    before = [(rig.live(one), rig.pinned(one)) for one in keys(5)]
    assert await rig.tier.verify(objects) == [
        ObjectState.INTACT, ObjectState.CORRUPT, ObjectState.CORRUPT, ObjectState.MISSING, ObjectState.INTACT,
    ]  # fmt: skip
    assert [(rig.live(one), rig.pinned(one)) for one in keys(5)] == before
    assert await rig.tier.verify([]) == []


# --- letting go


async def test_unpin_keeps_originals_and_remove_does_not(rig: TierHarness) -> None:
    values, _ = await pinned(rig, 6)
    await rig.tier.unpin(keys(3))
    assert [rig.pinned(one) for one in keys(6)] == [None] * 3 + values[3:]
    assert [rig.live(one) for one in keys(6)] == values
    await rig.tier.remove(keys(6))
    assert [rig.live(one) for one in keys(6)] == [rig.pinned(one) for one in keys(6)] == [None] * 6


async def test_missing_object_frees_nothing(rig: TierHarness) -> None:
    assert await rig.tier.unpin([key(7)]) == 0
    assert await rig.tier.remove([key(7)]) == 0
    assert await rig.tier.unpin([]) == await rig.tier.remove([]) == 0
    await rig.tier.drop_original([key(7)])
    await rig.tier.drop_original([])


async def test_last_link_frees_the_bytes(rig: TierHarness) -> None:
    values, _ = await pinned(rig, 3)
    await rig.tier.drop_original(keys(3))
    assert await rig.tier.unpin(keys(3)) == sum(map(len, values))


async def test_drop_original_keeps_the_pins(rig: TierHarness) -> None:
    values, _ = await pinned(rig, 3)
    await rig.tier.drop_original(keys(2))
    assert [rig.live(one) for one in keys(3)] == [None, None, values[2]]
    assert [rig.pinned(one) for one in keys(3)] == values


# --- pins that go by other names


async def test_pin_is_restored_under_another_name(rig: TierHarness) -> None:
    values, objects = await pinned(rig, 3)
    names = [key(number, salt="other") for number in range(3)]
    apart = [o._replace(key=str(name), pin=o.key) for o, name in zip(objects, names, strict=True)]
    assert await rig.tier.verify(apart) == [ObjectState.INTACT] * 3
    assert [await rig.tier.read(one) for one in apart] == values
    assert await rig.tier.sizes(spelled(*names)) == [0] * 3  # LMCache finds them once they are restored
    assert await rig.tier.check_and_restore(apart) == [ObjectState.RELINKED] * 3
    assert await rig.tier.check_and_restore(apart) == [ObjectState.INTACT] * 3
    assert [rig.live(name) for name in names] == values
    await rig.tier.drop_original(keys(3))
    rig.drop_pin(key(0))
    assert await rig.tier.check_and_restore(apart[:1]) == [ObjectState.INTACT]
    assert rig.pinned(key(0)) == values[0]  # what LMCache had under the other name has mended the pin
    rig.put(names[1], harmed(values[1], "flip"))
    assert await rig.tier.check_and_restore(apart[1:2]) == [ObjectState.RELINKED]
    assert rig.live(names[1]) == values[1]


async def test_expose_pin_does_not_check_bytes(rig: TierHarness) -> None:
    values, objects = await pinned(rig, 3)
    rig.put_pin(key(1), harmed(values[1], "flip"))
    rig.drop_pin(key(2))
    names = [key(number, salt="other") for number in range(3)]
    await rig.tier.expose_pin([o._replace(key=str(name), pin=o.key) for o, name in zip(objects, names, strict=True)])
    assert [rig.live(name) for name in names] == [values[0], harmed(values[1], "flip"), None]
    await rig.tier.drop_original(names)
    assert [rig.live(name) for name in names] == [None] * 3
    assert [rig.pinned(one) for one in keys(3)] == [values[0], harmed(values[1], "flip"), None]


# --- what others do meanwhile


async def test_object_lost_behind_our_back_is_seen_and_restored(rig: TierHarness) -> None:
    values, objects = await pinned(rig, 3)
    assert await rig.tier.sizes(spelled(*keys(3))) == [5000] * 3
    rig.lose(key(1))
    assert await rig.tier.sizes(spelled(*keys(3))) == [5000, 0, 5000]
    assert await rig.tier.check_and_restore(objects) == [
        ObjectState.INTACT, ObjectState.RELINKED, ObjectState.INTACT,
    ]  # fmt: skip
    assert [rig.live(one) for one in keys(3)] == values


async def test_short_object_is_never_taken_for_intact(rig: TierHarness) -> None:
    # LMCache takes any size for a hit in S3.
    (content,), objects = await pinned(rig, 1)
    rig.put(key(0), content[:1000])
    assert await rig.tier.sizes(spelled(key(0))) == [1000]
    assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED]
    assert rig.live(key(0)) == content
    rig.put_pin(key(0), content[:1000])
    assert await rig.tier.verify(objects) == [ObjectState.CORRUPT]
    assert await rig.tier.read(objects[0]) is None


async def test_pins_of_one_key_at_once_agree(rig: TierHarness) -> None:
    values = [value() for _ in range(4)]
    for one, content in zip(keys(4), values, strict=True):
        rig.put(one, content)
    done = await asyncio.gather(*(rig.tier.pin(keys(4), {}) for _ in range(8)))
    assert all(objects == done[0] for objects in done)
    assert [rig.pinned(one) for one in keys(4)] == values
    assert await rig.tier.verify(done[0], deep=True) == [ObjectState.INTACT] * 4


async def test_names_with_slashes_and_marks_pass_every_operation(rig: TierHarness) -> None:
    models = ["/models/of/a team/Qwen3-8B", "org/model", "a+b=c&d?e#f", "100%25", "é/ü", "x" * 100]
    if isinstance(rig, DiskTierHarness):
        models = [model for model in models if model != "x" * 100]
    names = [key(number, model=model) for number, model in enumerate(models)]
    for one in names:
        rig.put(one, value(64))
    objects = await rig.tier.pin(names, {})
    assert [o.key for o in objects] == spelled(*names)
    await rig.tier.drop_original(names)
    assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED] * len(names)
    assert await rig.tier.verify(objects, deep=True) == [ObjectState.INTACT] * len(names)
    assert await rig.tier.sizes(spelled(*names)) == [64] * len(names)
    assert all([await rig.tier.read(one) for one in objects])
    await rig.tier.remove(names)
    assert not any(rig.live(one) or rig.pinned(one) for one in names)


async def test_imported_bytes_are_pinned_and_restored(rig: TierHarness) -> None:
    content = value()
    item = await rig.tier.put(key(0), content)
    assert item == PinnedObject(str(key(0)), rig.tier.name, len(content), rig.checksum(content))
    assert await rig.tier.sizes(spelled(key(0))) == [0]
    assert await rig.tier.check_and_restore([item]) == [ObjectState.RELINKED]
    assert rig.live(key(0)) == rig.pinned(key(0)) == await rig.tier.read(item) == content


async def test_sound_storage_has_no_risks(rig: TierHarness) -> None:
    assert await rig.tier.risks() == []

"""The disk tier on real directories: hard links, other file systems, full ones, and directories that are not there."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.kv.tiers.base import ObjectState, TierFull, TierUnavailable
from gateway.kv.tiers.disk import DiskTier
from tests.support.gateway_process import ROOT
from tests.support.tier_harness import DiskTierHarness, key, keys, small_disk, spelled, value

pytestmark = pytest.mark.anyio
SHM = Path("/dev/shm")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[DiskTierHarness]:
    rig = DiskTierHarness(tmp_path)
    async with rig.tier:
        yield rig


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for the directories and 32 names; every link takes one, on tmpfs."""
    try:
        with small_disk(tmp_path / "small", "size=1m,nr_inodes=36") as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"only root may mount a small file system: {error}")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A name on another file system than that of `tmp_path`."""
    if not SHM.is_dir() or SHM.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip(f"{SHM} and {tmp_path} are one file system")
    folder = SHM / f"{tmp_path.name}-{os.getpid()}"
    yield folder
    folder.rmdir()


def names(folder: Path) -> list[str]:
    """What is in a directory."""
    return [path.name for path in folder.iterdir()]


def fill(rig: DiskTierHarness, count: int, size: int = 5000) -> list[bytes]:
    """Objects as LMCache writes them."""
    values = [value(size) for _ in range(count)]
    for one, content in zip(keys(count), values, strict=True):
        rig.put(one, content)
    return values


async def test_pin_is_a_hard_link(rig: DiskTierHarness) -> None:
    fill(rig, 3, size=2**20)
    objects = await rig.tier.pin(keys(3), {})
    assert all(live == pin for live, pin in map(rig.inodes, keys(3)))
    assert {(rig.pins / one.file_name).stat().st_nlink for one in keys(3)} == {2}
    await rig.tier.drop_original(keys(3))
    await rig.tier.check_and_restore(objects)
    assert all(live == pin for live, pin in map(rig.inodes, keys(3)))


async def test_model_with_slashes_is_one_flat_file_name(rig: DiskTierHarness) -> None:
    one = key(1, model="/models/org/some-model")
    rig.put(one, b"x")
    (pinned,) = await rig.tier.pin([one], {})
    name = f"-SEP-models-SEP-org-SEP-some-model@0x01000100@0@{1:064x}@salt.data"
    assert names(rig.pins) == names(rig.kv) == [name]
    await rig.tier.drop_original([one])
    assert await rig.tier.check_and_restore([pinned]) == [ObjectState.RELINKED]
    assert await rig.tier.sweep({one}) == 0
    assert names(rig.pins) == names(rig.kv) == [name]


async def test_pins_directory_is_created_private(tmp_path: Path) -> None:
    rig = DiskTierHarness(tmp_path, tmp_path / "deep" / "er" / "pins")
    async with rig.tier:
        assert rig.pins.stat().st_mode & 0o777 == 0o700
    async with DiskTier(rig.kv, rig.pins):
        assert rig.pins.is_dir()


async def test_damage_in_place_removes_both_links(rig: DiskTierHarness) -> None:
    values = fill(rig, 3)
    objects = await rig.tier.pin(keys(3), {})
    rig.flip(key(0))
    rig.flip(key(2), pin=True)
    assert rig.inodes(key(0))[0] == rig.inodes(key(0))[1]
    assert await rig.tier.verify(objects) == [ObjectState.CORRUPT, ObjectState.INTACT, ObjectState.CORRUPT]
    assert await rig.tier.check_and_restore(objects) == [ObjectState.CORRUPT, ObjectState.INTACT, ObjectState.CORRUPT]
    assert [rig.live(one) for one in keys(3)] == [None, values[1], None]
    assert [rig.pinned(one) for one in keys(3)] == [None, values[1], None]


async def test_truncated_pin_is_found_and_new_original_kept(rig: DiskTierHarness) -> None:
    (content,) = fill(rig, 1)
    objects = await rig.tier.pin(keys(1), {})
    os.truncate(rig.kv / key(0).file_name, len(content) - 1)
    rig.put(key(0), content)  # LMCache computed it again: another inode, the right bytes
    assert await rig.tier.verify(objects) == [ObjectState.CORRUPT]
    assert await rig.tier.pin(keys(1), {objects[0].key: objects[0]}) == objects
    assert rig.inodes(key(0))[0] == rig.inodes(key(0))[1]
    assert rig.pinned(key(0)) == content


async def test_relinking_replaces_the_damaged_file_atomically(rig: DiskTierHarness) -> None:
    (content,) = fill(rig, 1)
    objects = await rig.tier.pin(keys(1), {})
    wrong = value()
    rig.put(key(0), wrong)
    with (rig.kv / key(0).file_name).open("rb") as reader:  # LMCache is loading it
        assert await rig.tier.check_and_restore(objects) == [ObjectState.RELINKED]
        assert reader.read() == wrong
    assert rig.live(key(0)) == content
    assert names(rig.kv) == names(rig.pins) == [key(0).file_name]


_TRUNCATED = """
import asyncio, os, sys, threading
from pathlib import Path
from gateway.kv.tiers.disk import DiskTier
from gateway.records import PinnedObject
from tests.support.tier_harness import key

folder = Path(sys.argv[1])
file = folder / "pins" / key(0).file_name

def open_files():
    maps = Path("/proc/self/maps").read_text()
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return file.name in maps or any(file.name in link for link in links)

async def main():
    (folder / "kv").mkdir()
    async with DiskTier(folder / "kv", folder / "pins") as tier:
        with file.open("wb") as made:
            made.truncate(2**30)
        going = asyncio.create_task(tier.verify([PinnedObject(str(key(0)), "disk", 2**30, bytes(32))]))
        while not await asyncio.to_thread(open_files):
            await asyncio.sleep(0)
        os.truncate(file, 0)
        print((await going)[0].value)

asyncio.run(main())
"""


def test_file_truncated_while_read_is_corrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TRUNCATED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "corrupt\n"), done.stderr


# --- bytes freed


async def test_remove_returns_bytes_freed(rig: DiskTierHarness) -> None:
    for count in [1, 2, 3, 5, 8] * 30:
        values = fill(rig, count, size=100)
        await rig.tier.pin(keys(count), {})
        assert await rig.tier.remove(keys(count)) == sum(map(len, values))


async def test_unpin_frees_nothing_while_original_exists(rig: DiskTierHarness) -> None:
    values = fill(rig, 2)
    await rig.tier.pin(keys(2), {})
    await rig.tier.drop_original([key(1)])
    assert await rig.tier.unpin(keys(2)) == len(values[1])


async def test_bytes_with_other_links_are_not_freed(rig: DiskTierHarness, tmp_path: Path) -> None:
    fill(rig, 1)
    await rig.tier.pin(keys(1), {})
    (tmp_path / "elsewhere").hardlink_to(rig.kv / key(0).file_name)  # another gateway's pin, or a backup
    assert await rig.tier.remove(keys(1)) == 0


async def test_two_stores_on_one_cache_keep_pins_apart(rig: DiskTierHarness) -> None:
    (content,) = fill(rig, 1)
    async with DiskTier(rig.kv, rig.pins.with_name("ba9876543210")) as other:
        await rig.tier.pin(keys(1), {})
        objects = await other.pin(keys(1), {})
        assert await rig.tier.sweep([]) == 1
        assert await rig.tier.remove(keys(1)) == 0
        assert await other.check_and_restore(objects) == [ObjectState.RELINKED]
    assert rig.live(key(0)) == content


# --- directories in trouble


async def test_missing_kv_dir_has_nothing_to_pin(rig: DiskTierHarness) -> None:
    rig.kv.rmdir()
    assert await rig.tier.sizes(spelled(*keys(3))) == [0] * 3
    assert await rig.tier.pin(keys(3), {}) == []
    assert await rig.tier.remove(keys(3)) == 0
    await rig.tier.drop_original(keys(3))


async def test_restore_into_missing_kv_dir_keeps_pins(rig: DiskTierHarness) -> None:
    values = fill(rig, 2)
    objects = await rig.tier.pin(keys(2), {})
    await rig.tier.drop_original(keys(2))
    rig.kv.rmdir()
    with pytest.raises(TierUnavailable, match=f"disk tier: No such file.*{rig.kv}"):
        await rig.tier.check_and_restore(objects)
    rig.kv.mkdir()
    assert all(state.usable for state in await rig.tier.check_and_restore(objects))
    await rig.tier.sweep(set(keys(2)))  # what the failed ones left on their way
    assert sorted(names(rig.pins)) == sorted(one.file_name for one in keys(2))
    assert [rig.live(one) for one in keys(2)] == values


async def test_missing_pins_dir_is_reported(rig: DiskTierHarness) -> None:
    fill(rig, 1)
    rig.pins.rmdir()
    with pytest.raises(TierUnavailable, match=f"disk tier: No such file.*{rig.pins}"):
        await rig.tier.pin(keys(1), {})
    with pytest.raises(TierUnavailable):
        await rig.tier.sweep([])


async def test_uncreatable_pins_dir_fails_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TierUnavailable, match=r"disk tier: Not a directory"):
        async with DiskTier(tmp_path, tmp_path / "file" / "pins"):
            pass


async def test_impossible_file_name_is_not_taken_for_absent(rig: DiskTierHarness) -> None:
    with pytest.raises(TierUnavailable, match="File name too long"):
        await rig.tier.sizes(spelled(key(1, model="m" * 300)))


async def test_failure_is_raised_after_all_work_ended(rig: DiskTierHarness) -> None:
    fill(rig, 1)
    slow = rig.kv / key(1).file_name
    os.mkfifo(slow)  # opening it waits for a writer: a thread that takes its time
    pinning = asyncio.create_task(rig.tier.pin([key(0, model="m" * 300), key(1)], {}))
    done, _ = await asyncio.wait([pinning], timeout=0.3)
    writer = os.open(slow, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(TierUnavailable, match="File name too long"):
        await pinning
    os.close(writer)
    assert not done


async def test_pins_on_another_file_system_are_refused(tmp_path: Path, elsewhere: Path) -> None:
    rig = DiskTierHarness(tmp_path, elsewhere)
    async with rig.tier:
        fill(rig, 1)
        with pytest.raises(TierUnavailable, match=r"cross-device link") as refused:
            await rig.tier.pin(keys(1), {})
        assert not isinstance(refused.value, TierFull)
        assert str(elsewhere) in str(refused.value) or str(rig.kv) in str(refused.value)
        assert names(elsewhere) == []
        assert rig.live(key(0)) is not None


async def test_full_file_system_raises_tier_full(few_inodes: Path) -> None:
    rig = DiskTierHarness(few_inodes)
    async with rig.tier:
        values = fill(rig, 20, size=10)
        with pytest.raises(TierFull, match="No space left"):
            await rig.tier.pin(keys(20), {})
        assert [rig.live(one) for one in keys(20)] == values
        assert await rig.tier.sweep([]) > 0
        objects = await rig.tier.pin(keys(5), {})  # there is room again
        assert await rig.tier.verify(objects) == [ObjectState.INTACT] * 5


async def test_restore_on_full_file_system_keeps_pins(few_inodes: Path) -> None:
    rig = DiskTierHarness(few_inodes)
    async with rig.tier:
        values = fill(rig, 10, size=10)
        objects = await rig.tier.pin(keys(10), {})
        await rig.tier.drop_original(keys(10))
        crowd = 0
        try:
            while True:
                (few_inodes / f"crowd{crowd}").touch()
                crowd += 1
        except OSError:
            pass
        with pytest.raises(TierFull):
            await rig.tier.check_and_restore(objects)
        assert [rig.pinned(one) for one in keys(10)] == values
        for number in range(crowd):
            (few_inodes / f"crowd{number}").unlink()
        assert all(state.usable for state in await rig.tier.check_and_restore(objects))
        assert [rig.live(one) for one in keys(10)] == values


async def test_object_named_unlike_its_pin_takes_no_bytes(tmp_path: Path) -> None:
    rig = DiskTierHarness(tmp_path)
    async with rig.tier:
        rig.put(key(0), value(5000))
        (pin,) = await rig.tier.pin([key(0)], {})
        other = key(0, salt="other")
        await rig.tier.check_and_restore([pin._replace(key=str(other), pin=pin.key)])
        assert len({file.stat().st_ino for file in (*rig.pins.iterdir(), *rig.kv.iterdir())}) == 1
        assert sum(one.size for one in await rig.tier.inventory()) == 5000
        assert await rig.tier.remove([key(0)]) == 0
        assert await rig.tier.remove([other]) == 5000

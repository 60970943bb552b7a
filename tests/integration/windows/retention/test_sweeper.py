"""What nobody needs any more goes, and nothing else."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from gateway.app import open_services
from gateway.errors import GatewayError
from gateway.records import Session
from gateway.sessions.session_match import SessionMatch
from gateway.windows.delete import delete
from gateway.windows.retention import orphans, sweeper
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import eventually
from tests.support.retention_rig import SIZE, TENANT, House, settings, under
from tests.support.tier_harness import DiskTierHarness, RedisServer, key

pytestmark = pytest.mark.anyio


async def test_a_deleted_session_takes_its_kv_along_from_every_tier(harness: House) -> None:
    await harness.session("a", "salt-a")
    harness.stored(under("salt-a"))
    harness.stored(under("salt-b"))
    done = await orphans.delete_session(harness.ctx, "a")
    assert (done.blocks_deleted, done.space_freed_bytes, done.warnings) == (3, 2 * 3 * SIZE, ())
    assert harness.there(under("salt-a")) == [[], []]
    assert harness.there(under("salt-b")) == [under("salt-b")] * 2
    with pytest.raises(GatewayError, match="no session 'a'"):
        await orphans.delete_session(harness.ctx, "a")


async def test_what_a_window_holds_stays_until_the_window_goes(harness: House) -> None:
    keys = under("salt-a", 5)
    await harness.session("a", "salt-a")
    harness.stored(keys)
    await harness.window("w", keys[:2])
    done = await orphans.delete_session(harness.ctx, "a")
    assert done.blocks_deleted == 3
    assert harness.there(keys) == [keys[:2]] * 2
    assert [rig.live(one) for rig in harness.rigs for one in keys[:2]].count(None) == 0
    assert (await delete(harness.ctx, "w")).blocks_deleted == 2
    assert harness.there(keys) == [[], []]


async def test_the_kv_that_two_sessions_share_goes_with_the_last_of_them(harness: House) -> None:
    await harness.session("a", "shared", lineage="a")
    await harness.session("b", "shared", lineage="a")
    harness.stored(under("shared"))
    first = await orphans.delete_session(harness.ctx, "b")
    assert (first.blocks_deleted, first.space_freed_bytes) == (0, 0)
    assert "another session" in first.warnings[0]
    assert harness.there(under("shared")) == [under("shared")] * 2
    assert (await orphans.delete_session(harness.ctx, "a")).blocks_deleted == 3
    assert harness.there(under("shared")) == [[], []]


async def test_a_window_that_was_deleted_first_leaves_nothing_when_its_session_goes(harness: House) -> None:
    await harness.session("a", "salt-a", lineage="l")
    harness.stored(under("salt-a"))
    await harness.window("w", under("salt-a", 2))
    kept = await delete(harness.ctx, "w")
    assert (kept.blocks_deleted, kept.space_freed_bytes) == (0, 2 * SIZE)  # the copies in Redis; links cost nothing
    assert harness.there(under("salt-a")) == [under("salt-a")] * 2
    await orphans.delete_session(harness.ctx, "a")
    assert harness.there(under("salt-a")) == [[], []]


async def test_a_turn_of_the_lineage_that_is_going_on_keeps_the_kv_until_the_next_sweep(harness: House) -> None:
    await harness.session("a", "salt-a", lineage="l")
    harness.stored(under("salt-a"))
    fork = SessionMatch(Session(TENANT, "fork", "l"), "fork", b"")
    harness.parts.turns.begin(fork)
    assert (await orphans.delete_session(harness.ctx, "a")).blocks_deleted == 0
    assert harness.there(under("salt-a")) == [under("salt-a")] * 2
    harness.parts.turns.end(fork)
    await sweeper.sweep(harness.parts)
    assert harness.there(under("salt-a")) == [[], []]


async def test_a_session_that_takes_a_salt_up_while_a_sweep_waits_for_the_pins_keeps_its_kv(harness: House) -> None:
    await harness.session("a", "salt-a", lineage="l")
    harness.stored(under("salt-a"))
    assert await harness.parts.store.delete_session(TENANT, "a")
    lock = str(harness.parts.settings.data_path / "pins.lock")

    def waits() -> bool:
        return [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()].count(lock) > 1

    async with harness.parts.pins.lock.acquire(exclusive=False):
        going = asyncio.create_task(orphans.delete_orphans(harness.parts))
        await asyncio.to_thread(eventually, waits, "it has looked, and waits for the lock")
        await harness.session("b", "salt-a", lineage="l")
    assert (await going).kept == 1
    assert harness.there(under("salt-a")) == [under("salt-a")] * 2


async def test_what_lands_after_the_deletion_goes_at_the_next_sweep(harness: House) -> None:
    await harness.session("a", "salt-a")
    await orphans.delete_session(harness.ctx, "a")
    harness.stored(under("salt-a"))
    await sweeper.sweep(harness.parts)
    assert harness.there(under("salt-a")) == [[], []]
    assert [one.salt for one in await harness.parts.store.orphaned_salts()] == [
        "salt-a"
    ]  # it may not have been the last


async def test_sessions_beyond_sessions_kept_take_their_kv_along(
    tmp_path: Path, engine: FakeEngine, redis_server: RedisServer
) -> None:
    disk = DiskTierHarness(tmp_path)
    async with open_services(settings(tmp_path, engine, redis_server, sessions_kept=1)) as parts:
        harness = House(parts, (disk,))
        for number in range(3):
            await harness.session(f"s{number}", f"salt-{number}", idle_s=10 - number)
            harness.stored(under(f"salt-{number}"))
        await sweeper.sweep(parts)
        assert [harness.there(under(f"salt-{number}")) for number in range(3)] == [[[]], [[]], [under("salt-2")]]


async def test_sessions_that_are_idle_longer_than_session_ttl_s_go_unless_they_are_in_a_turn(
    tmp_path: Path, engine: FakeEngine, redis_server: RedisServer
) -> None:
    disk = DiskTierHarness(tmp_path)
    async with open_services(settings(tmp_path, engine, redis_server, session_ttl_s=5)) as parts:
        harness = House(parts, (disk,))
        for name, idle_s in (("idle", 6), ("fresh", 3), ("turning", 7)):
            await harness.session(name, f"salt-{name}", idle_s=idle_s)
            harness.stored(under(f"salt-{name}"))
        turning = await parts.store.session(TENANT, "turning")
        assert turning
        parts.turns.begin(SessionMatch(turning, "", b""))
        await sweeper.sweep(parts)
        assert harness.there(under("salt-idle")) == [[]]
        assert harness.there(under("salt-fresh")) == [under("salt-fresh")]
        assert harness.there(under("salt-turning")) == [under("salt-turning")]
        assert [await parts.store.session(TENANT, name) is not None for name in ("idle", "fresh", "turning")] == [
            False, True, True,
        ]  # fmt: skip


async def test_a_model_whose_name_a_file_cannot_tell_keeps_what_its_window_holds(harness: House) -> None:
    """`x-SEP-y` and `x/y` are one name on disk."""
    held, free = key(1, model="x-SEP-y", salt="s"), key(2, model="x-SEP-y", salt="s")
    await harness.session("a", "s")
    harness.stored([held, free])
    await harness.window("w", [held])
    await orphans.delete_session(harness.ctx, "a")
    assert harness.there([held, free]) == [[held], [held]]


async def test_a_tier_that_cannot_be_read_is_told_and_seen_to_later(harness: House, tmp_path: Path) -> None:
    await harness.session("a", "salt-a")
    harness.stored(under("salt-a"))
    (tmp_path / "kv").rename(tmp_path / "away")
    done = await orphans.delete_session(harness.ctx, "a")
    assert "disk tier" in done.warnings[0]
    (tmp_path / "away").rename(tmp_path / "kv")
    await sweeper.sweep(harness.parts)
    assert harness.there(under("salt-a")) == [[], []]


async def test_an_expired_window_is_deleted_when_its_grace_is_over_and_one_that_was_given_time_is_not(
    harness: House,
) -> None:
    grace = harness.parts.settings.expiry_grace_s
    now = time.time()
    for name, expires_at in (("over", now - grace - 1), ("grace", now - 1), ("alive", now + 60), ("for-ever", None)):
        keys = under(f"salt-{name}")
        harness.stored(keys)
        await harness.window(name, keys, expires_at=expires_at)
    with pytest.raises(GatewayError, match="no window 'grace'"):
        await delete(harness.ctx, "grace", expired_by=now - grace)
    await sweeper.sweep(harness.parts)
    left = [name for name in ("over", "grace", "alive", "for-ever") if await harness.parts.store.window(TENANT, name)]
    assert left == ["grace", "alive", "for-ever"]
    assert harness.there(under("salt-over")) == [[], []]
    assert harness.there(under("salt-grace")) == [under("salt-grace")] * 2


async def test_many_expired_windows_and_two_sweeps_at_once_delete_each_once(
    harness: House, caplog: pytest.LogCaptureFixture
) -> None:
    keys = under("salt", 1)
    harness.stored(keys)
    for number in range(250):
        await harness.window(f"w{number}", keys, expires_at=1.0)
    with caplog.at_level("INFO"):
        await asyncio.gather(sweeper.sweep(harness.parts), sweeper.sweep(harness.parts))
    assert await harness.parts.store.window_counts() == {}
    assert harness.there(keys) == [[], []]
    assert sum("has expired" in line for line in caplog.messages) == 250

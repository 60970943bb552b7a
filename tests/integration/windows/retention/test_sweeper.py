"""A sweep deletes what is no longer needed, and nothing else."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.app import open_services
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.pins import Pins
from gateway.kv.tiers.base import Tier
from gateway.records import Session
from gateway.sessions.session_match import SessionMatch
from gateway.windows.delete import delete
from gateway.windows.retention import orphans, sweeper
from tests.support.fakes.engine import FakeEngine
from tests.support.retention_rig import SIZE, TENANT, RetentionHarness, keys_of, settings
from tests.support.tier_harness import DiskTierHarness, RedisServer, key

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("each_store")]


class Interrupted:
    """A tier during whose search for a salt something happens."""

    def __init__(self, tier: Tier, happens: Callable[[], Awaitable[None]]) -> None:
        self._tier = tier
        self._happens = happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    async def keys_with_salt(self, salts: Collection[str]) -> set[ObjectKey]:
        """See `Tier.keys_with_salt`."""
        found = await self._tier.keys_with_salt(salts)
        await self._happens()
        return found


async def test_deleting_a_session_deletes_its_kv(harness: RetentionHarness) -> None:
    await harness.session("a", "salt-a")
    harness.stored(keys_of("salt-a"))
    harness.stored(keys_of("salt-b"))
    done = await orphans.delete_session(harness.ctx, "a")
    assert (done.blocks_deleted, done.space_freed_bytes, done.warnings) == (3, 2 * 3 * SIZE, ())
    assert harness.there(keys_of("salt-a")) == [[], []]
    assert harness.there(keys_of("salt-b")) == [keys_of("salt-b")] * 2
    with pytest.raises(GatewayError, match="no session 'a'"):
        await orphans.delete_session(harness.ctx, "a")


async def test_kv_of_a_window_stays_until_its_deletion(harness: RetentionHarness) -> None:
    keys = keys_of("salt-a", 5)
    await harness.session("a", "salt-a")
    harness.stored(keys)
    await harness.window("w", keys[:2])
    done = await orphans.delete_session(harness.ctx, "a")
    assert done.blocks_deleted == 3
    assert harness.there(keys) == [keys[:2]] * 2
    assert [rig.live(one) for rig in harness.rigs for one in keys[:2]].count(None) == 0
    assert (await delete(harness.ctx, "w")).blocks_deleted == 2
    assert harness.there(keys) == [[], []]


async def test_shared_kv_is_deleted_with_the_last_session(harness: RetentionHarness) -> None:
    await harness.session("a", "shared", lineage="a")
    await harness.session("b", "shared", lineage="a")
    harness.stored(keys_of("shared"))
    first = await orphans.delete_session(harness.ctx, "b")
    assert (first.blocks_deleted, first.space_freed_bytes) == (0, 0)
    assert "another session" in first.warnings[0]
    assert harness.there(keys_of("shared")) == [keys_of("shared")] * 2
    assert (await orphans.delete_session(harness.ctx, "a")).blocks_deleted == 3
    assert harness.there(keys_of("shared")) == [[], []]


async def test_session_deleted_after_its_window_leaves_nothing(harness: RetentionHarness) -> None:
    await harness.session("a", "salt-a", lineage="l")
    harness.stored(keys_of("salt-a"))
    await harness.window("w", keys_of("salt-a", 2))
    kept = await delete(harness.ctx, "w")
    assert (kept.blocks_deleted, kept.space_freed_bytes) == (0, 2 * SIZE)  # the copies in Redis; links cost nothing
    assert harness.there(keys_of("salt-a")) == [keys_of("salt-a")] * 2
    await orphans.delete_session(harness.ctx, "a")
    assert harness.there(keys_of("salt-a")) == [[], []]


async def test_turn_in_flight_keeps_kv_until_next_sweep(harness: RetentionHarness) -> None:
    await harness.session("a", "salt-a", lineage="l")
    harness.stored(keys_of("salt-a"))
    fork = SessionMatch(Session(TENANT, "fork", "l"), "fork", b"")
    harness.parts.turns.begin(fork)
    assert (await orphans.delete_session(harness.ctx, "a")).blocks_deleted == 0
    assert harness.there(keys_of("salt-a")) == [keys_of("salt-a")] * 2
    harness.parts.turns.end(fork)
    await sweeper.sweep(harness.parts)
    assert harness.there(keys_of("salt-a")) == [[], []]


async def test_salt_reused_during_a_sweep_keeps_its_kv(harness: RetentionHarness) -> None:
    await harness.session("a", "salt-a", lineage="l")
    harness.stored(keys_of("salt-a"))
    assert await harness.parts.store.delete_session(TENANT, "a")
    first, *rest = harness.parts.pins.tiers
    tier = Interrupted(first, lambda: harness.session("b", "salt-a", lineage="l"))
    parts = replace(harness.parts, pins=Pins((tier, *rest)))
    assert (await orphans.delete_orphans(parts)).kept == 1
    assert harness.there(keys_of("salt-a")) == [keys_of("salt-a")] * 2


async def test_late_objects_are_deleted_by_next_sweep(harness: RetentionHarness) -> None:
    await harness.session("a", "salt-a")
    await orphans.delete_session(harness.ctx, "a")
    harness.stored(keys_of("salt-a"))
    await sweeper.sweep(harness.parts)
    assert harness.there(keys_of("salt-a")) == [[], []]
    assert [one.salt for one in await harness.parts.store.orphaned_salts()] == [
        "salt-a"
    ]  # it may not have been the last


async def test_sessions_beyond_sessions_kept_lose_their_kv(
    tmp_path: Path, engine: FakeEngine, redis_server: RedisServer
) -> None:
    disk = DiskTierHarness(tmp_path)
    async with open_services(settings(tmp_path, engine, redis_server, sessions_kept=1)) as parts:
        harness = RetentionHarness(parts, (disk,))
        for number in range(3):
            await harness.session(f"s{number}", f"salt-{number}", idle_s=10 - number)
            harness.stored(keys_of(f"salt-{number}"))
        await sweeper.sweep(parts)
        assert [harness.there(keys_of(f"salt-{number}")) for number in range(3)] == [[[]], [[]], [keys_of("salt-2")]]


async def test_sessions_past_session_ttl_s_are_deleted(
    tmp_path: Path, engine: FakeEngine, redis_server: RedisServer
) -> None:
    disk = DiskTierHarness(tmp_path)
    async with open_services(settings(tmp_path, engine, redis_server, session_ttl_s=5)) as parts:
        harness = RetentionHarness(parts, (disk,))
        for name, idle_s in (("idle", 6), ("fresh", 3), ("turning", 7)):
            await harness.session(name, f"salt-{name}", idle_s=idle_s)
            harness.stored(keys_of(f"salt-{name}"))
        turning = await parts.store.session(TENANT, "turning")
        assert turning
        parts.turns.begin(SessionMatch(turning, "", b""))
        await sweeper.sweep(parts)
        assert harness.there(keys_of("salt-idle")) == [[]]
        assert harness.there(keys_of("salt-fresh")) == [keys_of("salt-fresh")]
        assert harness.there(keys_of("salt-turning")) == [keys_of("salt-turning")]
        assert [await parts.store.session(TENANT, name) is not None for name in ("idle", "fresh", "turning")] == [
            False, True, True,
        ]  # fmt: skip


async def test_ambiguous_model_name_keeps_window_objects(harness: RetentionHarness) -> None:
    """`x-SEP-y` and `x/y` are one name on disk."""
    held, free = key(1, model="x-SEP-y", salt="s"), key(2, model="x-SEP-y", salt="s")
    await harness.session("a", "s")
    harness.stored([held, free])
    await harness.window("w", [held])
    await orphans.delete_session(harness.ctx, "a")
    assert harness.there([held, free]) == [[held], [held]]


async def test_unreadable_tier_is_swept_later(harness: RetentionHarness, tmp_path: Path) -> None:
    await harness.session("a", "salt-a")
    harness.stored(keys_of("salt-a"))
    (tmp_path / "kv").rename(tmp_path / "away")
    done = await orphans.delete_session(harness.ctx, "a")
    assert "disk tier" in done.warnings[0]
    (tmp_path / "away").rename(tmp_path / "kv")
    await sweeper.sweep(harness.parts)
    assert harness.there(keys_of("salt-a")) == [[], []]


async def test_expired_window_is_deleted_after_its_grace(harness: RetentionHarness) -> None:
    grace = harness.parts.settings.expiry_grace_s
    now = time.time()
    for name, expires_at in (("over", now - grace - 1), ("grace", now - 1), ("alive", now + 60), ("for-ever", None)):
        keys = keys_of(f"salt-{name}")
        harness.stored(keys)
        await harness.window(name, keys, expires_at=expires_at)
    with pytest.raises(GatewayError, match="no window 'grace'"):
        await delete(harness.ctx, "grace", expired_by=now - grace)
    await sweeper.sweep(harness.parts)
    left = [name for name in ("over", "grace", "alive", "for-ever") if await harness.parts.store.window(TENANT, name)]
    assert left == ["grace", "alive", "for-ever"]
    assert harness.there(keys_of("salt-over")) == [[], []]
    assert harness.there(keys_of("salt-grace")) == [keys_of("salt-grace")] * 2


async def test_concurrent_sweeps_delete_each_window_once(
    harness: RetentionHarness, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("salt", 1)
    harness.stored(keys)
    for number in range(250):
        await harness.window(f"w{number}", keys, expires_at=1.0)
    with caplog.at_level("INFO"):
        await asyncio.gather(sweeper.sweep(harness.parts), sweeper.sweep(harness.parts))
    assert await harness.parts.store.window_counts() == {}
    assert harness.there(keys) == [[], []]
    assert sum("has expired" in line for line in caplog.messages) == 250

"""Usage, budgets and expiry, also over the admin API."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.app import open_services
from gateway.kv.tiers.base import TierFull
from gateway.sessions.session_match import SessionMatch
from gateway.windows.retention import sweeper
from gateway.windows.retention.usage import Share, TierUse, usage
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.retention_rig import SIZE, TENANT, RetentionHarness, keys_of, settings
from tests.support.tier_harness import DiskTierHarness, RedisServer, RedisTierHarness, key, value

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("each_store")]


def redis_of(harness: RetentionHarness) -> RedisTierHarness:
    """The second of its rigs."""
    rig = harness.rigs[1]
    assert isinstance(rig, RedisTierHarness)
    return rig


def on_disk(folder: Path) -> int:
    """Bytes of all objects and pins, each file once however many names it has."""
    return sum({file.stat().st_ino: file.stat().st_size for file in folder.glob("kv*/**/*.data")}.values())


async def test_usage_adds_up_to_disk_and_redis(harness: RetentionHarness, tmp_path: Path) -> None:
    await harness.session("a", "salt-a")
    await harness.session("b", "salt-b")
    for salt in ("salt-a", "salt-b", "salt-unknown"):
        harness.stored(keys_of(salt, 4))
    await harness.window("w", keys_of("salt-a", 2))
    for tier in harness.parts.pins.tiers:
        await tier.drop_original([key(1, salt="salt-a")])  # evicted: the pin alone holds the bytes
    assert await harness.parts.store.delete_session(TENANT, "b")
    (tmp_path / "kv" / "being-written.tmp").write_bytes(b"x")
    tiers, warnings = await usage(harness.parts)
    assert warnings == []
    disk, redis = tiers
    assert (disk.name, redis.name) == ("disk", "redis")
    assert disk == TierUse(
        "disk", total=Share(12, 12 * SIZE), pinned=Share(2, 2 * SIZE), windows=Share(2, 2 * SIZE),
        sessions=Share(2, 2 * SIZE), forgotten=Share(4, 4 * SIZE), unknown=Share(4, 4 * SIZE),
    )  # fmt: skip
    # A pin in Redis is a copy.
    assert redis == TierUse(
        "redis", total=Share(12, 13 * SIZE), pinned=Share(2, 2 * SIZE), windows=Share(2, 3 * SIZE),
        sessions=Share(2, 2 * SIZE), forgotten=Share(4, 4 * SIZE), unknown=Share(4, 4 * SIZE),
    )  # fmt: skip
    assert disk.total.bytes == on_disk(tmp_path)
    client = redis_of(harness).client
    assert redis.total.bytes == sum(client.strlen(name) for name in client.scan_iter("*"))  # type: ignore[misc]


async def test_usage_warns_of_unreadable_tier(harness: RetentionHarness, tmp_path: Path) -> None:
    (tmp_path / "kv").rename(tmp_path / "away")
    tiers, warnings = await usage(harness.parts)
    assert [tier.name for tier in tiers] == ["redis"]
    assert "disk tier" in warnings[0]


@pytest.fixture
async def tight(tmp_path: Path, engine: FakeEngine, redis_server: RedisServer) -> AsyncIterator[RetentionHarness]:
    """A budget of ten objects on disk and of twelve in Redis."""
    more = {"disk_budget_bytes": 10 * SIZE, "redis_budget_bytes": 12 * SIZE}
    async with AsyncExitStack() as stack:
        disk = DiskTierHarness(tmp_path)
        parts = await stack.enter_async_context(open_services(settings(tmp_path, engine, redis_server, **more)))
        disk.pins = tmp_path / "kv-pins" / parts.store.store_id
        redis = RedisTierHarness(redis_server.port, parts.store.store_id)
        stack.callback(redis.client.close)
        yield RetentionHarness(parts, (disk, redis))


async def test_budget_deletes_kv_of_longest_idle_sessions(tight: RetentionHarness) -> None:
    for number in range(5):
        await tight.session(f"s{number}", f"salt-{number}", idle_s=100 - number)
        tight.stored(keys_of(f"salt-{number}"))
    await sweeper.sweep(tight.parts)
    left = [[len(tier) for tier in tight.there(keys_of(f"salt-{number}"))] for number in range(5)]
    # The disk has room for three sessions, Redis for four.
    assert left == [[0, 0], [0, 3], [3, 3], [3, 3], [3, 3]]
    assert await tight.parts.store.session(TENANT, "s0") is not None
    await sweeper.sweep(tight.parts)
    assert left == [[len(tier) for tier in tight.there(keys_of(f"salt-{number}"))] for number in range(5)]


async def test_budget_spares_windows_and_active_sessions(
    tight: RetentionHarness, caplog: pytest.LogCaptureFixture
) -> None:
    await tight.session("idle", "salt-idle", idle_s=100)
    await tight.session("turning", "salt-turning", idle_s=200)
    for salt in ("salt-idle", "salt-turning", "salt-unknown"):
        tight.stored(keys_of(salt, 6))
    await tight.window("w", keys_of("salt-idle", 2))
    turning = await tight.parts.store.session(TENANT, "turning")
    assert turning
    tight.parts.turns.begin(SessionMatch(turning, "", b""))
    await sweeper.sweep(tight.parts)
    assert tight.there(keys_of("salt-idle", 6)) == [keys_of("salt-idle", 2)] * 2
    for salt in ("salt-turning", "salt-unknown"):
        assert tight.there(keys_of(salt, 6)) == [keys_of(salt, 6)] * 2
    assert f"disk tier holds {14 * SIZE} bytes, {4 * SIZE} more than its budget" in caplog.text


async def test_nearly_full_disk_deletes_idle_kv_without_budget(harness: RetentionHarness) -> None:
    await harness.session("idle", "salt-idle", idle_s=100)
    harness.stored(keys_of("salt-idle", 6))
    await harness.window("w", keys_of("salt-idle", 2))
    await sweeper.sweep(harness.parts)
    assert harness.there(keys_of("salt-idle", 6)) == [keys_of("salt-idle", 6)] * 2
    more_than_any_disk_has = harness.parts.settings.model_copy(update={"disk_reserve_bytes": 2**60})
    await sweeper.sweep(replace(harness.parts, settings=more_than_any_disk_has))
    assert harness.there(keys_of("salt-idle", 6)) == [keys_of("salt-idle", 2), keys_of("salt-idle", 6)]


async def test_shared_salt_is_as_old_as_its_latest_session(tight: RetentionHarness) -> None:
    await tight.session("old", "shared", lineage="l", idle_s=300)
    await tight.session("fork", "shared", lineage="l", idle_s=1)
    await tight.session("middle", "salt-middle", idle_s=100)
    tight.stored(keys_of("shared", 6))
    tight.stored(keys_of("salt-middle", 6))
    await sweeper.sweep(tight.parts)
    assert tight.there(keys_of("shared", 6)) == [keys_of("shared", 6)] * 2
    assert tight.there(keys_of("salt-middle", 6)) == [[], keys_of("salt-middle", 6)]


async def test_tenant_salt_is_as_old_as_its_latest_session(tight: RetentionHarness) -> None:
    await tight.session("old", "shared", lineage="one", idle_s=300)
    await tight.session("new", "shared", lineage="another", idle_s=1)
    await tight.session("middle", "salt-middle", idle_s=100)
    tight.stored(keys_of("shared", 6))
    tight.stored(keys_of("salt-middle", 6))
    await sweeper.sweep(tight.parts)
    assert tight.there(keys_of("shared", 6)) == [keys_of("shared", 6)] * 2
    assert tight.there(keys_of("salt-middle", 6)) == [[], keys_of("salt-middle", 6)]


async def test_check_room_fails_below_the_reserve(harness: RetentionHarness) -> None:
    await harness.parts.pins.check_room(1)
    with pytest.raises(TierFull, match="disk_reserve_bytes"):
        await harness.parts.pins.check_room(2**62)


@pytest.fixture
def swept(tmp_path: Path, engine: FakeEngine) -> Iterator[tuple[Gateway, DiskTierHarness]]:
    """A gateway of two workers that sweeps often."""
    disk = DiskTierHarness(tmp_path)
    with gateway_in_front_of(
        engine.url, tmp_path, kv_dir=disk.kv, workers=2, sweep_every_s=0.2, session_ttl_s=1.5
    ) as gateway:
        yield gateway, disk


def salt_of(engine: FakeEngine) -> str:
    """The salt of the last turn."""
    return str(engine.seen("/v1/chat/completions")[-1].json["cache_salt"])


def test_http_session_delete_reports_freed_bytes(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    disk = DiskTierHarness(tmp_path)
    # A sweep at the same moment could delete them first.
    with gateway_in_front_of(engine.url, tmp_path, kv_dir=disk.kv, sweep_every_s=600) as gateway:
        gateway.chat(session)
        for one in keys_of(salt_of(engine)):
            disk.put(one, value(SIZE))
        deleted = gateway.http.delete(f"/admin/sessions/{session}").json()
    assert deleted == {
        "session_id": session, "deleted": True, "blocks_deleted": 3, "space_freed_bytes": 3 * SIZE, "warnings": [],
    }  # fmt: skip
    assert list(disk.kv.iterdir()) == []


def test_idle_session_and_its_kv_are_deleted(
    engine: FakeEngine, swept: tuple[Gateway, DiskTierHarness], session: str
) -> None:
    gateway, disk = swept
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "no", "type": "x", "code": 500}}, 500)
    gateway.chat(session)
    for one in keys_of(salt_of(engine)):
        disk.put(one, value(SIZE))
    eventually(lambda: not list(disk.kv.iterdir()), "the KV of an idle session is gone", more=lambda: gateway.log)
    eventually(lambda: gateway.http.get(f"/admin/sessions/{session}").status_code == 404, "the session is gone")
    eventually(lambda: "deleted 3 KV objects" in gateway.log, "the log says so")


def test_w7_session_past_ttl_is_expired_until_swept(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, sweep_every_s=600, session_ttl_s=0.5) as gateway:

        def states() -> dict[str, set[str]]:
            listed = {
                state: gateway.http.get(f"/admin/sessions?state={state}").json()["sessions"]
                for state in ("active", "frozen", "thawed", "expired")
            }
            assert all(one["state"] == state for state, found in listed.items() for one in found)
            return {state: {one["id"] for one in found} for state, found in listed.items()}

        for name in ("a", "b"):
            gateway.chat(name)
        gateway.freeze("b", "w")
        eventually(lambda: states()["expired"] == {"a", "b"}, "both are expired")
        assert {state for state, found in states().items() if found} == {"expired"}
        assert gateway.http.get("/admin/sessions/b").json()["state"] == "expired"
        gateway.chat("b", "I am back")
        assert gateway.http.get("/admin/sessions/b").json()["turn_count"] == 2


def test_expired_window_is_shown_then_deleted(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path, sweep_every_s=0.1, expiry_grace_s=1.5) as gateway:
        gateway.chat(session)
        assert gateway.freeze(session, "w", ttl_seconds=0.2).json()["state"] == "frozen"

        def state() -> str:
            return str(gateway.http.get("/admin/windows/w").json().get("state"))

        eventually(lambda: state() == "expired", "it has expired")
        assert gateway.http.get("/admin/windows").json()["windows"][0]["state"] == "expired"
        refused = [
            gateway.http.post("/admin/windows/w/thaw", json={}),
            gateway.http.post("/admin/windows/w/clone", json={"target_window": "v"}),
            gateway.http.post("/w/w/v1/chat/completions", json={"model": "demo", "messages": [{"role": "user"}]}),
        ]
        for answer in refused:
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "window_not_found"
            assert "window 'w' expired at 20" in answer.json()["error"]["message"]
        assert len(gateway.http.get("/admin/windows/w/messages").json()["messages"]) == 2
        eventually(lambda: gateway.http.get("/admin/windows/w").status_code == 404, "it is deleted")
        eventually(lambda: "window w has expired and was deleted" in gateway.log, "the log says so")


def test_cache_statistics_over_http(engine: FakeEngine, swept: tuple[Gateway, DiskTierHarness], session: str) -> None:
    gateway, disk = swept
    gateway.chat(session)
    for one in keys_of(salt_of(engine)):
        disk.put(one, value(SIZE))
    gateway.http.get(f"/admin/sessions/{session}")  # waits until the turn is recorded
    answer = gateway.http.get("/admin/cache").json()
    nothing = {"objects": 0, "bytes": 0}
    hits = {name: answer.pop(name) for name in ("prompt_tokens", "cached_tokens", "hit_rate")}
    assert hits["hit_rate"] == pytest.approx(hits["cached_tokens"] / hits["prompt_tokens"], abs=1e-4)
    assert answer.pop("windows") == gateway.http.get("/admin/windows").json()["total"]
    assert answer == {
        "chunk_size": None, "lmcache": {"status": "not configured"}, "nodes": [], "engines_up": 1, "warnings": [],
        "tiers": {"disk": {
            "objects": 3, "bytes": 3 * SIZE, "sessions": {"objects": 3, "bytes": 3 * SIZE}, "windows": nothing,
            "pinned": nothing, "forgotten": nothing, "unknown": nothing, "listed": True,
        }},
    }  # fmt: skip
    assert gateway.http.get("/admin/cache?x=1").json()["error"]["code"] == "unknown_parameter"

"""After deleting everything, disk and Redis are as before the first turn: on the real engine and the real cache."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.stack.clients import mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse, until

pytestmark = pytest.mark.stack

QUESTION = {"role": "user", "content": "And then?"}


@pytest.fixture
def sweeping(stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of the test's own that looks for garbage all the time."""
    settings = stack.settings(tmp_path / "data", CWG_SWEEP_EVERY_S="0.5")
    gateway = Gateway(settings, tmp_path / "gateway.log").start()
    yield gateway
    gateway.close()


def _stored(stack: Stack) -> tuple[set[Path], set[bytes]]:
    """Every object and pin on disk, and every key in Redis."""
    places = (stack.kv_dir, stack.plan.data_dir / "kv-pins")
    files = {file for place in places for file in place.rglob("*") if file.is_file()}
    return files, set(stack.redis.scan_iter("*", count=10**5))


def _adds_up(stack: Stack, gateway: Gateway, data_dir: Path) -> None:
    """The gateway's usage of the tiers equals the tiers' own, and its parts add up."""
    with closing(sqlite3.connect(data_dir / "gateway.db")) as db:
        (store,) = db.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()

    def agreed() -> bool:
        """Ask between two counts: LMCache writes a turn's objects some time after its reply, and others sweep."""
        nonlocal told
        found = _bytes_in_tiers(stack, store)
        answer, stats = gateway.http.get("/admin/cache").json(), mcp(gateway, "cache_stats")
        assert (answer["lmcache"]["status"], answer["warnings"]) == ("healthy", [])
        told = {name: answer["tiers"][name] for name in ("disk", "redis")}
        return (
            (told["disk"]["bytes"], told["redis"]["bytes"]) == found == _bytes_in_tiers(stack, store)
            and stats["total_bytes"] == sum(tier["bytes"] for tier in told.values())
            and stats["total_blocks"] == sum(tier["objects"] for tier in told.values())
        )

    told: dict[str, Any] = {}
    until(agreed, "the gateway reports the bytes that are on disk and in Redis")
    for tier in told.values():
        for unit in ("objects", "bytes"):
            assert sum(tier[owner][unit] for owner in ("windows", "sessions", "forgotten", "unknown")) == tier[unit]
        assert tier["windows"]["objects"] == tier["pinned"]["objects"] > 0
        assert tier["sessions"]["objects"] > 0


def _bytes_in_tiers(stack: Stack, store: str) -> tuple[int, int]:
    """Bytes on disk and in Redis, without the pins of other gateways: those are theirs to report."""
    places = (stack.kv_dir, stack.plan.data_dir / "kv-pins" / store)
    files = [file.stat() for place in places for file in place.glob("*.data")]
    names = [name.decode() for name in stack.redis.scan_iter("*@*", count=10**5)]
    sizes = [stack.redis.strlen(name) for name in names if name.startswith(f"cwg:{store}:") or name[:4] != "cwg:"]
    return sum({file.st_ino: file.st_size for file in files}.values()), sum(sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("setting", "limit"), [("disk_reserve_bytes", 2**60), ("tenant_budget_bytes", 1000)])
def test_a_freeze_is_refused_before_the_disk_or_the_tenants_budget_is_full(
    stack: Stack, tmp_path: Path, setting: str, limit: int
) -> None:
    settings = stack.settings(tmp_path / "data", **{f"CWG_{setting.upper()}": str(limit)})
    gateway = Gateway(settings, tmp_path / "gateway.log").start()
    try:
        before = _stored(stack)
        converse(gateway.client("full"), "no room", turns=1)
        refused = gateway.http.post("/admin/windows", json={"session_id": "full", "window_name": "full"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert setting in refused.json()["error"]["message"]
        assert gateway.http.get("/admin/windows/full").status_code == 404
        assert gateway.http.delete("/admin/sessions/full").json()["blocks_deleted"] > 0
        assert _stored(stack) == before
    finally:
        gateway.close()


def test_w14_the_bytes_are_those_on_disk_and_in_redis_and_after_deleting_everything_all_are_gone(
    stack: Stack, sweeping: Gateway, tmp_path: Path
) -> None:
    before = _stored(stack)
    messages = converse(sweeping.client("one"), "garbage one")
    converse(sweeping.client("two"), "garbage two", turns=1)
    sweeping.freeze("one", "window")
    chat(sweeping.client("one"), [*messages, QUESTION])
    thawed = sweeping.thaw("window", warm="gpu")["session_id"]
    chat(sweeping.client(thawed), [QUESTION])
    assert sweeping.http.post("/admin/windows/window/clone", json={"target_window": "copy"}).status_code == 201
    _adds_up(stack, sweeping, tmp_path / "data")
    assert 0 < mcp(sweeping, "cache_stats")["hit_rate"] < 1
    sweeping.stop()
    sweeping.start()
    _adds_up(stack, sweeping, tmp_path / "data")
    files, names = _stored(stack)
    assert len(files - before[0]) > 10
    assert len(names - before[1]) > 10
    sessions = [one["id"] for one in sweeping.http.get("/admin/sessions").json()["sessions"]]
    assert {"one", "two", thawed} <= set(sessions)
    freed = 0
    for path in ("windows/window", *(f"sessions/{one}" for one in sessions), "windows/copy"):
        answer = sweeping.http.delete(f"/admin/{path}")
        assert answer.status_code == 200, answer.text
        freed += answer.json()["space_freed_bytes"]
    assert freed > 0
    until(lambda: _stored(stack) == before, "disk and Redis are as before")

"""`cwg up --tiers redis,s3`: it starts what the tiers need, and a window thaws from each of them."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.support.up_process import Up, eventually, living

pytestmark = pytest.mark.stack

CHUNK = 64
HISTORY = [{"role": "user", "content": "Count the lamps of the harbour, one by one. " * 60}]
WITHIN_S = 60


@pytest.fixture(scope="module")
def up(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Without a disk tier, so that KV comes from nowhere else."""
    data_dir = tmp_path_factory.mktemp("tiers") / "data"
    (data_dir / "models").mkdir(parents=True)
    (data_dir / "models" / demo_folder.name).symlink_to(demo_folder)
    up = Up(data_dir, "random", "--tiers", "redis,s3")
    try:
        up.wait_ready()
        yield up
    finally:
        if up.process.poll() is None:
            up.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def window(up: Up) -> dict[str, Any]:
    """A window in both tiers; its status."""
    body = {"model": "demo", "max_tokens": 8, "messages": HISTORY}
    assert httpx.post(f"{up.url}/s/harbour/v1/chat/completions", json=body, timeout=60).status_code == 200
    frozen = httpx.post(
        f"{up.url}/admin/windows", json={"session_id": "harbour", "window_name": "lamps"}, timeout=120
    ).json()
    assert frozen["receipt"]["kv"] == "complete", frozen
    chunks = frozen["receipt"]["chunks"]
    assert {name: tier["objects"] for name, tier in frozen["receipt"]["tiers"].items()} == {
        "redis": chunks,
        "s3": chunks,
    }
    return dict(frozen["receipt"])


def thawed_cold(up: Up, clone: str) -> dict[str, Any]:
    """Thaw an isolated clone, of whose KV no memory has anything; the receipt."""
    made = httpx.post(f"{up.url}/admin/windows/lamps/clone", json={"target_window": clone, "isolate": True}, timeout=60)
    assert made.status_code == 201, made.text
    thawed = httpx.post(f"{up.url}/admin/windows/{clone}/thaw", json={"warm": "gpu"}, timeout=120)
    assert thawed.status_code == 200, thawed.text
    return dict(thawed.json()["receipt"])


def valkey(up: Up) -> redis.Redis:
    """A client of the Valkey that was started."""
    (line,) = [line for line in up.said.splitlines() if line.startswith("redis: a Valkey at ")]
    return redis.Redis.from_url(line.split()[4].rstrip(","))


def test_health_finds_both_tiers_sound(up: Up) -> None:
    assert "s3: moto at http://localhost:" in up.said
    tiers = httpx.get(f"{up.url}/admin/health", params={"component": "tiers"}, timeout=60).json()["components"]["tiers"]
    assert (tiers["status"], tiers["message"]) == ("healthy", "redis, s3")


def test_window_thaws_from_each_tier_with_every_chunk(up: Up, window: dict[str, Any]) -> None:
    verdict = httpx.post(f"{up.url}/admin/windows/lamps/verify", json={"deep": True}, timeout=120).json()
    assert verdict["ok"], verdict
    assert {one["tier"]: one["cached_tokens"] for one in verdict["deep"]} == dict.fromkeys(
        ("redis", "s3"), window["chunks"] * CHUNK
    )
    receipt = thawed_cold(up, "from-both")
    assert (receipt["chunks_found"], receipt["cached_tokens"]) == (window["chunks"], window["chunks"] * CHUNK)
    with valkey(up) as client:
        client.flushall()  # and now from S3 alone
    receipt = thawed_cold(up, "from-s3")
    assert (receipt["chunks_found"], receipt["cached_tokens"]) == (window["chunks"], window["chunks"] * CHUNK)
    cache = httpx.get(f"{up.url}/admin/cache", timeout=60).json()["tiers"]["s3"]
    assert not cache["listed"]
    assert cache["windows"]["objects"] == cache["pinned"]["objects"] == window["chunks"]


def test_window_that_s3_lost_is_lost_and_says_so(up: Up, window: dict[str, Any]) -> None:
    processes, _ = up.belongings("s3")
    up.kill("s3")
    eventually(lambda: not living(processes), "moto is gone", WITHIN_S)
    verdict = httpx.post(f"{up.url}/admin/windows/lamps/verify", json={}, timeout=120).json()
    assert not verdict["ok"]
    assert verdict["tiers"]["s3"]["missing"] == window["chunks"]

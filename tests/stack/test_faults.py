"""Engine, cache, Redis or disk down or full, on the real stack: requests still work, or say why not."""

import os
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.stack import local
from tests.stack.clients import mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, comes_true, converse, start_redis, until
from tests.stack.restart import across_outage
from tests.support.conversations import without_turns
from tests.support.local_stack import CACHE_WITHIN, wait_ready

pytestmark = pytest.mark.stack


def test_the_self_test_proves_isolation_in_every_tier(shared: Gateway) -> None:
    report = shared.http.post("/admin/doctor", json={}).json()
    assert report["ok"]
    assert {check["name"]: check["status"] for check in report["checks"]} == {
        "engine": "ok",
        "aborts": "ok",
        "cache": "ok",
        "cached_tokens": "ok",
        "disk tier": "ok",
        "disk pins": "ok",
        "redis tier": "ok",
        "redis pins": "ok",
        "isolation": "ok",
        "store": "ok",
        "windows": "ok",
    }


def test_the_self_test_leaves_nothing_behind(stack: Stack, shared: Gateway) -> None:
    before = {f.name for f in stack.kv_dir.iterdir()}, set(stack.redis.scan_iter(count=10**5))
    shared.http.post("/admin/doctor", json={})
    assert ({f.name for f in stack.kv_dir.iterdir()}, set(stack.redis.scan_iter(count=10**5))) == before


@pytest.mark.parametrize(
    ("setting", "wrong", "check"),
    [
        ("CWG_KV_DIR", "elsewhere", "disk tier"),
        ("CWG_CHUNK_SIZE", "128", "chunk size"),
        ("CWG_CACHE_URL", "http://127.0.0.1:9", "cache"),
        ("CWG_PINS_DIR", "/dev/shm/cwg-test-pins", "disk pins"),
    ],
)
def test_doctor_names_what_is_set_wrong(stack: Stack, tmp_path: Path, setting: str, wrong: str, check: str) -> None:
    value = str(tmp_path / wrong) if wrong == "elsewhere" else wrong
    gateway = Gateway(stack.settings(tmp_path / "data", **{setting: value}), tmp_path / "gateway.log").start()
    try:
        report = gateway.http.post("/admin/doctor", json={}).json()
        failed = {c["name"]: c for c in report["checks"] if c["status"] == "failed"}
        assert not report["ok"]
        assert check in failed
        assert failed[check]["remedy"]
    finally:
        gateway.close()
        shutil.rmtree("/dev/shm/cwg-test-pins", ignore_errors=True)


def test_a_session_in_a_turn_is_busy_and_frozen_after_it(stack: Stack, tmp_path: Path) -> None:
    gateway = Gateway(stack.settings(tmp_path / "data", CWG_BUSY_WAIT_S="0.3"), tmp_path / "gateway.log").start()
    messages = [{"role": "user", "content": "Go on"}]
    body = {"model": "demo", "messages": messages, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    try:
        with gateway.http.stream("POST", "/s/busy/v1/chat/completions", json=body) as stream:
            chunks = stream.iter_bytes()
            next(chunks)
            refused = gateway.http.post("/admin/windows", json={"session_id": "busy", "window_name": "busy"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_busy")
            assert refused.json()["error"]["retryable"]
        chat(gateway.client("busy"), messages)
        assert gateway.freeze("busy", "busy")["token_count"] > 0
    finally:
        gateway.close()


def test_redis_down_costs_a_warning_and_no_window(stack: Stack, tmp_path: Path) -> None:
    (port,) = local.free_ports(1)
    process, client = start_redis(tmp_path, port)
    settings = stack.settings(
        tmp_path / "data", CWG_KV_REDIS_URL=f"redis://127.0.0.1:{port}", CWG_CONNECT_TIMEOUT_S="0.5"
    )
    gateway = Gateway(settings, tmp_path / "gateway.log").start()
    try:
        process.kill()
        process.wait()
        converse(gateway.client("no-redis"), "no redis", turns=1)
        window = gateway.freeze("no-redis", "no-redis")
        assert window["kv"] == "complete"
        assert set(window["receipt"]["tiers"]) == {"disk"}
        assert any("redis tier" in warning for warning in window["warnings"])
        thawed = gateway.thaw("no-redis", warm="gpu")
        assert thawed["receipt"]["cached_tokens"] >= window["receipt"]["chunks"] * 64
        assert gateway.http.get("/admin/health").json()["status"] == "degraded"
        assert gateway.http.delete("/admin/windows/no-redis").status_code == 200
    finally:
        gateway.close()
        client.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 24 names: tmpfs counts a hard link as an inode."""
    path = tmp_path / "tiny"
    path.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "nr_inodes=24", "tmpfs", path]
    mounted = subprocess.run(argv, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs root to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up_while_pinning_is_storage_full_without_a_window(
    stack: Stack, own: Gateway, tiny: Path, tmp_path: Path
) -> None:
    converse(own.client("full"), "full", turns=3, words=90)
    whole = own.freeze("full", "whole")
    salt = own.thaw("whole")["cache_salt"]
    own.stop()
    (tiny / "kv").mkdir()
    for file in list(stack.kv_dir.glob(f"*@{salt}.data")):
        shutil.copy(file, tiny / "kv" / file.name)
    settings = {"CWG_KV_DIR": str(tiny / "kv"), "CWG_PINS_DIR": str(tiny / "pins"), "CWG_KV_REDIS_URL": ""}
    gateway = Gateway(stack.settings(tmp_path / "data", **settings), tmp_path / "gateway.log").start()
    try:
        assert whole["block_count"] * 2 > 24, "they cannot all be pinned"
        refused = gateway.http.post("/admin/windows", json={"session_id": "full", "window_name": "full"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert gateway.http.get("/admin/windows/full").status_code == 404
    finally:
        gateway.close()


def test_two_freezes_of_one_name_at_once_make_one_window(own: Gateway) -> None:
    for name in ("twin-a", "twin-b"):
        converse(own.client(name), name, turns=1)
    body = '{{"session_id": "{}", "window_name": "one"}}'
    curls = [
        subprocess.Popen(
            [
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                f"{own.url}/admin/windows",
                "-d",
                body.format(name),
            ],
            stdout=subprocess.PIPE,
        )
        for name in ("twin-a", "twin-b", "twin-a", "twin-b")
    ]
    codes = sorted(process.communicate()[0].decode() for process in curls)
    assert codes == ["201", "409", "409", "409"]
    assert own.http.get("/admin/windows").json()["total"] == 1
    receipt = own.thaw("one", warm="gpu")["receipt"]
    assert receipt["chunks_found"] == receipt["chunks_expected"] > 0


def test_a_window_of_another_model_is_refused_and_its_text_is_still_there(
    stack: Stack, own: Gateway, tmp_path: Path
) -> None:
    messages = converse(own.client("model"), "model", turns=1)
    own.freeze("model", "model")
    own.stop()
    settings = stack.settings(tmp_path / "data", CWG_MODEL_FINGERPRINT="other weights under the same name")
    other = Gateway(settings, tmp_path / "gateway.log").start()
    try:
        refused = other.http.post("/admin/windows/model/thaw", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_mismatch")
        assert without_turns(other.http.get("/admin/windows/model/messages").json()["messages"]) == messages
    finally:
        other.close()


# These two stop the shared cache, and bring it back.


@pytest.fixture
def frozen_without_cache(stack: Stack, own: Gateway) -> Iterator[tuple[Gateway, str]]:
    """A window frozen while all is well; then LMCache is killed."""
    converse(own.client("good"), "good", turns=1)
    own.freeze("good", "good")
    os.kill(stack.processes.cache.pid, signal.SIGKILL)
    stack.processes.cache.clear()
    yield own, "good"
    stack.processes.cache.start()
    wait_ready(stack.processes.cache, CACHE_WITHIN)


def test_with_the_cache_down_turns_continue_and_freeze_and_thaw_warn(
    stack: Stack, frozen_without_cache: tuple[Gateway, str]
) -> None:
    gateway, name = frozen_without_cache
    chat(gateway.client("bad"), [{"role": "user", "content": "Is anybody there? " * 40}])
    window = gateway.freeze("bad", "bad")
    assert (window["kv"], window["block_count"]) == ("absent", 0)
    assert "LMCache" in window["warnings"][0]
    thawed = gateway.thaw(name, warm="gpu")
    assert any("LMCache" in warning for warning in thawed["warnings"])
    assert chat(gateway.client(thawed["session_id"]), [{"role": "user", "content": "And?"}]).usage.prompt_tokens > 64
    assert gateway.http.get("/admin/health?component=cache").json()["components"]["cache"]["status"] == "unhealthy"


def test_after_the_cache_is_back_the_same_session_freezes_whole(stack: Stack, own: Gateway) -> None:
    def frozen_whole() -> bool:
        session = f"back-{os.urandom(3).hex()}"
        converse(own.client(session), session, turns=1)
        return own.freeze(session, session)["kv"] == "complete"

    # vLLM notices by its heartbeat, within some seconds, that the cache is a new one.
    until(frozen_whole, "the engine has registered with the new cache", within=60)


@dataclass
class Outage:
    """A gateway, a window of it, and what it answered while neither engine nor cache was there."""

    gateway: Gateway
    window: dict[str, Any]
    refused: list[tuple[int, str]] = field(default_factory=list)
    half_thawed: int = 0
    was_unready: bool = False
    engine_status: str = ""


@across_outage
def outage(stack: Stack, folder: Path) -> Generator[Outage | None]:
    """Freeze a session, and use it while the engine is down."""
    gateway = Gateway(stack.settings(folder / "data"), folder / "gateway.log").start()
    try:
        converse(gateway.client("engine"), "engine", turns=1)
        outage = Outage(gateway, gateway.freeze("engine", "engine"))
        yield outage
        for path, body in (
            ("/s/engine/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "Hello?"}]}),
            ("/admin/windows", {"session_id": "engine", "window_name": "no"}),
            ("/admin/windows/engine/thaw", {"warm": "gpu", "new_session_id": "half"}),
        ):
            answer = gateway.http.post(path, json=body)
            outage.refused.append((answer.status_code, answer.json()["error"]["code"]))
        outage.half_thawed = gateway.get_status("/admin/sessions/half")
        outage.was_unready = comes_true(lambda: gateway.get_status("/readyz") == 503)
        outage.engine_status = mcp(gateway, "health_check", component="vllm")["by_name"]["engine"]["status"]
        yield None
    finally:
        gateway.close()


def test_w12_with_the_engine_down_requests_fail_clearly_and_come_back_with_it(outage: Outage) -> None:
    assert outage.refused == [(502, "engine_unreachable")] * 3
    assert outage.half_thawed == 404
    assert (outage.was_unready, outage.engine_status) == (True, "unhealthy")
    until(lambda: outage.gateway.get_status("/readyz") == 200, "ready again")
    receipt = outage.gateway.thaw("engine", warm="gpu", new_session_id="whole")["receipt"]
    assert receipt["cached_tokens"] == outage.window["receipt"]["chunks"] * 64

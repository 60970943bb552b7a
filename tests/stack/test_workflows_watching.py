"""Workflows of somebody who looks before acting: health, metrics, states, sizes, logs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.stack import local
from tests.stack.clients import cwg, mcp, mcp_over_stdio, mcp_refused
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse, until
from tests.stack.tiers import files, hashes
from tests.support.conversations import without_turns
from tests.support.gateway_process import environment

pytestmark = pytest.mark.stack


def healthy(gateway: Gateway) -> bool:
    """The gate that a script puts before what must not go wrong."""
    return bool(mcp(gateway, "health_check")["status"] == "healthy")


def metric(gateway: Gateway, name: str, **labels: str) -> float:
    """One number of the metrics, as JSON tells it."""
    rows = mcp(gateway, "get_metrics_data", format="json")["metrics"]
    return sum(float(row["value"]) for row in rows if row["name"] == name and labels.items() <= row["labels"].items())


@pytest.fixture(scope="module")
def broken(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that finds no LMCache where it was told."""
    root = tmp_path_factory.mktemp("broken")
    settings = stack.settings(root / "data", CWG_CACHE_URL="http://127.0.0.1:9")
    gateway = Gateway(settings, root / "gateway.log").start()
    yield gateway
    gateway.close()


def test_w06_health_is_told_and_metrics_move_with_what_is_done(shared: Gateway) -> None:
    until(lambda: healthy(shared), "all parts are up")
    assert mcp(shared, "health_check")["uptime_seconds"] > 0
    turns, freezes = metric(shared, "cwg_turns_total"), metric(shared, "cwg_verbs_total", verb="freeze", result="ok")
    tokens = metric(shared, "cwg_prompt_tokens_total")
    usage = chat(shared.client("watched"), [{"role": "user", "content": "Hello"}], max_tokens=2).usage
    mcp(shared, "window_freeze", session_id="watched", window_name="watched")
    assert metric(shared, "cwg_turns_total") == turns + 1
    assert metric(shared, "cwg_prompt_tokens_total") == tokens + usage.prompt_tokens
    assert metric(shared, "cwg_verbs_total", verb="freeze", result="ok") == freezes + 1
    text = mcp(shared, "get_metrics_data", format="prometheus")["content"]
    assert {"cwg_turns", "cwg_verbs"} <= {family.name for family in text_string_to_metric_families(text)}


def test_w07_sessions_are_listed_by_state_and_a_status_says_where_the_bytes_are(stack: Stack, shared: Gateway) -> None:
    def in_state(state: str) -> list[str]:
        return [session["id"] for session in mcp(shared, "session_list", state_filter=state, limit=100)["sessions"]]

    converse(shared.client("states"), "states", turns=1)
    assert "states" in in_state("active")
    mcp(shared, "window_freeze", session_id="states", window_name="states")
    assert ("states" in in_state("active"), "states" in in_state("frozen")) == (False, True)
    mcp(shared, "window_thaw", window_name="states", new_session_id="states-2")
    assert "states-2" in in_state("thawed")
    chat(shared.client("states-2"), [{"role": "user", "content": "On."}], max_tokens=2)
    assert ("states-2" in in_state("thawed"), "states-2" in in_state("active")) == (False, True)
    status = mcp(shared, "window_status", window_name="states")
    cache = status["kv_cache"]
    assert status["token_count"] > 0
    assert (cache["storage_tier"], cache["total_size_bytes"]) == ("disk", status["size_bytes"])
    for file in files(stack, hashes(shared, "states"), pins=False):
        file.unlink()
    cache = mcp(shared, "window_status", window_name="states")["kv_cache"]
    assert (cache["storage_tier"], cache["tiers"]["disk"]["present"]) == ("redis", 0)


def test_w13_a_broken_part_is_named_and_an_unknown_one_is_refused(broken: Gateway) -> None:
    report = mcp(broken, "health_check")
    assert report["status"] == "degraded"
    cache = report["by_name"].pop("cache")
    assert (cache["status"], "does not answer" in cache["message"]) == ("unhealthy", True)
    assert report["by_name"].pop("isolation")["status"] == "degraded", "it could not be proved without the cache"
    assert {name: part["status"] for name, part in report["by_name"].items()} == dict.fromkeys(
        ("engine", "tiers", "store"), "healthy"
    )
    assert list(mcp(broken, "health_check", component="kv_store")["by_name"]) == ["cache"]
    refused = mcp_refused(broken, "health_check", component="gpu_fan")
    assert (refused["code"], "engine" in refused["message"]) == ("invalid_request", True)


def test_w17_the_size_of_a_context_is_what_the_engine_counts(stack: Stack, shared: Gateway) -> None:
    messages = converse(shared.client("sized"), "sized", turns=2)
    usage = chat(shared.client("sized"), [*messages, {"role": "user", "content": "?"}]).usage
    session = mcp(shared, "window_status", session_id="sized")
    assert session["token_count"] == usage.total_tokens
    assert session["context_limit"] == stack.plan.options.max_model_len
    mcp(shared, "window_freeze", session_id="sized", window_name="sized")
    said = without_turns(shared.http.get("/admin/windows/sized/messages").json()["messages"])
    body = {"model": "demo", "messages": said, "add_generation_prompt": False}
    count = stack.engine.post("/tokenize", json=body).json()["count"]
    assert mcp(shared, "window_status", window_name="sized")["token_count"] == count


def test_w19_a_script_freezes_only_where_everything_is_well(shared: Gateway, broken: Gateway) -> None:
    for gateway in (shared, broken):
        chat(gateway.client("critical"), [{"role": "user", "content": "Before the migration"}], max_tokens=2)
    until(lambda: healthy(shared), "all parts are up")
    assert not healthy(broken)
    made = {}
    for gateway in (shared, broken):  # cwg doctor && cwg freeze critical before-migration
        if cwg(gateway, "doctor").returncode == 0:
            made[gateway.url] = cwg(gateway, "freeze", "critical", "before-migration").returncode
    assert made == {shared.url: 0}


def test_i6_a_look_at_everything_before_the_work_begins_over_stdio(shared: Gateway) -> None:
    until(lambda: healthy(shared), "all parts are up")
    converse(shared.client("pre-flight"), "pre-flight", turns=1)
    for number in range(3):
        mcp(shared, "window_freeze", session_id="pre-flight", window_name=f"flight-{number}", tags=["flight"])
    health, found, stats = mcp_over_stdio(
        shared,
        ("health_check", {}),
        ("window_list", {"tags": ["flight"], "sort_by": "created_at", "limit": 2}),
        ("cache_stats", {}),
    )
    assert health["status"] == "healthy"
    assert ([one["name"] for one in found["windows"]], found["total"]) == (["flight-2", "flight-1"], 3)
    assert stats["windows"] == mcp(shared, "window_list")["total"]
    assert stats["total_bytes"] > 0
    assert 0 < stats["hit_rate"] < 1


def test_i8_a_debug_log_says_more_and_all_of_it_goes_to_stderr(stack: Stack, tmp_path: Path) -> None:
    said: dict[str, tuple[str, str]] = {}
    for level in ("info", "debug"):
        said[level] = _one_turn_logged(stack, tmp_path / level, level)
    assert [out for out, _ in said.values()] == ["", ""]
    lines = {level: err.count(" DEBUG ") for level, (_, err) in said.items()}
    assert lines["info"] == 0 < lines["debug"]
    assert " INFO " in said["info"][1]


def _one_turn_logged(stack: Stack, folder: Path, level: str) -> tuple[str, str]:
    """What a gateway writes to stdout and to stderr, from its start over a turn to its end."""
    folder.mkdir()
    (port,) = local.free_ports(1)
    settings: dict[str, Any] = stack.settings(folder / "data", CWG_LOG_LEVEL=level, CWG_PORT=str(port))
    out, err = folder / "out", folder / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        argv = [sys.executable, "-m", "gateway", "serve"]
        with subprocess.Popen(argv, env=environment(settings), stdout=stdout, stderr=stderr) as process:
            gateway = Gateway({}, err)
            gateway.http.base_url = f"http://127.0.0.1:{port}"
            until(lambda: gateway.get_status("/readyz") == 200, "gateway is ready")
            gateway.http.post("/v1/completions", json={"model": "demo", "prompt": "Once", "max_tokens": 2})
            gateway.close()
            process.terminate()
    return out.read_text(), err.read_text()

"""Several workers before the real stack: one proves what the other froze, and a death in mid-freeze leaves nothing."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.integration.test_metrics import numbers, value
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, until

pytestmark = pytest.mark.stack
COUNT = 3


@pytest.fixture
def crew(stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of several workers with an empty store."""
    gateway = Gateway(stack.settings(tmp_path / "data", CWG_WORKERS=str(COUNT)), tmp_path / "gateway.log").start()
    yield gateway
    gateway.close()


@contextmanager
def connections(gateway: Gateway) -> Iterator[dict[int, httpx.Client]]:
    """A connection to each of the workers, once all of them are ready."""
    with ExitStack() as stack:
        found: dict[int, httpx.Client] = {}

        def another() -> bool:
            client = stack.enter_context(httpx.Client(base_url=gateway.url, timeout=120))
            if client.get("/readyz").status_code == 200:
                found.setdefault(client.get("/admin/health?component=store").json()["pid"], client)
            return len(found) == COUNT

        until(another, f"{COUNT} workers are ready; see {gateway.log}")
        yield found


def turn(client: httpx.Client, session: str, messages: list[dict[str, str]]) -> dict[str, int]:
    """One greedy turn on this very connection; the reply is added to `messages`. Returns the engine's usage."""
    body = {"model": "demo", "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = client.post(f"/s/{session}/v1/chat/completions", json=body).raise_for_status().json()
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    return dict(answer["usage"])


def test_what_one_worker_answers_another_freezes_and_a_third_thaws_and_hits(crew: Gateway) -> None:
    with connections(crew) as workers:
        one, two, three = workers.values()
        messages = [{"role": "user", "content": "Tell me about workers. " * 60}]
        usages = [turn(one, "s", messages)]
        messages.append({"role": "user", "content": "And then? " * 40})
        usages.append(turn(two, "s", messages))
        window = three.post("/admin/windows", json={"session_id": "s", "window_name": "w"}).raise_for_status().json()
        assert window["kv"] == "complete", window["warnings"]
        thawed = one.post("/admin/windows/w/thaw", json={"new_session_id": "t", "warm": "gpu"}).raise_for_status()
        receipt = thawed.json()["receipt"]
        assert receipt["chunks_found"] == receipt["chunks_expected"] > 0
        assert receipt["cached_tokens"] >= receipt["chunks_expected"] * window["receipt"]["chunk_size"]
        usages.append(turn(two, "t", [{"role": "user", "content": "Go on."}]))
        seen = numbers(three.get("/metrics").text)
        assert value(seen, "cwg_prompt_tokens_total", model="demo") == sum(u["prompt_tokens"] for u in usages)
        assert value(seen, "cwg_completion_tokens_total", model="demo") == 3 * 12
        cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)  # type: ignore[index]
        assert value(seen, "cwg_cached_tokens_total", model="demo") == cached > receipt["chunks_expected"]
        assert value(seen, "cwg_pinned_objects", tier="disk") == window["receipt"]["tiers"]["disk"]["objects"]
    log = crew.log.read_text()
    assert "self-test" not in log  # each worker has proved the stack, while the others did, and nothing failed


def test_a_worker_that_dies_in_a_freeze_leaves_nothing_and_another_freezes(crew: Gateway) -> None:
    with connections(crew) as workers:
        (victim, one), (_, two), _ = workers.items()
        messages = [{"role": "user", "content": "Tell me about deaths. " * 200}]
        turn(one, "s", messages)
        body = {"session_id": "s", "window_name": "w"}
        with one.stream("POST", "/admin/windows", json=body, headers={"accept": "application/x-ndjson"}) as freezing:
            stages = (json.loads(line)["progress"]["stage"] for line in freezing.iter_lines())
            assert next(stage for stage in stages if stage in ("prefill", "barrier", "pin"))
            os.kill(victim, signal.SIGKILL)
        if two.get("/admin/windows/w").status_code == 404:
            assert two.post("/admin/windows", json=body).status_code == 201
        receipt = two.post("/admin/windows/w/thaw", json={"warm": "gpu"}).raise_for_status().json()["receipt"]
        assert receipt["chunks_found"] == receipt["chunks_expected"] > 0
    with connections(crew) as again:
        assert victim not in again
        verdict = next(iter(again.values())).post("/admin/doctor", json={}).json()
        assert verdict["ok"], verdict

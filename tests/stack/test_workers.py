"""Several workers before the real stack: one proves what the other froze, and a death in mid-freeze leaves nothing."""

import json
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.integration.test_metrics import numbers, value
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, until
from tests.stack.tiers import files, hashes, names

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


def test_a_worker_that_dies_in_a_freeze_leaves_nothing_and_another_freezes(
    stack: Stack, crew: Gateway, tmp_path: Path
) -> None:
    body = {"session_id": "s", "window_name": "w"}
    with connections(crew) as workers:
        (victim, one), *_ = workers.items()
        turn(one, "s", [{"role": "user", "content": "Tell me about deaths. " * 200}])
        assert one.get("/admin/sessions/s").json()["turn_count"] == 1
        with (
            locked_once_claimed(tmp_path / "data" / "gateway.db") as locked,  # so that the freeze cannot commit
            one.stream("POST", "/admin/windows", json=body, headers={"accept": "application/x-ndjson"}) as freezing,
        ):
            stages = (json.loads(line)["progress"]["stage"] for line in freezing.iter_lines())
            assert "commit" in stages
            store_id = locked.result()
            assert pins(stack, store_id)
            os.kill(victim, signal.SIGKILL)
    with connections(crew) as again:
        assert victim not in again
        assert pins(stack, store_id) == []  # a worker that starts sweeps
        one, two, _ = again.values()
        assert one.get("/admin/windows/w").status_code == 404
        assert one.post("/admin/windows", json=body).raise_for_status().json()["kv"] == "complete"
        thawed = two.post("/admin/windows/w/thaw", json={"warm": "gpu"}).raise_for_status().json()
        assert thawed["receipt"]["chunks_found"] == thawed["receipt"]["chunks_expected"] > 0
        verdict = two.post("/admin/doctor", json={}).json()
        assert verdict["ok"], verdict
        wanted = hashes(crew, "w")
        for path in ("windows/w", f"sessions/{thawed['session_id']}", "sessions/s"):
            one.delete(f"/admin/{path}").raise_for_status()
    until(lambda: not files(stack, wanted) and not names(stack, wanted), "none of its KV is left")


@contextmanager
def locked_once_claimed(store: Path) -> Iterator[Future[str]]:
    """Let nobody else commit to a store from when a freeze has claimed what it pins; that gives the store's id."""
    db = sqlite3.connect(store, timeout=30, isolation_level=None, check_same_thread=False)
    over = threading.Event()

    def lock() -> str:
        while not over.wait(0.0005):
            db.execute("BEGIN IMMEDIATE")
            if db.execute("SELECT 1 FROM pin_claims WHERE kind != 'remove'").fetchone():
                (store_id,) = db.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
                return str(store_id)
            db.execute("ROLLBACK")
        raise RuntimeError("nothing was claimed")

    with ThreadPoolExecutor(1) as thread, closing(db):
        try:
            yield thread.submit(lock)
        finally:
            over.set()


def pins(stack: Stack, store_id: str) -> list[object]:
    """What a gateway has pinned, or was about to."""
    on_disk = (stack.plan.data_dir / "kv-pins" / store_id).iterdir()
    return [*on_disk, *stack.redis.scan_iter(f"cwg:{store_id}:*", count=10**5)]

"""SIGKILL to the gateway at every moment of a freeze: never half a window, never a false answer, and then it works."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, converse

pytestmark = pytest.mark.stack

STAGES = ("snapshot", "render", "prefill", "barrier", "pin", "commit")
DELAYS_MS = (0, 2, 6, 20)  # after each stage has begun: 24 moments


@dataclass
class Attempt:
    """A freeze that will be cut short: what the client saw of it."""

    stages: list[str] = field(default_factory=list)
    result: dict[str, object] | None = None


def test_a_kill_at_any_moment_leaves_a_whole_window_or_none(stack: Stack, own: Gateway) -> None:
    for number, (stage, delay) in enumerate((s, d) for s in STAGES for d in DELAYS_MS):
        session = f"victim-{number}"
        converse(own.client(session), f"victim {number}", turns=1, words=40)
        own.http.get(f"/admin/sessions/{session}")  # a turn of the last 30 ms is lost with its process
        attempt = _freeze_and_kill(own, session, stage, delay / 1000)
        assert attempt.stages or attempt.result, "the freeze had begun"
        own.start()
        _check(stack, own, session, attempt)


@pytest.mark.parametrize("stage", ["snapshot", "render"])
def test_a_kill_before_the_commit_leaves_no_window(stack: Stack, own: Gateway, stage: str) -> None:
    converse(own.client("victim"), "victim", turns=1, words=40)
    own.http.get("/admin/sessions/victim")
    with _no_claim(own):  # so that it comes no further, however slow the kill is
        attempt = _freeze_and_kill(own, "victim", stage, 0)
    assert stage in attempt.stages
    assert "commit" not in attempt.stages
    own.start()
    assert _check(stack, own, "victim", attempt) == "none"


@contextmanager
def _no_claim(gateway: Gateway) -> Iterator[None]:
    """Nobody else can write to the store, so that a freeze cannot claim what it is about to pin."""
    with closing(sqlite3.connect(gateway.log.parent / "data" / "gateway.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def _freeze_and_kill(gateway: Gateway, session: str, stage: str, delay_s: float) -> Attempt:
    """Freeze, watching its progress; SIGKILL `delay_s` after `stage` has begun."""
    attempt = Attempt()
    began = threading.Event()

    def watch() -> None:
        body = {"session_id": session, "window_name": session}
        headers = {"accept": "application/x-ndjson"}
        try:
            with httpx.stream("POST", f"{gateway.url}/admin/windows", json=body, headers=headers, timeout=60) as answer:
                for line in answer.iter_lines():
                    step = json.loads(line)
                    if "progress" in step:
                        attempt.stages.append(step["progress"]["stage"])
                        if attempt.stages[-1] == stage:
                            began.set()
                    else:
                        attempt.result = step
        except httpx.TransportError:
            pass  # that is what a kill looks like
        finally:
            began.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert began.wait(60)
    threading.Event().wait(delay_s)
    gateway.kill()
    watcher.join(60)
    return attempt


def _check(stack: Stack, gateway: Gateway, session: str, attempt: Attempt) -> str:
    """After the restart: whole or not there at all, no stray pin, and the same freeze can be done again."""
    answer = gateway.http.get(f"/admin/windows/{session}", params={"include_blocks": "true"})
    if attempt.result is not None:
        assert answer.status_code == 200, f"was told {attempt.result} and is gone"
    exists = answer.status_code == 200
    held = {block["hash"] for block in answer.json()["blocks"]} if exists else set()
    assert _pinned(stack, gateway, session) == held
    if not exists:
        gateway.freeze(session, session)
    receipt = gateway.thaw(session, warm="gpu")["receipt"]
    assert receipt["chunks_found"] == receipt["chunks_expected"] > 0
    assert receipt["cached_tokens"] >= receipt["chunks_found"] * 64
    assert gateway.http.delete(f"/admin/windows/{session}").status_code == 200
    assert _pinned(stack, gateway, session) == set()
    return "whole" if exists else "none"


def _pinned(stack: Stack, gateway: Gateway, session: str) -> set[str]:
    """Chunk hashes that this gateway's store has pinned on disk and in Redis; they have to agree."""
    pins: Path = stack.plan.data_dir / "kv-pins" / _store_id(gateway)
    disk = {file.name.split("@")[3] for file in pins.iterdir()}
    in_redis = {
        name.decode().split("@")[3] for name in stack.redis.scan_iter(f"cwg:{_store_id(gateway)}:pin:*", count=10**5)
    }
    assert disk == in_redis
    return disk


def _store_id(gateway: Gateway) -> str:
    with sqlite3.connect(gateway.log.parent / "data" / "gateway.db") as db:
        (store_id,) = db.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
    db.close()
    return str(store_id)

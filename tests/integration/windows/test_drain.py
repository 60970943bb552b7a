"""An engine that is drained: its sessions move with their KV, and nothing new comes."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

from tests.support.cli import cwg
from tests.support.engine_pool import CHAT, server_of
from tests.support.fakes.engine import Exchange
from tests.support.gateway_process import Gateway, eventually
from tests.support.node_pairs import Pair, Start, beside, states
from tests.support.postgres import VARIABLE

HELLO = "hello there, how are you?"
NAMES = [f"s-{number}" for number in range(8)]


def drain(gateway: Gateway, engine: str, **more: Any) -> dict[str, Any]:
    """One call of a drain."""
    answer = gateway.http.post("/admin/engines/drain", json={"engine": engine, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def drain_until_empty(gateway: Gateway, engine: str) -> dict[str, Any]:
    """Repeat a drain until it says that the engine is empty."""
    moved: list[Any] = []
    while not (done := drain(gateway, engine))["empty"]:
        moved += done["moved"]
        threading.Event().wait(0.1)
    return {**done, "moved": moved + done["moved"]}


def served(gateway: Gateway, names: list[str]) -> dict[str, str]:
    """Have a turn in each session; return the engine of each."""
    for name in names:
        assert gateway.chat(name, HELLO).status_code == 200
    return {name: server_of(gateway, name) for name in names}


@contextmanager
def held_turn(gateway: Gateway, pair: Pair, session: str) -> Iterator[None]:
    """Keep a turn of a session open for the block."""
    release = threading.Event()

    def wait(exchange: Exchange) -> None:
        release.wait(30)
        pair.engine.answer_chat(exchange)

    pair.engine.on_chat = wait
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": f"{HELLO} again"}]}
        ask = threading.Thread(target=client.post, args=(f"/s/{session}{CHAT}",), kwargs={"json": body})
        before = len(pair.engine.seen(CHAT))
        ask.start()
        try:
            pair.engine.wait_seen(CHAT, before + 1)
            yield
        finally:
            pair.engine.on_chat = pair.engine.answer_chat
            release.set()
            ask.join()


def test_sessions_of_a_drained_engine_are_frozen_and_loaded_where_they_go_on(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    homes = served(gateway, NAMES)
    gone = beside(nodes, homes[NAMES[0]])
    other = next(pair for pair in nodes if pair is not gone)
    its_own = {name for name, engine in homes.items() if engine == gone.engine.url}
    gone.engine.metrics = "vllm:num_requests_running 0.0\nvllm:num_requests_waiting 0.0\n"
    first = drain(gateway, gone.engine.url)
    assert (first["empty"], first["waiting_for"]["seconds"] > 0) == (False, True), "other workers may not know yet"
    done = drain_until_empty(gateway, gone.engine.url)
    done["moved"] = first["moved"] + done["moved"]
    assert {one["session_id"] for one in done["moved"]} == its_own
    for one in done["moved"]:
        assert one["engine"] == other.engine.url
        window = gateway.http.get(f"/admin/windows/{one['window_name']}").json()
        assert (window["kv"], "auto" in window["tags"]) == ("complete", True)
        assert one["chunks_loaded"] == window["kv_cache"]["block_count"]
    assert (done["failed"], done["empty"], done["warnings"]) == ([], True, [])
    assert done["waiting_for"] == {"requests": 0, "sessions": 0, "seconds": 0, "in_a_turn": []}
    assert states(gateway)[gone.engine.url] == "draining"
    had = len(gone.engine.seen(CHAT))
    for name in [*NAMES, *(f"new-{number}" for number in range(8))]:
        assert gateway.chat(name, HELLO).status_code == 200
        assert server_of(gateway, name) == other.engine.url
    assert len(gone.engine.seen(CHAT)) == had
    again = drain(gateway, gone.engine.url.removeprefix("http://"))
    assert (again["moved"], again["since"], again["empty"]) == ([], done["since"], True)


def test_a_drain_waits_for_turns_and_requests_and_is_repeated(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    home = beside(nodes, served(gateway, ["s"])["s"])
    with held_turn(gateway, home, "s"):
        home.engine.metrics = "vllm:num_requests_running 1.0\nvllm:num_requests_waiting 2.0\n"
        done = drain(gateway, home.engine.url)
        assert (done["moved"], done["empty"]) == ([], False)
        waiting = {name: done["waiting_for"][name] for name in ("requests", "sessions", "in_a_turn")}
        assert waiting == {"requests": 3, "sessions": 1, "in_a_turn": ["s"]}
    gateway.turns("s", 2)
    home.engine.stop()
    eventually(lambda: states(gateway)[home.engine.url] == "ejected", "it vanished")
    done = drain_until_empty(gateway, home.engine.url)
    assert [one["session_id"] for one in done["moved"]] == ["s"], "it has no requests now"


def test_a_drain_is_known_to_every_worker_and_after_a_restart_until_it_is_undone(
    start: Start, nodes: list[Pair]
) -> None:
    gateway = start(workers=2)
    gone = nodes[0].engine.url
    drain(gateway, gone)

    def all_know() -> bool:
        return all(states(gateway)[gone] == "draining" for _ in range(8))

    eventually(all_know, "whichever worker answers")
    gateway.stop()
    gateway.start().wait()
    eventually(all_know, "it is still drained")
    done = drain(gateway, gone, undo=True)
    assert (done["draining"], done["since"], done["moved"]) == (False, None, [])
    eventually(lambda: all(states(gateway)[gone] == "healthy" for _ in range(8)), "all know")
    assert gone in served(gateway, NAMES).values()


def test_what_cannot_be_drained_is_refused_and_the_drained_serves_if_no_other_can(
    start: Start, nodes: list[Pair]
) -> None:
    gateway = start()
    for wrong in ("http://127.0.0.1:9", "x", "http://", " ", 5, None, []):
        answer = gateway.http.post("/admin/engines/drain", json={"engine": wrong})
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "engine"), answer.text
    home = beside(nodes, served(gateway, ["s"])["s"])
    other = next(pair for pair in nodes if pair is not home)
    drain(gateway, home.engine.url)
    answer = gateway.http.post("/admin/engines/drain", json={"engine": other.engine.url})
    assert (answer.status_code, answer.json()["error"]["details"]) == (400, {"field": "engine"})
    assert "is the only engine that is not drained" in answer.json()["error"]["message"]
    other.engine.stop()
    eventually(lambda: states(gateway)[other.engine.url] == "ejected", "it is seen")
    assert served(gateway, ["t"]) == {"t": home.engine.url}


@pytest.mark.skipif(VARIABLE in os.environ, reason="writes into the store's file")
def test_what_another_gateway_has_drained_counts_at_once(start: Start, nodes: list[Pair]) -> None:
    gateway = start(engine_check_s=60)  # until it hears of that
    with closing(sqlite3.connect(gateway.data_dir / "gateway.db")) as db, db:
        db.execute("INSERT INTO meta VALUES (?, '1.0')", (f"drained:{nodes[0].engine.url}",))
    answer = gateway.http.post("/admin/engines/drain", json={"engine": nodes[1].engine.url})
    assert (answer.status_code, answer.json()["error"]["details"]) == (400, {"field": "engine"})


def test_a_session_that_cannot_be_frozen_is_named_and_moves_all_the_same(start: Start, nodes: list[Pair]) -> None:
    gateway = start(disk_reserve_bytes=2**60)
    home = beside(nodes, served(gateway, ["s"])["s"])
    other = next(pair for pair in nodes if pair is not home)
    done = drain(gateway, home.engine.url)
    assert [one["session_id"] for one in done["failed"]] == ["s"]
    assert "kept free" in done["failed"][0]["reason"]
    assert (done["empty"], done["waiting_for"]["sessions"]) == (False, 1)
    assert gateway.chat("s", HELLO).status_code == 200
    assert server_of(gateway, "s", 2) == other.engine.url


def test_cwg_drain_waits_until_the_engine_is_empty(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    home = beside(nodes, served(gateway, ["s"])["s"])
    with held_turn(gateway, home, "s"):
        home.engine.metrics = "vllm:num_requests_running 1.0\n"
        left = cwg("drain", home.engine.url, "--no-wait", url=gateway.url)
        assert "no: it waits for 1 request and 1 session" in left.stdout
        home.engine.metrics = "vllm:num_requests_running 0.0\n"
    gateway.turns("s", 2)
    done = cwg("drain", home.engine.url, url=gateway.url)
    assert done.returncode == 0, done.stderr
    assert "yes: it may be stopped" in done.stdout
    assert "moved     1 session" in done.stdout
    undone = cwg("drain", home.engine.url, "--undo", "--json", url=gateway.url)
    assert '"draining": false' in undone.stdout


def test_a_thaw_is_booked_at_the_engine_that_it_went_to(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    home = beside(nodes, served(gateway, ["s"])["s"])
    other = next(pair for pair in nodes if pair is not home)
    drain(gateway, home.engine.url)
    assert gateway.chat("s", HELLO).status_code == 200
    assert server_of(gateway, "s", 2) == other.engine.url
    drain(gateway, home.engine.url, undo=True)
    eventually(lambda: states(gateway)[home.engine.url] == "healthy", "it has requests again")
    assert gateway.freeze("s", "w").status_code == 201
    before = len(other.engine.seen("/v1/completions"))
    thawed = gateway.http.post("/admin/windows/w/thaw", json={"into": "s", "warm": "gpu"}).json()
    assert len(other.engine.seen("/v1/completions")) > before
    assert other.engine.url in thawed["receipt"]["saved"]["reason"], thawed

"""Several workers as one gateway: what one of them knows, all of them do."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.support.admin_requests import error_of
from tests.support.fakes.engine import MODEL, WITHIN, FakeEngine
from tests.support.gateway_process import Gateway, eventually
from tests.support.raw_http import RawHttpClient
from tests.support.worker_crew import COUNT, Held, ask, begin_stream, chat, crew, pid_of, two_workers, workers_of


def test_connections_are_spread_evenly_over_the_workers(gateway: Gateway) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(90)]
        served = [pid_of(wire) for wire in wires]
    assert set(served) == workers_of(gateway.process.pid)
    assert min(served.count(pid) for pid in set(served)) >= 10  # evenly would be 30


def test_a_single_worker_does_not_fork(shared_gateway: Gateway) -> None:
    assert workers_of(shared_gateway.process.pid) == set()
    assert shared_gateway.http.get("/admin/health").json()["pid"] == shared_gateway.process.pid
    assert not (shared_gateway.data_dir / "turns").exists()


def test_every_worker_is_ready_and_has_proved_the_stack(gateway: Gateway) -> None:
    seen: set[int] = set()

    def ready() -> bool:
        with RawHttpClient(gateway.url) as wire:
            pid = pid_of(wire)
            if ask(wire, "GET", "/readyz").status_code == 200:
                seen.add(pid)
        return len(seen) == COUNT

    eventually(ready, "every worker is ready")


def test_a_session_in_a_turn_of_one_worker_is_busy_in_another(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    held = Held(engine)
    with two_workers(gateway) as (one, other):
        begin_stream(one, session)
        named = {"session_id": session, "window_name": f"w-{session}"}
        assert error_of(ask(other, "POST", "/admin/windows", **named)) == (409, "session_busy")
        assert error_of(ask(other, "DELETE", f"/admin/sessions/{session}")) == (409, "session_busy")
        held.release.set()
        one.chunks()
        assert ask(other, "POST", "/admin/windows", **named).status_code == 201
        assert ask(other, "DELETE", f"/admin/sessions/{session}").status_code == 200


def test_a_freeze_waits_for_the_turn_of_another_worker_and_has_it(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    held = Held(engine)
    with crew(engine, tmp_path) as gateway, two_workers(gateway) as (one, other), ThreadPoolExecutor(1) as pool:
        begin_stream(one, session)
        named = {"session_id": session, "window_name": "w"}
        freezing = pool.submit(ask, other, "POST", "/admin/windows", **named)
        assert not freezing.done()
        held.release.set()
        one.chunks()
        assert freezing.result(WITHIN).status_code == 201
        kept = ask(other, "GET", "/admin/windows/w/messages").json()["messages"]
        assert [m["content"] for m in kept] == ["hi", "held"]


def test_what_one_worker_has_answered_the_others_know(gateway: Gateway, session: str) -> None:
    with two_workers(gateway) as (one, other):
        for number in range(10):
            mine = f"{session}-{number}"
            chat(one, mine)
            assert ask(other, "GET", f"/admin/sessions/{mine}").json()["turn_count"] == 1
            chat(one, mine, messages=[{"role": "user", "content": "and again"}])
            frozen = ask(other, "POST", "/admin/windows", session_id=mine, window_name=f"w-{mine}")
            assert frozen.status_code == 201
            asked, _ = ask(other, "GET", f"/admin/windows/w-{mine}/messages").json()["messages"]
            assert asked["content"] == "and again"


def test_a_lineage_in_a_turn_of_another_worker_keeps_its_cache(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    name = f"w-{session}"
    assert gateway.freeze(session, name).status_code == 201  # by the store alone nothing of the lineage is active
    held = Held(engine)
    with two_workers(gateway) as (one, other):
        begin_stream(one, session)
        warnings = ask(other, "DELETE", f"/admin/windows/{name}").json()["warnings"]
        assert any("still active" in warning for warning in warnings)
        held.release.set()
        one.chunks()


def say(wire: RawHttpClient, messages: list[dict[str, str]], *headers: str, stream: bool = False) -> str:
    """Send a turn that names no session of ours, read its head, and return the session that it was given."""
    body = json.dumps({"model": MODEL, "messages": messages, "stream": stream}).encode()
    wire.post("/v1/chat/completions", body, *headers)
    assert wire.head() == 200
    if not stream:
        wire.body()
    return wire.headers["x-session-id"]


def question(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answered(text: str) -> list[dict[str, str]]:
    """A question, and what the fake engine says to all of them."""
    return [question(text), {"role": "assistant", "content": "Hello there!"}]


def test_a_conversation_continues_in_another_worker_right_after_its_reply(gateway: Gateway, session: str) -> None:
    with two_workers(gateway) as wires:
        for number in range(10):
            history = answered(f"{session} {number}")
            first = say(wires[number % 2], history[:1])
            for turn in range(3):
                wire = wires[(number + turn + 1) % 2]
                assert say(wire, [*history, question(f"and {turn}")]) == first
                history += answered(f"and {turn}")


def test_two_questions_at_once_in_two_workers_branch_and_the_same_one_is_a_retry(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    history = answered(session)
    with two_workers(gateway) as (one, other), two_workers(gateway) as others:
        first = say(one, history[:1])
        (again,) = [wire for wire in others if pid_of(wire) != pid_of(one)][:1]
        held = Held(engine)
        assert say(one, [*history, question("left")], stream=True) == first
        assert say(other, [*history, question("right")], stream=True) != first
        assert say(again, [*history, question("left")], stream=True) == first
        held.release.set()
        for wire in (one, other, again):
            wire.chunks()


def test_an_agents_side_conversation_in_another_worker_is_kept_apart(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    agent = f"session-id: {session}"
    held = Held(engine)
    with two_workers(gateway) as (one, other):
        main, aside = [question("main")], [question("a title, please")]
        assert say(one, main, agent, stream=True) == session
        assert say(other, aside, agent, stream=True) != session
        held.release.set()
        for wire in (one, other):
            wire.chunks()
        chat_again = [*main, {"role": "assistant", "content": "held"}, question("go on")]
        assert say(other, chat_again, agent, stream=True) == session
        other.chunks()

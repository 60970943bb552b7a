"""Several worker processes: they share the work and the store, see each other's turns, and end and come back well."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.api import server, workers
from tests.integration.api.test_server import DEAD, assert_one_clear_line, serve
from tests.support.admin_requests import error_of
from tests.support.fakes.engine import DONE, MODEL, WITHIN, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

COUNT = 3


@contextmanager
def crew(engine: FakeEngine, folder: Path, **settings: object) -> Iterator[Gateway]:
    """A gateway of several workers, each of them serving."""
    with gateway_in_front_of(engine.url, folder, workers=COUNT, **settings) as gateway:
        try:
            eventually(lambda: len(pids(gateway)) == COUNT, "every worker has served somebody")
            yield gateway
        finally:
            children = workers_of(gateway.process.pid)
            gateway.close()
            for pid in children:
                eventually(lambda pid=pid: not alive(pid), "a worker ends with its parent", within=30)  # type: ignore[misc]


@pytest.fixture(scope="module")
def shared_crew(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Started once, for the tests that kill nobody."""
    with crew(shared_engine, tmp_path_factory.mktemp("crew"), busy_wait_s=0.5) as gateway:
        yield gateway


@pytest.fixture
def gateway(engine: FakeEngine, shared_crew: Gateway) -> Gateway:
    """The shared gateway of several workers."""
    return shared_crew


def pid_of(wire: RawHttpClient) -> int:
    """Which worker is at the other end."""
    wire.send(b"GET /admin/health?component=store HTTP/1.1\r\nhost: x\r\n\r\n")
    assert wire.head() == 200
    return int(wire.json()["pid"])


def pids(gateway: Gateway, connections: int = 30) -> set[int]:
    """The workers that answer."""
    found = set()
    for _ in range(connections):
        with RawHttpClient(gateway.url) as wire:
            found.add(pid_of(wire))
    return found


def workers_of(pid: int) -> set[int]:
    """The children of a process; none where it has ended."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in listed.read_text().split()} if listed.exists() else set()


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def two_workers(gateway: Gateway) -> Iterator[tuple[RawHttpClient, RawHttpClient]]:
    """A connection to one worker, and one to another."""
    with ExitStack() as stack:
        first = stack.enter_context(RawHttpClient(gateway.url))
        mine = pid_of(first)
        while pid_of(other := stack.enter_context(RawHttpClient(gateway.url))) == mine:
            pass
        yield first, other


def ask(wire: RawHttpClient, method: str, path: str, **body: Any) -> httpx.Response:
    """One admin request on this very connection."""
    raw = json.dumps(body).encode() if body else b""
    kind = "content-type: application/json"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{kind}\r\ncontent-length: {len(raw)}\r\n\r\n"
    wire.send(head.encode() + raw)
    status = wire.head()
    return httpx.Response(status, json=wire.json())


def chat(wire: RawHttpClient, session: str, **body: Any) -> None:
    """One whole turn on this very connection."""
    wire.chat(session, **body)
    assert wire.head() == 200
    wire.body()


def freeze(gateway: Gateway, session: str) -> httpx.Response:
    """Freeze a session over a connection that is new: that of `gateway.http` may lead to a worker that is gone."""
    with RawHttpClient(gateway.url) as wire:
        return ask(wire, "POST", "/admin/windows", session_id=session, window_name=f"w-{session}")


class Held:
    """A streamed reply that goes on until it is let go."""

    def __init__(self, engine: FakeEngine) -> None:
        self.go_on = threading.Event()
        engine.on_chat = self._answer

    def _answer(self, exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(role="assistant", content="held"))
        assert self.go_on.wait(3 * WITHIN)
        exchange.chunk(DONE)
        exchange.end()


def begin_stream(wire: RawHttpClient, session: str) -> None:
    """Send a turn and read the beginning of its reply."""
    wire.chat(session, stream=True)
    assert wire.head() == 200
    wire.chunk()


# --- the work is shared


def test_connections_are_spread_evenly_over_the_workers(gateway: Gateway) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(90)]
        served = [pid_of(wire) for wire in wires]
    assert set(served) == workers_of(gateway.process.pid)
    assert min(served.count(pid) for pid in set(served)) >= 10  # evenly would be 30


def test_one_worker_is_this_process_and_forks_nobody(shared_gateway: Gateway) -> None:
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


# --- turns of other workers


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
        held.go_on.set()
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
        held.go_on.set()
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
    assert gateway.freeze(session, name).status_code == 201  # by the store alone nothing of the lineage is going on
    held = Held(engine)
    with two_workers(gateway) as (one, other):
        begin_stream(one, session)
        warnings = ask(other, "DELETE", f"/admin/windows/{name}").json()["warnings"]
        assert any("still active" in warning for warning in warnings)
        held.go_on.set()
        one.chunks()


# --- conversations without an id, when each request comes to another worker


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


def test_a_conversation_goes_on_in_another_worker_right_after_its_reply(gateway: Gateway, session: str) -> None:
    with two_workers(gateway) as wires:
        for number in range(10):
            history = answered(f"{session} {number}")
            first = say(wires[number % 2], history[:1])
            for turn in range(3):
                wire = wires[(number + turn + 1) % 2]
                assert say(wire, [*history, question(f"and {turn}")]) == first
                history += answered(f"and {turn}")


def test_two_questions_at_once_in_two_workers_are_a_branch_and_the_same_one_is_a_retry(
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
        held.go_on.set()
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
        held.go_on.set()
        for wire in (one, other):
            wire.chunks()
        chat_again = [*main, {"role": "assistant", "content": "held"}, question("go on")]
        assert say(other, chat_again, agent, stream=True) == session
        other.chunks()


# --- deaths


def test_a_worker_that_is_killed_takes_nobody_with_it_and_comes_back(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with crew(engine, tmp_path, busy_wait_s=0.5) as gateway, two_workers(gateway) as (one, other):
        chat(one, session)
        victim, before = pid_of(one), pids(gateway)
        held = Held(engine)
        begin_stream(one, session)
        begin_stream(other, f"other-{session}")
        assert error_of(freeze(gateway, session)) == (409, "session_busy")
        os.kill(victim, signal.SIGKILL)
        assert one.rest() == b""
        # Its lock went with it: the session is as it was before that turn.
        assert freeze(gateway, session).status_code == 201
        held.go_on.set()
        assert other.chunks() == [DONE]
        eventually(lambda: len(pids(gateway) - {victim}) == COUNT, "another takes its place")
        assert len(before & pids(gateway)) == COUNT - 1
        assert f"worker {victim}: killed by SIGKILL" in gateway.log
        (turn,) = ask(other, "GET", f"/admin/sessions/other-{session}").json()["turns"]
        assert turn["outcome"] == "completed"


def test_a_worker_that_cannot_start_again_is_tried_later_each_time_while_the_others_serve(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with crew(engine, tmp_path) as gateway:
        secret = gateway.data_dir / "secret"
        kept = secret.read_bytes()
        secret.write_bytes(b"short")
        victim = min(workers_of(gateway.process.pid))
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: gateway.log.count("a secret has at least 32; another starts in") >= 2, "it was tried twice")
        assert "killed by SIGKILL; another starts in 0 s" in gateway.log
        assert "another starts in 0.5 s" in gateway.log
        assert "another starts in 1 s" in gateway.log
        assert gateway.chat(session).status_code == 200
        eventually(lambda: workers_counted(gateway) == COUNT - 1, "the one that is dead does not count")
        secret.write_bytes(kept)
        eventually(lambda: len(pids(gateway)) == COUNT, "it has come back", within=30)


def workers_counted(gateway: Gateway) -> float:
    """How many workers there are, by the numbers of whichever is asked."""
    lines = gateway.http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("cwg_workers "))


def test_a_worker_that_hangs_is_replaced_and_the_others_are_not(engine: FakeEngine, tmp_path: Path) -> None:
    with crew(engine, tmp_path, worker_timeout_s=2) as gateway:
        before = workers_of(gateway.process.pid)
        victim = min(before)
        os.kill(victim, signal.SIGSTOP)
        eventually(lambda: not alive(victim), "it is ended", more=lambda: gateway.log)
        eventually(lambda: len(workers_of(gateway.process.pid)) == COUNT, "another takes its place")
        eventually(lambda: len(pids(gateway)) == COUNT, "and serves")
        assert before - {victim} < workers_of(gateway.process.pid)
        assert f"worker {victim} has not responded for 2 s" in gateway.log
        assert f"worker {victim}: killed by SIGKILL" in gateway.log


def test_a_worker_that_hangs_writes_down_where_if_it_still_can(engine: FakeEngine, tmp_path: Path) -> None:
    own = "tests.support.fakes.policies:SlowToMake"
    with crew(engine, tmp_path, worker_timeout_s=2, auto_freeze=True, auto_freeze_policies=own) as gateway:
        with suppress(httpx.HTTPError):  # its connection ends with it
            gateway.http.put("/admin/policies", json={"policies": [{"use": own, "seconds": 600}]})
        eventually(lambda: "killed by SIGABRT" in gateway.log, "it is ended", more=lambda: gateway.log)
        assert "fakes/policies.py" in gateway.log
        eventually(lambda: len(pids(gateway)) == COUNT, "another serves")


def test_a_parent_that_was_stopped_ends_no_worker_for_what_it_did_not_hear(engine: FakeEngine, tmp_path: Path) -> None:
    with crew(engine, tmp_path, worker_timeout_s=1) as gateway:
        before = workers_of(gateway.process.pid)
        everybody = [gateway.process.pid, *before]
        for stopped in (everybody[:1], everybody):
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            threading.Event().wait(2.5)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            eventually(lambda: pids(gateway) == before, "all of them serve")
        assert "has not responded" not in gateway.log


def test_a_worker_that_has_lived_long_is_replaced_at_once_however_often_it_died_before() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        crew = workers._Supervisor(1, sock, lambda *_: None, lambda _: None, workers.Patience())

        def waits(lived_s: float) -> bool:
            now = time.monotonic()
            crew._start_again(workers._Worker(0, 1, -1, now - lived_s), "died")
            return crew._due[0] > now + 0.1

        assert [waits(lived) for lived in (0, 0, 0, 3600, 0)] == [False, True, True, False, True]


def test_workers_that_cannot_start_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    ended = serve(engine_urls=DEAD, data_dir=tmp_path, workers=COUNT, port=0)
    assert_one_clear_line(ended, "secret", "32")


def test_a_port_that_is_in_use_is_one_clear_line_for_several_workers_too(gateway: Gateway, tmp_path: Path) -> None:
    ended = serve(port=gateway.port, engine_urls=DEAD, data_dir=tmp_path, workers=COUNT)
    assert_one_clear_line(ended, str(gateway.port), "in use")


# --- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_loses_no_turn(
    engine: FakeEngine, tmp_path: Path, session: str, number: signal.Signals
) -> None:
    with crew(engine, tmp_path) as gateway:
        children = workers_of(gateway.process.pid)
        for turn in range(30):
            with RawHttpClient(gateway.url) as wire:
                chat(wire, f"{session}-{turn % 3}")
        gateway.process.send_signal(number)
        assert gateway.process.wait(15) == 0
        assert not any(alive(pid) for pid in children)
        assert "Traceback" not in gateway.log
        gateway.start().wait()  # the port is free
        counts = [gateway.http.get(f"/admin/sessions/{session}-{n}").json()["turn_count"] for n in range(3)]
        assert counts == [10, 10, 10]


def test_a_ctrl_c_that_comes_to_all_is_no_second_one(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    held = Held(engine)
    with crew(engine, tmp_path) as gateway, RawHttpClient(gateway.url) as wire:
        begin_stream(wire, session)
        for pid in {gateway.process.pid, *workers_of(gateway.process.pid)}:
            os.kill(pid, signal.SIGINT)
        eventually(lambda: not accepts(gateway), "no new connection is taken")
        held.go_on.set()
        assert wire.chunks() == [DONE]
        assert gateway.process.wait(15) == 0


def test_a_second_ctrl_c_ends_at_once(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    held = Held(engine)
    with crew(engine, tmp_path) as gateway, RawHttpClient(gateway.url) as wire:
        children = workers_of(gateway.process.pid)
        begin_stream(wire, session)
        gateway.process.send_signal(signal.SIGINT)
        eventually(lambda: not accepts(gateway), "no new connection is taken")
        gateway.process.send_signal(signal.SIGINT)
        gateway.process.wait(WITHIN)
        assert "killed by SIGKILL" in gateway.log  # after ten seconds they would have ended by themselves
        assert not any(alive(pid) for pid in children)
        held.go_on.set()


def test_workers_end_with_a_parent_that_is_killed(engine: FakeEngine, tmp_path: Path) -> None:
    with crew(engine, tmp_path) as gateway:
        children = workers_of(gateway.process.pid)
        gateway.process.kill()
        gateway.process.wait()
        eventually(lambda: not any(alive(pid) for pid in children), "no worker is left")
        gateway.start().wait()


def accepts(gateway: Gateway) -> bool:
    """Whether anybody listens."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", gateway.port)) == 0


def test_no_connection_waits_for_a_worker_that_does_not_serve_yet() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as first, server.listen_beside(first), ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(first.getsockname(), timeout=WITHIN))
        first.settimeout(WITHIN)
        for _ in range(40):
            stack.enter_context(first.accept()[0])  # all of them came here

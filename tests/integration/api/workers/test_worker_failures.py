"""Workers that die, hang, or cannot start, and how all of them end."""

import os
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from gateway.api import server, workers
from tests.integration.api.test_server import DEAD, assert_one_clear_line, serve
from tests.support.admin_requests import error_of
from tests.support.fakes.engine import DONE, WITHIN, FakeEngine
from tests.support.gateway_process import Gateway, eventually
from tests.support.raw_http import RawHttpClient
from tests.support.worker_crew import (
    COUNT,
    Held,
    alive,
    ask,
    begin_stream,
    chat,
    crew,
    pid_of,
    pids,
    two_workers,
    workers_of,
)


def freeze(gateway: Gateway, session: str) -> httpx.Response:
    """Freeze a session over a connection that is new: that of `gateway.http` may lead to a worker that is gone."""
    with RawHttpClient(gateway.url) as wire:
        return ask(wire, "POST", "/admin/windows", session_id=session, window_name=f"w-{session}")


def test_a_killed_worker_harms_no_other_and_is_replaced(engine: FakeEngine, tmp_path: Path, session: str) -> None:
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
        held.release.set()
        assert other.chunks() == [DONE]
        eventually(lambda: len(pids(gateway) - {victim}) == COUNT, "another takes its place")
        assert len(before & pids(gateway)) == COUNT - 1
        assert f"worker {victim}: killed by SIGKILL" in gateway.log
        (turn,) = ask(other, "GET", f"/admin/sessions/other-{session}").json()["turns"]
        assert turn["outcome"] == "completed"


def test_a_worker_that_cannot_restart_is_retried_with_backoff(engine: FakeEngine, tmp_path: Path, session: str) -> None:
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


def test_a_hanging_worker_logs_its_stack_if_it_still_can(engine: FakeEngine, tmp_path: Path) -> None:
    own = "tests.support.fakes.policies:SlowToMake"
    with crew(engine, tmp_path, worker_timeout_s=2, auto_freeze=True, auto_freeze_policies=own) as gateway:
        with suppress(httpx.HTTPError):  # its connection ends with it
            gateway.http.put("/admin/policies", json={"policies": [{"use": own, "seconds": 600}]})
        eventually(lambda: "killed by SIGABRT" in gateway.log, "it is ended", more=lambda: gateway.log)
        assert "fakes/policies.py" in gateway.log
        eventually(lambda: len(pids(gateway)) == COUNT, "another serves")


def test_a_suspended_parent_does_not_blame_its_workers(engine: FakeEngine, tmp_path: Path) -> None:
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


def test_a_long_lived_worker_is_replaced_at_once_whatever_happened_before() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        crew = workers.Supervisor(1, sock, lambda *_: None, lambda _: None)

        def waits(lived_s: float) -> bool:
            now = time.monotonic()
            crew._restart(workers._Worker(0, 1, -1, now - lived_s), "died")
            return crew._due[0] > now + 0.1

        assert [waits(lived) for lived in (0, 0, 0, 3600, 0)] == [False, True, True, False, True]


def test_workers_that_cannot_start_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    ended = serve(engine_urls=DEAD, data_dir=tmp_path, workers=COUNT, port=0)
    assert_one_clear_line(ended, "secret", "32")


def test_a_port_that_is_in_use_is_one_clear_line_for_several_workers_too(gateway: Gateway, tmp_path: Path) -> None:
    ended = serve(port=gateway.port, engine_urls=DEAD, data_dir=tmp_path, workers=COUNT)
    assert_one_clear_line(ended, str(gateway.port), "in use")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_workers_and_every_turn_is_recorded(
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


def test_one_ctrl_c_that_reaches_every_process_counts_once(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    held = Held(engine)
    with crew(engine, tmp_path) as gateway, RawHttpClient(gateway.url) as wire:
        begin_stream(wire, session)
        for pid in {gateway.process.pid, *workers_of(gateway.process.pid)}:
            os.kill(pid, signal.SIGINT)
        eventually(lambda: not accepts(gateway), "no new connection is taken")
        held.release.set()
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
        held.release.set()


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
    with socket.create_server(("127.0.0.1", 0), backlog=64) as first, server.listen_again(first), ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(first.getsockname(), timeout=WITHIN))
        first.settimeout(WITHIN)
        for _ in range(40):
            stack.enter_context(first.accept()[0])  # all of them came here

"""`cwg demo` where it cannot show anything, and where the user has had enough."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from gateway.records import AUTO_TAG
from gateway.stack import cleanup, lock
from tests.support.cli import assert_failed, cwg
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.gateway_process import ROOT, Gateway, environment, eventually, gateway_in_front_of


@pytest.fixture
def with_cache(engine: FakeEngine, tmp_path: Path) -> Iterator[Gateway]:
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    settings = {
        "cache_url": cache.url,
        "kv_dir": tmp_path / "kv",
        "chunk_size": CHUNK,
        "busy_wait_s": 0.5,
        "freeze_timeout_s": 1,
    }
    with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway:
        yield gateway
    cache.stop()


def test_without_a_cache_it_says_so_and_asks_the_engine_nothing(engine: FakeEngine, gateway: Gateway) -> None:
    before = len(engine.requests)
    assert_failed(cwg("demo", url=gateway.url), "no cache is configured, so a freeze keeps only text")
    assert not [request for request in engine.requests[before:] if request.method == "POST"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_of_its_own(
    how: signal.Signals, engine: FakeEngine, with_cache: Gateway
) -> None:
    def hang(exchange: Exchange) -> None:
        exchange.begin()
        exchange.gone()

    engine.on_chat = hang
    with running_demo(with_cache) as demo:
        eventually(
            lambda: any(request.path.endswith("/chat/completions") for request in engine.requests), "a first turn"
        )
        demo.send_signal(how)
        out, err = demo.communicate(timeout=60)
    assert (demo.returncode, out) == (1, "")
    assert "removing what the demo has made" in err
    assert "Traceback" not in err
    assert with_cache.http.get("/admin/sessions").json()["total"] == 0
    assert with_cache.http.get("/admin/windows").json()["total"] == 0


def test_what_others_froze_from_its_sessions_stays(engine: FakeEngine, with_cache: Gateway) -> None:
    frozen: list[str] = []

    def answer_the_first_conversation(exchange: Exchange) -> None:
        if b"ship Marigold" not in exchange.request.body:
            engine.answer_chat(exchange)
            return
        with httpx.Client(base_url=with_cache.url, timeout=60) as http:
            (session,) = {window["session_id"] for window in http.get("/admin/windows").json()["windows"]}
            for name, tag in (("kept", "mine"), ("automatic", AUTO_TAG)):
                body = {"session_id": session, "window_name": name, "tags": [tag]}
                frozen.append(http.post("/admin/windows", json=body).json()["name"])
        exchange.begin()
        exchange.gone()

    engine.on_chat = answer_the_first_conversation
    with running_demo(with_cache) as demo:
        eventually(lambda: len(frozen) == 2, "windows of others", 60)
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=60)
    assert [window["name"] for window in with_cache.http.get("/admin/windows").json()["windows"]] == ["kept"]


def test_a_freeze_that_goes_on_after_the_interrupt_leaves_no_window(engine: FakeEngine, with_cache: Gateway) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def wait(exchange: Exchange) -> None:
        if exchange.request.json.get("add_generation_prompt") is False:  # a freeze: the text with the last reply
            asked.set()
            goes_on.wait(60)
        engine._tokens(exchange)

    engine.on_tokenize = wait
    with running_demo(with_cache) as demo:
        assert asked.wait(60)
        demo.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            demo.wait(3)  # it may well wait for the freeze
        goes_on.set()
        demo.communicate(timeout=60)
    assert demo.returncode == 1
    eventually(lambda: 'verb="freeze"' in with_cache.http.get("/metrics").text, "the freeze has ended")
    assert with_cache.http.get("/admin/windows").json()["windows"] == []
    assert with_cache.http.get("/admin/sessions").json()["sessions"] == []


def test_a_demo_whose_gateway_dies_says_what_may_be_left(engine: FakeEngine, with_cache: Gateway) -> None:
    engine.on_chat = lambda _exchange: with_cache.process.kill()
    with running_demo(with_cache) as demo:
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert re.search(
        r"no gateway answers .*may be left; `cwg session delete demo-[0-9a-f]{8}-short` removes it$", warning
    )
    assert "Traceback" not in err


def test_an_interrupt_during_the_restart_leaves_nothing(with_cache: Gateway, tmp_path: Path) -> None:
    asked = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    (tmp_path / "run").mkdir()
    ledger = cleanup.Ledger(tmp_path / "run" / "gateway.json")
    try:
        with subprocess.Popen(["sleep", "600"], start_new_session=True) as old, lock.holding(tmp_path, with_cache.port):
            ledger.write(old.pid, tmp_path / "temporary", owns_segments=False)
            with running_demo(with_cache, "--restart", "--data-dir", str(tmp_path)) as demo:
                assert demo.stderr
                eventually(asked.is_set, "the restart is asked for", 60)
                with_cache.stop()
                demo.send_signal(signal.SIGINT)
                said = [*takewhile(lambda line: "removing" not in line, demo.stderr)]
                with_cache.start().wait()
                assert (demo.wait(60), "warning" in demo.stderr.read(), "Traceback" in "".join(said)) == (
                    1,
                    False,
                    False,
                )
            old.kill()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert with_cache.http.get("/admin/windows").json()["windows"] == []
    assert with_cache.http.get("/admin/sessions").json()["sessions"] == []


def running_demo(gateway: Gateway, *options: str) -> "subprocess.Popen[str]":
    """`cwg demo` in a process of its own."""
    argv, given = [sys.executable, "-m", "gateway", "demo", *options], environment({"CWG_URL": gateway.url})
    return subprocess.Popen(argv, env=given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

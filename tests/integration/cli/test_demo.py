"""`cwg demo` where it cannot show anything, and where the user has had enough."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.stack import lock
from tests.support.cli import assert_failed, cwg
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.gateway_process import ROOT, Gateway, environment, eventually, gateway_in_front_of


@pytest.fixture
def with_cache(engine: FakeEngine, tmp_path: Path) -> Iterator[Gateway]:
    cache = FakeLMCache(tmp_path / "kv").start()
    settings = {"cache_url": cache.url, "kv_dir": tmp_path / "kv", "chunk_size": CHUNK, "busy_wait_s": 0.5}
    with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway:
        yield gateway
    cache.stop()


def test_without_a_cache_it_says_so_and_asks_the_engine_nothing(engine: FakeEngine, gateway: Gateway) -> None:
    before = len(engine.requests)
    assert_failed(cwg("demo", url=gateway.url), "no cache is configured, so a freeze keeps only text")
    assert not [request for request in engine.requests[before:] if request.method == "POST"]


def test_a_restart_needs_a_stack_of_cwg_up(gateway: Gateway, tmp_path: Path) -> None:
    command = ("demo", "--restart", "--data-dir", str(tmp_path))
    assert_failed(cwg(*command, url=gateway.url), f"no stack runs on {tmp_path}; name the --data-dir of a `cwg up`")
    with lock.holding(tmp_path, gateway.port + 1):
        assert_failed(
            cwg(*command, url=gateway.url), f"listens on port {gateway.port + 1}, and CWG_URL is {gateway.url}"
        )


def test_an_interrupted_demo_leaves_nothing(engine: FakeEngine, with_cache: Gateway) -> None:
    def hang(exchange: Exchange) -> None:
        exchange.begin()
        exchange.gone()

    engine.on_chat = hang
    argv = [sys.executable, "-m", "gateway", "demo"]
    given = environment({"CWG_URL": with_cache.url})
    with subprocess.Popen(argv, env=given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        eventually(
            lambda: any(request.path.endswith("/chat/completions") for request in engine.requests), "a first turn"
        )
        os.kill(demo.pid, signal.SIGINT)
        out, err = demo.communicate(timeout=60)
    assert (demo.returncode, out) == (1, "")
    assert "removing what the demo has made" in err
    assert "Traceback" not in err
    assert with_cache.http.get("/admin/sessions").json()["total"] == 0
    assert with_cache.http.get("/admin/windows").json()["total"] == 0

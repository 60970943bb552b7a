"""Requests that an abort during a KV load may crash are aborted when their reply begins, or after the grace."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from gateway.engines.client import HttpEngineClient
from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

EXPOSED = 'vllm:lmcache_mp_lookup_duration_seconds_count{engine="0"} 0.0\n'
PATCHED = EXPOSED + 'vllm:lmcache_mp_abort_safe{engine="0"} 1.0\n'
NEVER = 60.0  # seconds: longer than any test waits
_OPEN_S = 0.1  # that a connection is looked at to see that it is not closed


class Left:
    """An engine with a turn whose client disconnects: what it does then, and whether the connection was closed."""

    def __init__(self, engine: FakeEngine, gateway: Gateway, then: Callable[[Exchange], None] | None = None) -> None:
        self._engine = engine
        self._gateway = gateway
        self._then = then
        self._known = threading.Event()  # the gateway has seen the client leave
        self._closed = threading.Event()
        self.was_open = False
        engine.on_chat = engine.on_other = self._answer

    def _answer(self, exchange: Exchange) -> None:
        if exchange.request.json.get("stream"):
            exchange.begin()
        assert self._known.wait(WITHIN)
        self.was_open = not exchange.gone(_OPEN_S)
        if self._then:
            self._then(exchange)
        if exchange.gone():
            self._closed.set()

    def leave(self, session: str, *, stream: bool = True) -> bool:
        """Send a turn and disconnect; return whether the engine's connection was closed."""
        with RawHttpClient(self._gateway.url) as wire:
            wire.chat(session, stream=stream)
            self._engine.wait_seen("/v1/chat/completions")
        assert self._gateway.turns(session)[0]["outcome"] == "client_gone"
        self._known.set()
        return self._closed.wait(WITHIN)

    def leave_batch(self) -> bool:
        """The same with a request that is no turn; nothing is recorded of it."""
        body = {"model": MODEL, "messages": [[{"role": "user", "content": "hi"}]]}
        with RawHttpClient(self._gateway.url) as wire:
            wire.post("/v1/chat/completions/batch", json.dumps(body).encode(), "content-type: application/json")
            self._engine.wait_seen("/v1/chat/completions/batch")
        self._known.set()
        return self._closed.wait(WITHIN)


def before(
    engine: FakeEngine, folder: Path, metrics: str = EXPOSED, grace_s: float = NEVER
) -> AbstractContextManager[Gateway]:
    engine.metrics = metrics
    return gateway_in_front_of(engine.url, folder, abort_grace_s=grace_s)


def begin(exchange: Exchange) -> None:
    exchange.chunk(delta(content="x"))


def say_nothing_yet(exchange: Exchange) -> None:
    exchange.chunk(b": keep-alive\n\n")
    assert not exchange.gone(_OPEN_S)
    exchange.chunk(b"event: response.created\ndata: {}\n\n")
    assert not exchange.gone(_OPEN_S)
    begin(exchange)


@pytest.mark.parametrize(
    ("stream", "then"),
    [
        pytest.param(True, begin, id="a stream"),
        pytest.param(True, say_nothing_yet, id="a stream whose first events tell of no token"),
        pytest.param(False, lambda exchange: exchange.json({}), id="an answer in one piece"),
    ],
)
def test_request_is_aborted_when_its_reply_begins(
    engine: FakeEngine, tmp_path: Path, session: str, stream: bool, then: Callable[[Exchange], None]
) -> None:
    with before(engine, tmp_path) as gateway:
        left = Left(engine, gateway, then)
        assert left.leave(session, stream=stream), "the connection stayed open though the reply had begun"
        assert left.was_open


def test_request_that_is_no_turn_has_its_grace_too(engine: FakeEngine, tmp_path: Path) -> None:
    with before(engine, tmp_path) as gateway:
        left = Left(engine, gateway, lambda exchange: exchange.json({}))
        assert left.leave_batch()
        assert left.was_open


def test_request_is_aborted_after_the_grace(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with before(engine, tmp_path, grace_s=1.0) as gateway:
        left = Left(engine, gateway)
        assert left.leave(session)


@pytest.mark.parametrize("metrics", [PATCHED, "vllm:other 1\n"], ids=["patched", "loads nothing"])
def test_request_is_aborted_at_once_if_that_is_safe(
    engine: FakeEngine, tmp_path: Path, session: str, metrics: str
) -> None:
    with before(engine, tmp_path, metrics) as gateway:
        assert Left(engine, gateway).leave(session)


@pytest.mark.parametrize(
    ("metrics", "seen"),
    [
        pytest.param(EXPOSED, ["warning"], id="exposed"),
        pytest.param(PATCHED, ["ok"], id="patched"),
        pytest.param(PATCHED.replace(" 1.0", " 0.0"), ["warning"], id="a mend that is off"),
        pytest.param("vllm:other 1\n", [], id="loads nothing"),
        pytest.param("", [], id="not to be seen"),
    ],
)
def test_doctor_reports_whether_aborts_are_safe(
    engine: FakeEngine, tmp_path: Path, metrics: str, seen: list[str]
) -> None:
    engine.on_other = lambda exchange: exchange.json({"version": "0.32.0"})
    with before(engine, tmp_path, metrics) as gateway:
        checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
        told = [check for check in checks if check["name"] == "aborts"]
        assert [check["status"] for check in told] == seen
        for check in told:
            assert check["status"] == "ok" or "vLLM 0.32.0" in check["message"]
        assert ("self-test: aborts" in gateway.log) == (seen == ["warning"])


def test_shutdown_waits_for_abandoned_requests(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    ended = threading.Event()

    def end(exchange: Exchange) -> None:
        gateway.process.terminate()
        assert not exchange.gone(_OPEN_S)
        begin(exchange)
        ended.set()

    with before(engine, tmp_path) as gateway:
        assert Left(engine, gateway, end).leave(session)
        assert ended.is_set()
        assert gateway.process.wait(WITHIN) == 0


@pytest.mark.anyio
async def test_cancelled_own_request_still_gets_its_response(engine: FakeEngine) -> None:
    asked, cancelled = threading.Event(), threading.Event()
    was_open = []

    def answer(exchange: Exchange) -> None:
        asked.set()
        assert cancelled.wait(WITHIN)
        was_open.append(not exchange.gone(_OPEN_S))
        engine.answer_completion(exchange)

    engine.on_completion, engine.metrics = answer, EXPOSED
    async with HttpEngineClient(
        engine.url, api_key="", fingerprint="", connect_timeout_s=5, timeout_s=WITHIN, abort_grace_s=NEVER
    ) as client:
        await client.check()
        assert client.abort_risk == "exposed"
        task = asyncio.create_task(client.prefill("demo", [1, 2, 3], "salt"))
        assert await asyncio.to_thread(asked.wait, WITHIN)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        cancelled.set()
    assert was_open == [True]

"""Clients that take nothing, and more clients than there is room for: each has an end, and none stops the others."""

import json
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.fakes.engine import DONE, WITHIN, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

_SMALL = 4096  # bytes of a receive buffer: what is sent soon waits in the gateway


class Endless:
    """Streams that end when their reader disconnects; how many did."""

    def __init__(self, engine: FakeEngine) -> None:
        self.gone = threading.Semaphore(0)
        engine.on_chat = self._answer

    def _answer(self, exchange: Exchange) -> None:
        exchange.over = True
        exchange.begin()
        with suppress(OSError):
            while True:
                exchange.chunk(delta(content="x" * 10_000))
        self.gone.release()


@contextmanager
def deaf(gateway: Gateway, session: str) -> Iterator[RawHttpClient]:
    """A client that asks for a stream and reads none of it."""
    with RawHttpClient(gateway.url, receive_buffer=_SMALL) as wire:
        wire.chat(session, stream=True)
        yield wire


def test_clients_that_read_nothing_do_not_fill_the_turn_queue(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path, turn_queue=2) as gateway, ExitStack() as stack:
        Endless(engine)
        for number in range(4):
            stack.enter_context(deaf(gateway, f"{session}-{number}"))
        engine.wait_seen("/v1/chat/completions", 4)
        engine.on_chat = engine.answer_chat
        assert gateway.chat(session).status_code == 200


def test_a_client_that_takes_nothing_is_disconnected_and_the_engine_with_it(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, client_timeout_s=1) as gateway:
        endless = Endless(engine)
        with deaf(gateway, session):
            assert endless.gone.acquire(timeout=WITHIN), gateway.log
            (turn,) = gateway.turns(session)
        assert turn["outcome"] == "client_gone"


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    whole = [delta(content="x" * 100_000)] * 100 + [DONE]

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for chunk in whole:
            exchange.chunk(chunk)
        exchange.end()

    with gateway_in_front_of(engine.url, tmp_path, client_timeout_s=0.5) as gateway:
        engine.on_chat = answer
        with deaf(gateway, session) as wire:
            assert wire.head() == 200
            taken = []
            for _ in range(len(whole)):
                taken.append(wire.chunk())
                threading.Event().wait(0.02)  # two seconds in all, several times as long as it may take nothing
        assert taken == whole


# --- more connections than may be


def begin(wire: RawHttpClient, session: str) -> None:
    """Ask for a stream and read its beginning."""
    wire.chat(session, stream=True)
    assert wire.head() == 200
    wire.chunk()


def hold(engine: FakeEngine) -> threading.Event:
    """Have the engine begin every stream, and end it when told."""
    release = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="held"))
        release.wait(WITHIN)
        exchange.chunk(DONE)
        exchange.end()

    engine.on_chat = answer
    return release


def test_a_client_beyond_the_limit_is_refused_and_later_served(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, max_connections=3) as gateway, ExitStack() as stack:
        release = hold(engine)
        busy = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(3)]
        for number, wire in enumerate(busy):
            begin(wire, f"{session}-{number}")
        with RawHttpClient(gateway.url) as refused:
            refused.chat(session)
            assert refused.head() == 503
            assert refused.headers["retry-after"] == "1"
            error = refused.json()["error"]
            assert (error["code"], error["retryable"]) == ("rate_limited", True)
            assert "max_connections" in error["hint"]
        release.set()
        for wire in busy:
            assert wire.chunks() == [DONE]
        assert gateway.chat(session).status_code == 200


@contextmanager
def full(engine: FakeEngine, folder: Path, session: str) -> Iterator[Gateway]:
    """A gateway that answers as many clients as it may."""
    with gateway_in_front_of(engine.url, folder, max_connections=3) as gateway, ExitStack() as stack:
        release = hold(engine)
        busy = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(3)]
        for number, wire in enumerate(busy):
            begin(wire, f"{session}-{number}")
        yield gateway
        release.set()
        for wire in busy:
            assert wire.chunks() == [DONE]
        assert gateway.chat(session).status_code == 200


def probe(gateway: Gateway, path: str) -> int:
    """The status that a probe gets on a new connection, which is then closed."""
    with RawHttpClient(gateway.url) as wire:
        wire.send(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
        status = wire.head()
        assert wire.json()
        assert wire.rest() == b""
        return status


def test_a_gateway_that_is_full_answers_probes(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with full(engine, tmp_path, session) as gateway:
        for _ in range(50):
            assert (probe(gateway, "/healthz"), probe(gateway, "/readyz"), probe(gateway, "/v1/models")) == (
                200, 200, 503
            )  # fmt: skip


def test_connections_that_ask_nothing_do_not_keep_probes_out(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with full(engine, tmp_path, session) as gateway, ExitStack() as stack:
        silent = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(100)]
        assert probe(gateway, "/healthz") == 200
        for wire in silent:
            assert wire.head() == 503
        assert gateway.log.count("clients were refused") == 1


@pytest.mark.parametrize("filler", [0, 20_000], ids=["small", "large"])
def test_each_of_a_burst_of_clients_beyond_the_limit_reads_why_it_is_refused(
    engine: FakeEngine, tmp_path: Path, session: str, filler: int
) -> None:
    with full(engine, tmp_path, session) as gateway, ExitStack() as stack:
        os.kill(gateway.process.pid, signal.SIGSTOP)  # so that all of them come at once
        try:
            burst = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(200)]
            for wire in burst:
                wire.chat(session, filler="x" * filler)
        finally:
            os.kill(gateway.process.pid, signal.SIGCONT)
        assert [wire.head() for wire in burst] == [503] * 200
        assert {wire.json()["error"]["code"] for wire in burst} == {"rate_limited"}
        assert probe(gateway, "/healthz") == 200


def test_connections_without_a_request_make_room_for_new_ones(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path, max_connections=3) as gateway, ExitStack() as stack:
        release = hold(engine)
        busy = stack.enter_context(RawHttpClient(gateway.url))
        begin(busy, session)
        idle = [stack.enter_context(RawHttpClient(gateway.url)) for _ in range(20)]
        assert all(wire.rest() == b"" for wire in idle[:17])
        idle[-1].send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle[-1].head() == 200
        release.set()
        assert busy.chunks() == [DONE]


# --- open files


@contextmanager
def limited(engine: FakeEngine, folder: Path, soft: int, hard: int) -> Iterator[Gateway]:
    """A gateway with a limit on open files."""
    gateway = Gateway(folder, engine.url)
    gateway.limit_files = soft, hard
    try:
        yield gateway.start().wait()
    finally:
        gateway.close()


def test_the_limit_on_open_files_is_raised(engine: FakeEngine, tmp_path: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with limited(engine, tmp_path, 256, most) as gateway:
        assert resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE) == (most, most)


def test_few_open_files_are_logged_and_idle_clients_shut_no_one_out(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with limited(engine, tmp_path, 200, 200) as gateway, ExitStack() as stack:
        assert "only 200 files may be open: 20 clients at once" in gateway.log
        for _ in range(300):
            stack.enter_context(RawHttpClient(gateway.url))
        with RawHttpClient(gateway.url) as wire:
            wire.chat(session)
            assert wire.head() == 200
        assert "too many open files" not in gateway.log


def test_running_out_of_files_is_not_blamed_on_the_engine(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway, RawHttpClient(gateway.url) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.head() == 200
        wire.body()
        engine.drop_connections()  # or else a kept one would do
        _, hard = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (1, hard))
        for number in range(5):
            wire.chat(f"{session}-{number}")
            assert wire.head() == 429
            assert wire.json()["error"]["code"] == "rate_limited"
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert [turn["outcome"] for turn in gateway.turns(f"{session}-0")] == ["gateway_error"]
        wire.chat(session)
        assert wire.head() == 200
        wire.body()
        wire.send(b"GET /admin/health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.head() == 200
        (member,) = wire.json()["components"]["engine"]["engines"]
        assert (member["state"], member["failures"]) == ("healthy", 0)
        assert gateway.log.count("too many open files") <= 2  # of the relay, and of the gateway's own questions
        eventually(lambda: gateway.http.get("/readyz").status_code == 200, "ready", more=lambda: json.dumps(member))

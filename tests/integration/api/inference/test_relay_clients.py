"""The relay's clients: those that leave, those that read slowly, and many at once."""

import threading
from typing import Any

from tests.support.fakes import engine as fake
from tests.support.fakes.engine import DONE, Exchange, FakeEngine, delta, event, stream_of
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.raw_http import RawHttpClient, reset_on_close
from tests.support.relay_answers import USAGE, answer_with


def test_a_client_that_leaves_before_the_first_byte_aborts_the_engine(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        if exchange.gone():
            aborted.set()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        engine.wait_seen("/v1/chat/completions")
        wire.close()
        assert aborted.wait(1), "the engine still sees the connection a second later"
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "client_gone"


def test_a_client_that_leaves_in_mid_stream_aborts_the_engine(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="Hel"))
        if exchange.gone():
            aborted.set()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        wire.chunk()
        wire.close()
        assert aborted.wait(1), "the engine still sees the connection a second later"
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["client_gone"]


def test_a_half_closed_client_counts_as_disconnected(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        if exchange.gone():
            aborted.set()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session)
        engine.wait_seen("/v1/chat/completions")
        wire.end()
        assert wire.rest() == b""
    assert aborted.wait(fake.WITHIN)
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["client_gone"]


def test_a_disconnected_client_is_recorded_once_while_the_engine_still_sends(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        try:
            while True:
                exchange.chunk(delta(content="x" * 1000))
        except OSError:
            aborted.set()
            raise

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        wire.chunk()
        wire.close()
    assert aborted.wait(2)
    engine.on_chat = engine.answer_chat
    gateway.chat(session)
    assert [turn["outcome"] for turn in gateway.turns(session, 2)] == ["completed", "client_gone"]


def test_a_slow_client_holds_the_engine_back_and_costs_no_memory(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    total, piece = 200 * 2**20, event({"choices": [{"index": 0, "delta": {"content": "x" * 65_000}}]})
    sent = 0
    stalled = threading.Event()

    def answer(exchange: Exchange) -> None:
        nonlocal sent
        exchange.begin()
        exchange._sock.settimeout(1.0)
        while sent < total:
            try:
                exchange.chunk(piece)
            except TimeoutError:
                stalled.set()  # a part of the chunk is out, so this stream is over
                exchange.over = True
                return
            sent += len(piece)

    engine.on_chat = answer
    before = gateway.memory
    with RawHttpClient(gateway.url, receive_buffer=16 * 1024) as wire:
        wire.chat(session, stream=True)
        wire.head()
        wire.chunk()
        assert stalled.wait(fake.WITHIN), "the engine could write 200 MB to a client that did not read"
        assert sent < 32 * 2**20
        assert gateway.memory - before < 48 * 2**20


def test_a_reply_larger_than_the_limit_passes_whole_and_is_not_kept(
    engine: FakeEngine, tmp_path: Any, session: str
) -> None:
    words = ["x" * 1000] * 300
    engine.on_chat = answer_with(*stream_of(words, USAGE))
    with gateway_in_front_of(engine.url, tmp_path, max_reply_bytes=100_000) as gateway:
        response = gateway.chat(session, stream=True)
        assert response.content == b"".join(stream_of(words))
        (turn,) = gateway.turns(session)
        assert (turn["outcome"], "max_reply_bytes" in turn["detail"]) == ("completed", True)


def test_200_mb_pass_through_without_being_held_in_memory(engine: FakeEngine, tmp_path: Any, session: str) -> None:
    piece = delta(content="x" * 60_000)
    engine.on_chat = answer_with(*[piece] * 3500, DONE)
    with gateway_in_front_of(engine.url, tmp_path, max_reply_bytes=2**20) as gateway:
        gateway.chat(session, stream=False)  # what the first request allocates is not counted
        before, got, peak = gateway.memory, 0, 0
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with gateway.http.stream("POST", f"/s/{session}/v1/chat/completions", json=body) as response:
            for chunk in response.iter_raw():
                got += len(chunk)
                peak = max(peak, gateway.memory)
        assert got == len(piece) * 3500 + len(DONE) > 200 * 2**20
        assert peak - before < 64 * 2**20


def test_headers_of_the_connection_stay_on_their_side(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    hops = {"te": "trailers", "proxy-authorization": "x", "connection": "close, x-private", "x-private": "secret"}
    gateway.chat(session, headers={**hops, "x-kept": "yes"})
    (request,) = engine.seen("/v1/chat/completions")
    names = {name for name, _ in request.headers}
    assert not names & {"te", "proxy-authorization", "connection", "x-private", "accept-encoding", "x-session-id"}
    assert request.header("x-kept") == ["yes"]
    assert request.header("content-length") == [str(len(request.body))]


def test_many_requests_in_turn_are_each_recorded_once(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    for _ in range(200):
        assert gateway.chat(session).status_code == 200
    assert gateway.freeze(session, f"w-{session}").status_code == 201  # it waits until nothing is in flight
    assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == 200


def test_many_requests_at_once_are_each_recorded_once(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    start = threading.Barrier(200)
    statuses: list[int] = []

    def client() -> None:
        with RawHttpClient(gateway.url) as wire:
            start.wait()
            wire.chat(session, stream=True)
            statuses.append(wire.head())
            wire.chunks()

    threads = [threading.Thread(target=client) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert statuses == [200] * 200
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == 200


def test_clients_that_leave_at_every_moment_leave_nothing_in_flight(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    for step in range(40):
        with RawHttpClient(gateway.url) as wire:
            wire.chat(session, stream=True)
            if step % 4 > 0:
                wire.head()
            for _ in range(step % 4 - 1):
                wire.chunk()
            if step % 8 > 3:  # an abortive close: RST in place of FIN
                reset_on_close(wire._sock)
    gateway.chat(session)
    eventually(lambda: gateway.freeze(session, f"w-{session}").status_code in (201, 409), "a freeze between turns")
    assert gateway.http.get(f"/admin/windows/w-{session}").status_code == 200

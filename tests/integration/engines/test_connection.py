"""Connections to the engine: reused, replaced when stale, timed out, never mixed up."""

import json
import threading
import time
from pathlib import Path

import pytest

from tests.support.fakes import engine as fake
from tests.support.fakes.engine import DONE, WITHIN, Exchange, FakeEngine, delta, usage_of, whole_reply
from tests.support.gateway_process import Gateway, free_port, gateway_in_front_of, not_accepting
from tests.support.raw_http import RawHttpClient

CHAT = "/v1/chat/completions"


def test_an_engine_that_is_down_is_a_502_in_the_shape_of_openai(tmp_path: Path, session: str) -> None:
    gateway = Gateway(tmp_path, f"http://127.0.0.1:{free_port()}")
    try:
        gateway.start().wait("/healthz")
        for _ in range(2):  # asked for the model and not asked again
            clock = time.monotonic()
            response = gateway.chat(session)
            assert time.monotonic() - clock < 5
            assert response.status_code == 502
            error = response.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("server_error", "engine_unreachable", None)
            assert "engine_urls" in error["message"]
        ready = gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["waiting_for"]) == (503, "engine")
    finally:
        gateway.close()


def test_an_engine_that_goes_down_is_a_502_and_the_turn_is_recorded(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        assert gateway.chat(session).status_code == 200
        engine.stop()
        try:
            response = gateway.chat(session)
        finally:
            engine.start()
        assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_unreachable")
        assert response.headers["x-session-id"] == session
        assert [(t["outcome"], t["status"]) for t in gateway.turns(session, 2)] == [
            ("engine_error", 502),
            ("completed", 200),
        ]
        assert gateway.chat(session).status_code == 200


def test_engine_that_does_not_accept_is_a_connect_timeout(tmp_path: Path, session: str) -> None:
    with not_accepting() as url:
        gateway = Gateway(tmp_path, url, connect_timeout_s=0.5)
        try:
            gateway.start().wait("/healthz")
            clock = time.monotonic()
            for _ in range(2):
                assert gateway.chat(session).json()["error"]["code"] == "engine_unreachable"
            assert 0.4 < time.monotonic() - clock < 8
        finally:
            gateway.close()


def test_silent_engine_is_a_504_and_its_work_is_aborted(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    aborted = threading.Event()
    with gateway_in_front_of(engine.url, tmp_path, engine_timeout_s=1.0) as gateway:

        def silent(exchange: Exchange) -> None:
            if exchange.gone():
                aborted.set()

        engine.on_chat = silent
        clock = time.monotonic()
        response = gateway.chat(session)
        assert 0.9 < time.monotonic() - clock < 8
        assert (response.status_code, response.json()["error"]["code"]) == (504, "engine_timeout")
        assert "engine_timeout_s" in response.text
        assert aborted.wait(1)
        assert gateway.turns(session)[0]["status"] == 504
        assert len(engine.seen(CHAT)) == 1


def test_engine_silent_in_mid_stream_ends_in_an_error_event(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path, engine_timeout_s=1.0) as gateway:

        def answer(exchange: Exchange) -> None:
            exchange.begin()
            exchange.chunk(delta(content="Hel"))
            exchange.gone()

        engine.on_chat = answer
        with RawHttpClient(gateway.url) as wire:
            wire.chat(session, stream=True)
            wire.head()
            text = b"".join(wire.chunks())
        assert b'"code":"engine_timeout"' in text
        assert text.endswith(DONE)
        assert gateway.turns(session)[0]["outcome"] == "engine_cut"


def test_slow_steady_stream_is_not_a_timeout(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    pause = threading.Event()  # never set: a wait on it is the engine's pace
    with gateway_in_front_of(engine.url, tmp_path, engine_timeout_s=0.6) as gateway:

        def answer(exchange: Exchange) -> None:
            exchange.begin()
            for _ in range(4):
                pause.wait(0.3)
                exchange.chunk(delta(content="x"))
            exchange.chunk(DONE)
            exchange.end()

        engine.on_chat = answer
        assert gateway.chat(session, stream=True).content.count(b'"x"') == 4


def test_connections_are_kept_between_requests(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    for _ in range(5):
        gateway.chat(session)
    assert len({request.connection for request in engine.seen(CHAT)}) == 1


def test_engine_restart_between_requests_goes_unnoticed(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    for _ in range(3):
        assert gateway.chat(session).status_code == 200
        engine.stop()
        engine.start()
    assert gateway.chat(session).status_code == 200
    assert [turn["outcome"] for turn in gateway.turns(session, 4)] == ["completed"] * 4


def test_idle_connection_closed_on_request_is_replaced_once(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    (first,) = engine.seen(CHAT)

    def close_on_the_old(exchange: Exchange) -> None:
        if exchange.request.connection == first.connection:
            exchange.cut()
        else:
            engine.answer_chat(exchange)

    engine.on_chat = close_on_the_old
    assert gateway.chat(session).status_code == 200
    assert len(engine.seen(CHAT)) == 3


def test_new_connection_that_closes_unanswered_is_not_retried(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    engine.reset()
    engine.on_chat = lambda exchange: exchange.cut()
    response = gateway.chat(session)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_unreachable")
    assert len(engine.seen(CHAT)) <= 2  # the kept connection, and one new one
    assert [turn["outcome"] for turn in gateway.turns(session, 2)] == ["engine_error", "completed"]


def test_nothing_is_retried_after_the_first_byte(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    gateway.chat(session)  # so that the next request goes over a kept connection
    engine.reset()

    def answer(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")  # a head that never ends
        exchange.cut()

    engine.on_chat = answer
    assert gateway.chat(session, stream=True).status_code == 502
    assert len(engine.seen(CHAT)) == 1


def test_surplus_response_is_not_used_for_the_next_request(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    def twice(exchange: Exchange) -> None:
        answers = [json.dumps(whole_reply(text, usage_of(1, 1))).encode() for text in ("good", "evil")]
        exchange.raw(b"".join(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(a), a) for a in answers))

    engine.on_chat = twice
    for _ in range(5):
        assert b"good" in gateway.chat(session).content
    engine.on_chat = engine.answer_chat
    assert b"Hello" in gateway.chat(session).content


def test_unrequested_response_closes_the_idle_connection(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    read, closed = threading.Event(), threading.Event()

    def later(exchange: Exchange) -> None:
        engine.answer_chat(exchange)
        assert read.wait(WITHIN)
        exchange.json(whole_reply("evil", usage_of(1, 1)))
        if exchange.gone():
            closed.set()

    engine.on_chat = later
    assert b"Hello" in gateway.chat(session).content
    read.set()
    assert closed.wait(WITHIN)
    engine.on_chat = engine.answer_chat
    assert b"Hello" in gateway.chat(session).content


@pytest.mark.parametrize(
    "junk",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"\0" * 100,
        b"HTTP/9.9 999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 2**19,
    ],
    ids=["another protocol", "no length", "zeros", "no version", "a head without end"],
)
def test_an_engine_that_does_not_speak_http_is_a_502(
    engine: FakeEngine, gateway: Gateway, session: str, junk: bytes
) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.raw(junk)
        exchange.gone()

    engine.on_chat = answer
    response = gateway.chat(session)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_unreachable")


def test_interim_response_is_skipped(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
        engine.answer_chat(exchange)

    engine.on_chat = answer
    response = gateway.chat(session)
    assert response.status_code == 200
    assert "link" not in response.headers


def test_response_without_a_length_ends_when_the_engine_closes(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.raw(
            b'HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n{"choices":[{"message":{"content":"x"}}]}'
        )
        exchange.cut()

    engine.on_chat = answer
    assert gateway.chat(session).json() == {"choices": [{"message": {"content": "x"}}]}
    assert gateway.turns(session)[0]["outcome"] == "completed"


def test_response_without_a_body_ends_at_once(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    def answer(exchange: Exchange) -> None:
        if exchange.request.method == "HEAD":
            exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n")
        else:
            exchange.raw(b"HTTP/1.1 204 No Content\r\n\r\n")

    engine.on_other = answer
    with gateway_in_front_of(engine.url, tmp_path, extra_paths="DELETE /v1/files/*") as gateway:
        for _ in range(2):
            assert gateway.http.delete("/v1/files/f1").status_code == 204
            head = gateway.http.head("/v1/models/x")
            assert (head.status_code, head.headers["content-length"]) == (200, "1234")
        assert gateway.chat(session).status_code == 200


def test_a_base_url_with_a_path_is_put_in_front(engine: FakeEngine, tmp_path: Path) -> None:
    engine.on_other = lambda exchange: exchange.json({"path": exchange.request.target})
    gateway = Gateway(tmp_path, f"{engine.url}/base/")
    try:
        gateway.start().wait("/healthz")
        assert gateway.http.get("/v1/models/x?y=%2F&z=a+b").json() == {"path": "/base/v1/models/x?y=%2F&z=a+b"}
    finally:
        gateway.close()


def test_large_request_to_a_slow_reader_arrives_complete(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    text = "ä" * 8_000_000
    assert gateway.chat(session, text).status_code == 200
    (request,) = engine.seen(CHAT)
    assert request.json["messages"][0]["content"] == text
    assert request.json["model"] == fake.MODEL

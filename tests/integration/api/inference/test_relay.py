"""The relay: what the engine answers comes through byte for byte, and what it cuts is seen to be cut."""

import json
import threading
from typing import Any

import httpx
import openai
import pytest

from gateway.dialects.sse import events
from tests.support.fakes import engine as fake
from tests.support.fakes.engine import DONE, Exchange, FakeEngine, delta, event, stream_of, usage_of, whole_reply
from tests.support.gateway_process import Gateway
from tests.support.raw_http import RawHttpClient
from tests.support.relay_answers import USAGE, answer_with

ENGINE_DOWN = "engine_unreachable"


def data_of(stream: bytes) -> list[str]:
    """The data of every event, as a client reads it."""
    return [e.removeprefix("data: ") for e in stream.decode().split("\n\n") if e]


def test_a_stream_comes_through_byte_for_byte_and_chunk_for_chunk(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    events = [b": ping\n\n", *stream_of(["Grüße", " 🎉", '{"choices":[]}'], USAGE)]
    engine.on_chat = answer_with(*events)
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True, stream_options={"include_usage": True})
        assert wire.head() == 200
        assert wire.chunks() == events


def test_partial_events_keep_their_chunk_boundaries_when_nothing_is_hidden(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    text = b"".join(stream_of(["Hello"], USAGE))
    pieces = [text[:7], text[7:150], text[150:151], text[151:]]
    engine.on_chat = answer_with(*pieces)
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True, stream_options={"include_usage": True})
        wire.head()
        assert wire.chunks() == pieces


def test_a_chunk_is_forwarded_before_the_next_one_exists(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    first_arrived = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="one"))
        assert first_arrived.wait(fake.WITHIN)
        exchange.chunk(DONE)
        exchange.end()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert wire.chunk() == delta(content="one")
        first_arrived.set()
        assert wire.chunks() == [DONE]


def test_usage_is_asked_for_but_hidden_from_a_client_that_did_not_ask(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        got = wire.chunks()
    assert got == stream_of(["Hello", " there", "!"])
    assert engine.seen("/v1/chat/completions")[0].json["stream_options"]["include_usage"] is True
    (turn,) = gateway.turns(session)
    assert turn["completion_tokens"] == 3


def test_usage_is_hidden_wherever_the_network_cut_the_stream(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    stream = b"".join(stream_of(["Hello"], USAGE))
    cut = stream.index(b'"choices":[]') + 5
    engine.on_chat = answer_with(stream[:3], stream[3:cut], stream[cut : cut + 20], stream[cut + 20 :])
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert b"".join(wire.chunks()) == b"".join(stream_of(["Hello"]))


def test_usage_is_shown_to_a_client_that_asked(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True, stream_options={"include_usage": True})
        wire.head()
        events = data_of(b"".join(wire.chunks()))
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 3


def test_a_whole_answer_comes_through_untouched(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    body = json.dumps(whole_reply("Hi", USAGE) | {"unknown": {"kept": [1, 2.50, None]}}, indent=1).encode()

    def answer(exchange: Exchange) -> None:
        exchange.raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: abc\r\nset-cookie: a=1\r\n"
            b"set-cookie: b=2\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )

    engine.on_chat = answer
    response = gateway.chat(session)
    assert response.content == body
    assert response.headers["x-request-id"] == "abc"
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
def test_an_error_of_the_engine_comes_through_untouched_and_is_recorded(
    engine: FakeEngine, gateway: Gateway, session: str, status: int
) -> None:
    refusal = {"error": {"message": "no", "type": "BadRequestError", "param": "x", "code": status}}
    engine.on_chat = lambda exchange: exchange.json(refusal, status, ["retry-after: 7"])
    response = gateway.chat(session)
    assert (response.status_code, response.json(), response.headers["retry-after"]) == (status, refusal, "7")
    (turn,) = gateway.turns(session)
    assert (turn["outcome"], turn["status"]) == ("engine_error", status)
    assert len(engine.seen("/v1/chat/completions")) == 1


def test_an_error_event_inside_a_stream_is_passed_on_and_recorded(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    broken = event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
    engine.on_chat = answer_with(delta(content="Hel"), broken, DONE)
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        assert wire.head() == 200
        assert wire.chunks() == [delta(content="Hel"), broken, DONE]
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_error"
    assert "EngineCore died" in turn["detail"]


@pytest.mark.parametrize("asks_usage", [False, True])
@pytest.mark.parametrize("half", [b"", b'data: {"id":"chatcmpl-1","choi'])
def test_a_stream_cut_by_the_engine_ends_with_a_readable_error_event(
    engine: FakeEngine, gateway: Gateway, session: str, asks_usage: bool, half: bytes
) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="Hel"))
        if half:
            exchange.chunk(half)
        exchange.cut()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True, stream_options={"include_usage": asks_usage})
        assert wire.head() == 200
        events = data_of(b"".join(wire.chunks()))
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == ENGINE_DOWN
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_cut"


def test_an_event_too_large_to_buffer_is_recorded_and_its_cut_is_reported(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    text, whole = "x" * 6 * 2**20, threading.Event()
    large = delta(content=text)

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        if whole.is_set():
            for piece in (large[:-100], large[-100:], *stream_of(["."], usage_of(1, 2))[1:]):
                exchange.chunk(piece)
            exchange.end()
        else:
            exchange.chunk(large[:-100])
            exchange.cut()

    engine.on_chat = answer
    cut = gateway.chat(session, stream=True).content
    assert cut.startswith(large[:-100] + b"\n\ndata: ")
    assert json.loads(list(events([cut]))[1])["error"]["code"] == "engine_unreachable"
    whole.set()
    shown = gateway.chat(session, stream=True).content
    assert shown.startswith(large)
    assert b'"choices":[]' not in shown
    completed, was_cut = gateway.turns(session, 2)
    assert (completed["outcome"], completed["completion_tokens"]) == ("completed", 2)
    assert was_cut["outcome"] == "engine_cut"


def test_the_openai_client_raises_when_the_engine_cuts_a_stream(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="Hel"))
        exchange.cut()

    engine.on_chat = answer
    messages: Any = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=f"{gateway.url}/s/{session}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="demo", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="engine closed the connection"):
            list(stream)


def test_a_whole_answer_that_the_engine_cuts_is_cut_for_the_client_too(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.raw(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id":')
        exchange.cut()

    engine.on_chat = answer
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.chat(session)
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_cut"


def test_a_stream_without_done_is_an_incomplete_reply(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    engine.on_chat = answer_with(delta(content="Hel"))
    gateway.chat(session, stream=True)
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_error"
    assert gateway.freeze(session, f"w-{session}").json()["error"]["code"] == "invalid_request"

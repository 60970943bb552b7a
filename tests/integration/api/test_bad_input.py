"""Streams of an engine that are malformed, cut or stalled."""

import json
import threading
from pathlib import Path

import pytest

from tests.support.chat_apis import MB, USAGE, Api, apis, streaming
from tests.support.fakes import engine as fake
from tests.support.fakes.engine import DONE, Exchange, FakeEngine, event
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient


def refused(gateway: Gateway, session: str) -> str:
    """Why a freeze of a session without a whole reply is refused."""
    answer = gateway.freeze(session, f"w-{session}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    return str(answer.json()["error"]["message"])


MALFORMED = [
    b"data: {broken\n\n",
    b"data: [1,2]\n\n",
    b"data\n\n",
    b"nonsense\n\n",
    b"data: \xff\xfe\n\n",
    b"data: null\n\n",
    b'data: {"choices":7}\n\n',
    b'data: {"choices":[7]}\n\n',
    b'data: {"choices":[{"delta":7,"text":{}}]}\n\n',
    b"\0\0\0\0\n\n",
    b'data: {"error":"died"}\n\n',
    b"data: " + b"[" * 5000 + b"\n\n",
]


@apis
@pytest.mark.parametrize("odd", MALFORMED, ids=lambda odd: repr(odd[:20]))
@pytest.mark.parametrize("asks_usage", [False, True])
def test_malformed_events_pass_as_they_are_and_the_turn_is_recorded(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, odd: bytes, asks_usage: bool
) -> None:
    chunks = [api.word, odd, *api.stream(["lo"], None)]
    api.answers(engine, streaming(*chunks))
    with RawHttpClient(gateway.url) as wire:
        api.send(wire, session, stream=True, stream_options={"include_usage": asks_usage})
        assert wire.head() == 200
        assert b"".join(wire.chunks()) == b"".join(chunks)
    (turn,) = gateway.turns(session)
    assert turn["outcome"] in ("engine_error", "completed")
    assert api.post(gateway, session).status_code == 200, "the gateway is still there"


@apis
@pytest.mark.parametrize("odd", [MALFORMED[0], MALFORMED[1], MALFORMED[10]])
def test_an_unreadable_stream_leaves_no_transcript(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, odd: bytes
) -> None:
    api.answers(engine, streaming(api.word, odd, DONE))
    api.post(gateway, session, stream=True)
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_error"
    assert "no finished turn" in refused(gateway, session)


@apis
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_cut_inside_a_character_or_a_line_end_is_relayed_whole(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, line_end: bytes, size: int
) -> None:
    words = ["Grüße", " 日本", "🎉🎉"]
    stream = b"".join(api.stream(words, USAGE)).replace(b"\n", line_end)
    shown = b"".join(api.stream(words, None)).replace(b"\n", line_end)
    api.answers(engine, streaming(*(stream[i : i + size] for i in range(0, len(stream), size))))
    for asks, wanted in ((False, shown), (True, stream)):
        with RawHttpClient(gateway.url) as wire:
            api.send(wire, session, stream=True, stream_options={"include_usage": asks})
            wire.head()
            assert b"".join(wire.chunks()) == wanted
    assert [(t["outcome"], t["completion_tokens"]) for t in gateway.turns(session, 2)] == [("completed", 2)] * 2
    gateway.freeze(session, f"w-{session}")
    last = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"][-1]
    assert last["content"].endswith("Grüße 日本🎉🎉")


@apis
@pytest.mark.parametrize("half", [b"", b'data: {"id":"x","choi', "data: é".encode()[:-1], b"data: x\r"])
@pytest.mark.parametrize("asks_usage", [False, True])
def test_an_engine_that_closes_mid_stream_causes_an_error_event(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, half: bytes, asks_usage: bool
) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(api.word)
        if half:
            exchange.chunk(half)
        exchange.cut()

    api.answers(engine, answer)
    with RawHttpClient(gateway.url) as wire:
        api.send(wire, session, stream=True, stream_options={"include_usage": asks_usage})
        assert wire.head() == 200
        got = b"".join(wire.chunks())
    *_, error, done, rest = got.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_unreachable"
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["engine_cut"]
    assert "no finished turn" in refused(gateway, session)


@apis
@pytest.mark.parametrize("last", [[], [DONE]])
def test_an_error_event_inside_a_200_is_relayed_and_not_recorded_as_reply(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, last: list[bytes]
) -> None:
    broken = event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
    chunks = [api.word, broken, *last]
    api.answers(engine, streaming(*chunks))
    with RawHttpClient(gateway.url) as wire:
        api.send(wire, session, stream=True)
        assert wire.head() == 200
        assert wire.chunks() == chunks
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_error"
    assert "no finished turn" in refused(gateway, session)


@apis
@pytest.mark.parametrize("began", [False, True])
def test_an_engine_that_stalls_is_given_up_and_its_work_aborted(
    engine: FakeEngine, tmp_path: Path, session: str, api: Api, began: bool
) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        if isinstance(exchange.request.json.get("prompt"), list):  # the gateway's self-test
            engine.answer_completion(exchange)
            return
        if began:
            exchange.begin()
            exchange.chunk(api.word)
        if exchange.gone():
            aborted.set()

    api.answers(engine, answer)
    with gateway_in_front_of(engine.url, tmp_path, engine_timeout_s=0.5) as gateway:
        response = api.post(gateway, session, stream=True)
        assert response.status_code == (200 if began else 504)
        assert "engine_timeout" in response.text
        assert response.content.startswith(api.word) is began
        assert aborted.wait(fake.WITHIN)
        (turn,) = gateway.turns(session)
        assert turn["outcome"] == ("engine_cut" if began else "engine_error")


@apis
def test_a_client_that_reads_slowly_holds_the_engine_back_and_costs_no_memory(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api
) -> None:
    piece = api.word.replace(b"Hel", b"x" * 65_000)
    sent, stalled = [0], threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange._sock.settimeout(0.5)
        try:
            while sent[0] < 200 * MB:
                exchange.chunk(piece)
                sent[0] += len(piece)
        except TimeoutError:
            exchange.over = True  # a part of the chunk is out
            stalled.set()

    api.answers(engine, answer)
    before = gateway.memory
    with RawHttpClient(gateway.url, receive_buffer=16 * 1024) as wire:
        api.send(wire, session, stream=True)
        wire.head()
        wire.chunk()
        assert stalled.wait(fake.WITHIN), "the engine could write 200 MB to a client that did not read"
        assert sent[0] < 32 * MB
        assert gateway.memory - before < 48 * MB


@apis
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_byte_aborts_the_engine(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, stream: bool
) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        if exchange.gone():
            aborted.set()

    api.answers(engine, answer)
    with RawHttpClient(gateway.url) as wire:
        api.send(wire, session, stream=stream)
        engine.wait_seen(api.path)
        wire.close()
        assert aborted.wait(1), "the engine still sees the connection a second later"
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["client_gone"]

"""What a client or an engine may do wrong, in every dialect that is a turn of a session: nothing breaks, nothing lies.

What is not here is tested beside its subject: engines that are down, stall or do not speak HTTP in `test_upstream.py`;
clients that read slowly, leave, or are many in `test_relay.py`; bodies and paths in `test_inference.py`.
"""

import asyncio
import http.client
import json
import resource
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.fakes import engine as fake
from tests.support.fakes.engine import (
    DONE,
    MODEL,
    Exchange,
    FakeEngine,
    delta,
    event,
    stream_of,
    text_event,
    texts_of,
    usage_of,
)
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

USAGE = usage_of(10, 2)
MB = 2**20
TYPE = "content-type: application/json"


@dataclass(frozen=True)
class Api:
    """A client API: where it is, how a request looks, and how the engine streams a reply."""

    path: str
    body: dict[str, Any]
    stream: Callable[[Sequence[str], Any], list[bytes]]
    word: bytes
    """One event of a reply, with `Hel` in it."""

    def __str__(self) -> str:
        return self.path

    def answers(self, engine: FakeEngine, handler: fake.Handler) -> None:
        """Let the engine answer it so."""
        if self.path == "/v1/completions":
            engine.on_completion = handler
        else:
            engine.on_chat = handler

    def send(self, wire: RawHttpClient, session: str, **body: Any) -> None:
        """Send a request of a session."""
        whole = json.dumps({"model": MODEL, **self.body, **body}).encode()
        wire.post(self.path, whole, f"x-session-id: {session}")

    def post(self, gateway: Gateway, session: str, **body: Any) -> httpx.Response:
        """The same, with its answer."""
        whole = {"model": MODEL, **self.body, **body}
        return gateway.http.post(self.path, json=whole, headers={"x-session-id": session})


APIS = [
    Api("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, stream_of, delta(content="Hel")),
    Api("/v1/completions", {"prompt": "hi"}, texts_of, event(text_event("Hel"))),
]
apis = pytest.mark.parametrize("api", APIS, ids=str)


def streaming(*chunks: bytes) -> fake.Handler:
    """An engine that streams these chunks."""

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for chunk in chunks:
            exchange.chunk(chunk)
        exchange.end()

    return answer


def refused(gateway: Gateway, session: str) -> str:
    """Why a freeze of a session without a whole reply is refused."""
    answer = gateway.freeze(session, f"w-{session}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    return str(answer.json()["error"]["message"])


# --- engines


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
def test_a_stream_that_cannot_be_read_is_no_transcript(
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
def test_a_stream_cut_within_a_character_a_line_end_or_a_name_comes_through_whole(
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
def test_an_engine_that_closes_in_mid_stream_ends_it_with_an_error_event(
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
def test_an_error_event_inside_a_200_is_passed_on_and_is_no_reply(
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


# --- clients


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


@apis
@pytest.mark.parametrize("stream", ["yes", "true", 1, "no", [], {}, None])
def test_an_odd_stream_is_the_engines_to_understand_and_its_answer_is_read_as_what_it_is(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, stream: Any
) -> None:
    taken_for_yes = stream in ("yes", "true", 1)  # vllm 0.32 takes them so
    chunks = api.stream(["Hel", "lo"], None)
    refusal = {"error": {"message": "stream: not a valid boolean", "code": 400}}
    api.answers(engine, streaming(*chunks) if taken_for_yes else lambda exchange: exchange.json(refusal, 400))
    response = api.post(gateway, session, stream=stream)
    (request,) = engine.seen(api.path)
    assert request.json["stream"] == stream
    assert "stream_options" not in request.json
    (turn,) = gateway.turns(session)
    if not taken_for_yes:
        assert (response.status_code, response.json(), turn["outcome"]) == (400, refusal, "engine_error")
        return
    assert response.content == b"".join(chunks)
    assert turn["outcome"] == "completed"
    assert gateway.freeze(session, f"w-{session}").status_code == 201


def test_10_mb_of_system_prompt_are_a_turn_like_any_other(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    system = "You are terse. 日本 " * (10 * MB // 22)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "hi"}]
    assert len(system.encode()) > 9.9 * MB
    engine.on_tokenize = lambda exchange: exchange.json({"tokens": [1, 2, 3]})
    response = gateway.chat(session, messages=messages)
    assert response.status_code == 200
    assert engine.seen("/v1/chat/completions")[0].json["messages"] == messages
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["completed"]
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    kept = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"]
    assert kept[:-1] == messages


def test_a_history_of_a_million_tokens_is_kept_thawed_and_gone_on_with(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    roles = ("user", "assistant")
    history = [{"role": roles[n % 2], "content": f"{n} " + "word " * 400} for n in range(2501)]
    assert sum(len(m["content"]) for m in history) > 5_000_000
    ids = list(range(1_000_000))
    engine.on_tokenize = lambda exchange: exchange.json({"tokens": ids})
    assert gateway.chat(session, messages=history).status_code == 200
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    new = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    engine.reset()
    assert gateway.chat(new, "and?").status_code == 200
    (request,) = engine.seen("/v1/chat/completions")
    reply = {"role": "assistant", "content": "Hello there!"}
    assert request.json["messages"] == [*history, reply, {"role": "user", "content": "and?"}]


def test_a_row_of_a_million_token_ids_is_kept_thawed_and_gone_on_with(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    ids = [n * 7919 % 150_000 for n in range(1_000_000)]

    def answer(exchange: Exchange) -> None:
        exchange.json({**text_event("x", "length", token_ids=[7]), "usage": usage_of(10**6, 1)})

    engine.on_completion = answer
    api = APIS[1]
    assert api.post(gateway, session, prompt=ids, return_token_ids=True).status_code == 200
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    assert gateway.http.get(f"/admin/windows/w-{session}").json()["token_count"] == 10**6 + 1
    new = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    engine.requests.clear()
    assert api.post(gateway, new, prompt=[8]).status_code == 200
    (request,) = engine.seen(api.path)
    assert request.json["prompt"] == [*ids, 7, 8]


@pytest.mark.parametrize("role", ["wizard", "text", "tokens", "", "SYSTEM", 7, None, ["user"], {"a": 1}])
def test_unknown_roles_are_the_engines_to_refuse_and_are_kept_as_they_are(
    engine: FakeEngine, gateway: Gateway, session: str, role: Any
) -> None:
    messages = [{"role": role, "content": "hi"}, {"role": "user", "content": "hi"}]
    whole = fake.whole_reply("Hello", USAGE)
    engine.on_chat = lambda exchange: exchange.json(whole)
    response = gateway.chat(session, messages=messages)
    assert (response.status_code, response.json()) == (200, whole)
    (request,) = engine.seen("/v1/chat/completions")
    assert request.json["messages"] == messages
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["completed"]
    gateway.freeze(session, f"w-{session}")
    new = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    engine.reset()
    engine.on_chat = lambda exchange: exchange.json(whole)
    more = [{"role": role, "content": "again"}, {"role": "user", "content": "and?"}]
    assert gateway.chat(new, messages=more).status_code == 200
    (request,) = engine.seen("/v1/chat/completions")
    assert request.json["messages"] == [*messages, {"role": "assistant", "content": "Hello"}, *more]
    refusal = {"error": {"message": "unknown role", "code": 400}}
    engine.on_chat = lambda exchange: exchange.json(refusal, 400)
    response = gateway.chat(session, messages=messages)
    assert (response.status_code, response.json()) == (400, refusal)


def test_images_stay_in_the_transcript_and_the_window_says_that_their_kv_is_not_kept(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}]
    engine.on_chat = lambda exchange: exchange.json(fake.whole_reply("A cat", USAGE))
    with gateway_in_front_of(engine.url, tmp_path, cache_url="http://127.0.0.1:9", kv_dir=tmp_path / "kv") as gateway:
        assert gateway.chat(session, messages=messages).status_code == 200
        (tmp_path / "kv").mkdir(exist_ok=True)
        window = gateway.freeze(session, f"w-{session}").json()
        kept = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"]
        thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()
    assert kept == [*messages, {"role": "assistant", "content": "A cat"}]
    assert window["kv"] == "absent"
    assert "media" in window["warnings"][0]
    assert "cannot be named by token ids" in window["warnings"][0]
    assert any("holds no KV" in warning for warning in thawed["warnings"])


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2500,
    reason="needs 2,500 open files: raise the hard limit (ulimit -Hn)",
)
@apis
def test_1000_streams_at_once_are_each_answered_whole_and_recorded_once(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api
) -> None:
    begun = threading.Semaphore(0)
    go_on = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(api.word)
        begun.release()
        assert go_on.wait(60)
        for chunk in api.stream(["lo"], USAGE):
            exchange.chunk(chunk)
        exchange.end()

    api.answers(engine, answer)
    wanted = b"".join([api.word, *api.stream(["lo"], None)])
    request = json.dumps({"model": MODEL, **api.body, "stream": True}).encode()
    head = [
        f"POST /s/{session}{api.path} HTTP/1.1",
        "host: x",
        TYPE,
        f"content-length: {len(request)}",
        "connection: close",
    ]
    message = "\r\n".join([*head, "", ""]).encode() + request

    async def one(url: str) -> bytes:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(message)
        answer = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return answer

    async def all_at_once() -> list[bytes]:
        tasks = [asyncio.create_task(one(gateway.url)) for _ in range(1000)]
        for _ in range(1000):  # every one of them has begun before any goes on
            assert await asyncio.to_thread(begun.acquire, timeout=60)
        go_on.set()
        return await asyncio.gather(*tasks)

    try:
        answers = asyncio.run(all_at_once())
    finally:
        go_on.set()
    assert {unframed(answer) for answer in answers} == {(b"HTTP/1.1 200 OK", wanted)}
    assert gateway.freeze(session, f"w-{session}").status_code == 201  # it waits until nothing is in flight
    assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == 1000


def unframed(answer: bytes) -> tuple[bytes, bytes]:
    """Status line and body of a chunked answer."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not (length := int(size, 16)):
            return head.split(b"\r\n")[0], body
        body, rest = body + rest[:length], rest[length + 2 :]


# --- other protocols

UPGRADE = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"


@pytest.mark.parametrize(
    "start",
    [
        f"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n",
        f"GET /v1/models/demo HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n",
        f"GET /admin/windows HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n",
        f"GET /s/a/v1/responses HTTP/1.1\r\nHost: x\r\n{UPGRADE.replace('websocket', 'h2c, WebSocket')}\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{UPGRADE}Content-Length: 2\r\n\r\n{{}}",
        "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
    ],
)
def test_a_websocket_or_a_tunnel_is_refused_in_words_and_reaches_no_engine(
    engine: FakeEngine, gateway: Gateway, start: str
) -> None:
    for pieces in ([start.encode()], [start.encode()[:20], start.encode()[20:]]):
        with RawHttpClient(gateway.url) as wire:
            for piece in pieces:
                wire.send(piece)
            assert wire.head() == 400
            assert wire.headers["connection"] == "close"
            error = wire.json()["error"]
            assert wire.rest() == b""
        assert error["code"] == "invalid_request"
        assert "HTTP/1.1 only" in error["message"]
        assert "stream" in error["hint"]
    assert engine.asked == []


@pytest.mark.parametrize(
    "start",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40,
        b"hello\r\n\r\n",
    ],
)
def test_what_is_no_http_1_is_told_so(engine: FakeEngine, gateway: Gateway, start: bytes) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.send(start)
        assert wire.head() == 400
        error = wire.json()["error"]
        assert wire.rest() == b""
    assert error["code"] == "invalid_request"
    assert "HTTP/1.1" in error["message"]


def test_what_is_no_http_behind_a_stream_does_not_get_into_it(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_chat = lambda exchange: (exchange.begin(), exchange.chunk(delta(content="Hel")), exchange.gone())[0]
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert wire.chunk() == delta(content="Hel")
        wire.send(b"nonsense\r\n\r\n")
        assert wire.rest() == b""
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["client_gone"]


H2C = [
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    TYPE,
    "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
]


@apis
@pytest.mark.parametrize("cut", [0, 1, 10, 200])
def test_a_wish_for_h2c_is_ignored_and_the_request_is_what_it_is(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, cut: int
) -> None:
    body = json.dumps({"model": MODEL, **api.body}).encode()
    head = [f"POST {api.path} HTTP/1.1", "Host: x", f"X-Session-ID: {session}", *H2C, f"Content-Length: {len(body)}"]
    whole = "\r\n".join([*head, "", ""]).encode() + body
    with RawHttpClient(gateway.url) as wire:
        for _ in range(2):  # the second is on the same connection
            for piece in (whole[:-cut], whole[-cut:]) if cut else (whole,):
                wire.send(piece)
                threading.Event().wait(0.02)
            assert wire.head() == 200
            assert wire.json()["choices"]
        wire.send(whole + whole)
        for _ in range(2):
            assert wire.head() == 200
            wire.json()
    seen = engine.seen(api.path)
    assert [{**r.json, "cache_salt": ""} for r in seen] == [{"model": MODEL, **api.body, "cache_salt": ""}] * 4
    assert {name for r in seen for name, _ in r.headers} & {"upgrade", "http2-settings", "connection"} == set()
    assert len(gateway.turns(session, 4)) == 4


def test_a_wish_for_h2c_in_a_chunked_body_is_ignored(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    address = urlsplit(gateway.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=fake.WITHIN)
    headers = {"connection": "upgrade", "upgrade": "h2c", "x-session-id": session, "content-type": "application/json"}
    body = json.dumps({"model": MODEL, **APIS[0].body}).encode()
    connection.request("POST", APIS[0].path, iter([body[:9], body[9:]]), headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["choices"]
    connection.close()


def test_an_upgrade_that_the_connection_does_not_name_is_no_upgrade(gateway: Gateway) -> None:
    assert gateway.http.get("/v1/models", headers={"upgrade": "websocket"}).status_code == 200
    assert gateway.http.get("/v1/models", headers={"connection": "upgrade"}).status_code == 200


# --- the rest of the engine's API


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"),
        ("POST", "/v1/score"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/s/a/v1/embeddings"),
        ("GET", "/v1/models/org%2Fdemo"),
        ("GET", "/v1/models/org%2Fdemo?limit=2"),
    ],
)
def test_what_else_the_engine_has_for_clients_passes_through(
    engine: FakeEngine, gateway: Gateway, method: str, path: str
) -> None:
    def echo(exchange: Exchange) -> None:
        exchange.json({"target": exchange.request.target, "body": exchange.request.body.decode()}, 203, ["x-odd: 1"])

    engine.on_other = engine.on_tokenize = echo
    body = b'{ "input" : "x", "prompt":"Once", "temperature": 0.10 }'
    sent: dict[str, Any] = (
        {"content": body, "headers": {"content-type": "application/json"}} if method == "POST" else {}
    )
    answer = gateway.http.request(method, path, **sent)
    assert (answer.status_code, answer.headers["x-odd"]) == (203, "1")
    assert answer.json()["target"] == path.removeprefix("/s/a")
    if method == "POST":
        assert answer.json()["body"].startswith(body[:-1].decode())


def test_models_and_tokenize_answer_as_the_engine_does(gateway: Gateway) -> None:
    assert gateway.http.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert gateway.http.post("/tokenize", json={"prompt": "abc"}).json()["tokens"] == list(b"abc")


def test_a_key_is_asked_for_at_tokenize_too(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="secret") as gateway:
        assert gateway.http.post("/tokenize", json={"prompt": "abc"}).status_code == 200
        answer = httpx.post(f"{gateway.url}/tokenize", json={"prompt": "abc"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")

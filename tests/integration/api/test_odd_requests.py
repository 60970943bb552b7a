"""Requests that are odd, or very large, and many at once."""

import asyncio
import json
import resource
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.chat_apis import APIS, MB, TYPE, USAGE, Api, apis, streaming
from tests.support.conversations import without_turns
from tests.support.fakes import engine as fake
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, text_event, usage_of
from tests.support.gateway_process import Gateway, gateway_in_front_of


@apis
@pytest.mark.parametrize("stream", ["yes", "true", 1, "no", [], {}, None])
def test_an_odd_stream_value_is_left_to_the_engine(
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
    kept = without_turns(gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"])
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
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    ids = [n * 7919 % 150_000 for n in range(1_000_000)]

    def answer(exchange: Exchange) -> None:
        exchange.json({**text_event("x", "length", token_ids=[7]), "usage": usage_of(10**6, 1)})

    engine.context_limit, engine.on_completion = 2 * 10**6, answer
    api = APIS[1]
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
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


def test_images_stay_in_the_transcript_and_freeze_warns_about_their_kv(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}]
    engine.on_chat = lambda exchange: exchange.json(fake.whole_reply("A cat", USAGE))
    with gateway_in_front_of(engine.url, tmp_path, cache_url="http://127.0.0.1:9", kv_dir=tmp_path / "kv") as gateway:
        assert gateway.chat(session, messages=messages).status_code == 200
        (tmp_path / "kv").mkdir(exist_ok=True)
        window = gateway.freeze(session, f"w-{session}").json()
        kept = without_turns(gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"])
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
    release = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(api.word)
        begun.release()
        assert release.wait(60)
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
        for _ in range(1000):  # all of them have begun before any continues
            assert await asyncio.to_thread(begun.acquire, timeout=60)
        release.set()
        return await asyncio.gather(*tasks)

    try:
        answers = asyncio.run(all_at_once())
    finally:
        release.set()
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

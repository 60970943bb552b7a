"""The openai client through the gateway, on the real engine."""

import re
from typing import Any

import httpx
import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse, same_bytes, until
from tests.support.conversations import without_turns

pytestmark = pytest.mark.stack

# What differs between two answers to the same request: ids and times.
_VOLATILE = re.compile(rb'"(id|created)":("[^"]*"|\d+)')
_BODY = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Say something."}],
    "max_tokens": 12,
    "temperature": 0,
}


def test_a_stream_has_the_bytes_of_the_engines_own_but_for_ids_and_times(stack: Stack, shared: Gateway) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": False}}):
        body = {**_BODY, "stream": True, **options}
        asked = options == {"stream_options": {"include_usage": True}}

        def ask(salt: str, body: dict[str, Any] = body, asked: bool = asked) -> tuple[bytes, bytes]:
            # Each salt's first request misses, so that cached_tokens is 0 in both.
            direct = stack.engine.post("/v1/chat/completions", json={**body, "cache_salt": salt + str(len(str(body)))})
            relayed = shared.http.post("/v1/chat/completions", json=body)
            assert direct.status_code == relayed.status_code == 200
            assert (b'"usage":{' in relayed.content) is asked
            return _VOLATILE.sub(b"", relayed.content), _VOLATILE.sub(b"", direct.content)

        same_bytes(ask)


def test_an_unstreamed_answer_has_the_engines_bytes_but_for_ids_and_times(stack: Stack, shared: Gateway) -> None:
    direct = stack.engine.post("/v1/chat/completions", json={**_BODY, "cache_salt": "direct"})
    relayed = shared.http.post("/v1/chat/completions", json=_BODY)
    assert _VOLATILE.sub(b"", relayed.content) == _VOLATILE.sub(b"", direct.content)


def test_the_openai_client_chats_and_streams_through_the_base_url(shared: Gateway) -> None:
    client = shared.client("openai-tour")
    messages = [{"role": "user", "content": "Say something."}]
    whole = chat(client, messages, max_tokens=12)
    parts = list(chat(client, messages, max_tokens=12, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert all(part.usage is None for part in parts)
    asked = list(chat(client, messages, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert asked[-1].usage.completion_tokens == 12


def test_a_session_counts_the_engines_tokens_and_keeps_the_reply(shared: Gateway) -> None:
    client = shared.client("counted")
    answer = chat(client, [{"role": "user", "content": "How long is this?"}])
    session = shared.http.get("/admin/sessions/counted").json()
    assert session["token_count"] == answer.usage.total_tokens
    assert session["turn_count"] == 1
    assert session["turns"][0]["outcome"] == "completed"
    following = client.chat.completions.with_raw_response.create(
        model="demo", messages=[{"role": "user", "content": "?"}], max_tokens=1
    )
    assert following.headers["x-session-id"] == "counted"
    assert int(following.headers["x-context-tokens"]) == answer.usage.total_tokens
    assert int(following.headers["x-context-limit"]) == 8192


def test_a_conversation_without_an_id_gets_one_and_other_paths_pass_through(shared: Gateway) -> None:
    named = shared.http.post("/v1/chat/completions", json=_BODY).headers["x-session-id"]
    until(lambda: shared.get_status(f"/admin/sessions/{named}") == 200, "the session is there")
    assert shared.http.get("/v1/models").json()["data"][0]["id"] == "demo"
    completion = shared.http.post("/v1/completions", json={"model": "demo", "prompt": "Once", "max_tokens": 3}).json()
    assert completion["usage"]["completion_tokens"] == 3


def test_tool_calls_of_a_real_template_come_back_as_they_were_sent(shared: Gateway) -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    choice = {"type": "function", "function": {"name": "now"}}
    client = shared.client("tools")
    messages = [{"role": "user", "content": "What time is it?"}]
    # The model is random: not every seed ends its arguments before the limit.
    replies = (
        chat(client, messages, tools=tools, tool_choice=choice, temperature=1, seed=seed, max_tokens=80, extra_body={})
        for seed in range(20)
    )
    reply = next(r.choices[0].message for r in replies if r.choices[0].message.tool_calls)
    kept = shared.freeze("tools", "tools-window")
    window = shared.http.get("/admin/windows/tools-window/messages").json()
    assert without_turns(window["messages"])[:-1] == messages
    assert window["messages"][-1]["tool_calls"] == [call.model_dump() for call in reply.tool_calls]
    assert window["frame"]["tools"] == tools
    assert kept["token_count"] > 0


def test_engine_errors_pass_untouched(stack: Stack, shared: Gateway) -> None:
    for body in ({"model": "nobody", "messages": []}, {**_BODY, "max_tokens": -1}, {**_BODY, "messages": "no list"}):
        direct = stack.engine.post("/v1/chat/completions", json=body)
        relayed = shared.http.post("/v1/chat/completions", json=body)
        assert (relayed.status_code, relayed.json()) == (direct.status_code, direct.json())


@pytest.mark.parametrize("after_first_byte", [False, True])
def test_a_client_that_leaves_aborts_the_engines_work(stack: Stack, shared: Gateway, after_first_byte: bool) -> None:
    body = {**_BODY, "max_tokens": 6000, "stream": after_first_byte, "ignore_eos": True}
    before = _running(stack)
    with httpx.Client(base_url=shared.url) as client:
        request = client.build_request("POST", "/s/leaver/v1/chat/completions", json=body, timeout=1.5)
        if after_first_byte:
            response = client.send(request, stream=True)
            chunks = response.iter_bytes()
            next(chunks)
            until(lambda: _running(stack) > before, "the engine works")
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    until(lambda: _running(stack) == before, "the engine has stopped", within=2)
    until(lambda: _last_outcome(shared) == "client_gone", "the turn is recorded")


def _running(stack: Stack) -> float:
    metrics = stack.engine.get("/metrics").text
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:num_requests_running"))


def _last_outcome(gateway: Gateway) -> str:
    turns = gateway.http.get("/admin/sessions/leaver").json().get("turns") or [{"outcome": ""}]
    return str(turns[0]["outcome"])


def test_sessions_with_the_same_text_share_nothing_in_any_tier(stack: Stack, shared: Gateway) -> None:
    first = converse(shared.client("left"), "the same text", turns=1)
    second = chat(shared.client("right"), first[:-1], temperature=1, seed=0)
    again = chat(shared.client("left"), first[:-1], temperature=1, seed=0)
    assert second.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    # A third salt that has seen the text only in others' requests has nothing in memory, on disk or in Redis.
    shared.freeze("left", "left-window")
    shared.freeze("right", "right-window")
    left, right = (shared.thaw(f"{side}-window")["cache_salt"] for side in ("left", "right"))
    blocks = shared.http.get("/admin/windows/left-window", params={"include_blocks": "true"}).json()["blocks"]
    hashes = [block["hash"] for block in blocks]
    unrelated = "0" * 32
    for salt, found in ((left, len(hashes)), (right, len(hashes)), (unrelated, 0)):
        names = [f"{stack.plan.model.key}@01000100@0@{h}@{salt}" for h in hashes]
        files = [f for h in hashes for f in stack.kv_dir.glob(f"*@{h}@{salt}.data")]
        assert (len(files), stack.redis.exists(*names), _drop_from_memory(stack, hashes, salt)) == (found,) * 3


def _drop_from_memory(stack: Stack, hashes: list[str], salt: str) -> int:
    """How many of these objects LMCache has in memory: it tells how many it dropped."""
    key = {"model_name": stack.plan.model.key, "kv_rank": 0x01000100, "object_group_id": 0, "cache_salt": salt}
    body = {"keys": [{**key, "chunk_hash_hex": h} for h in hashes], "tier": "l1", "force": True}
    return int(httpx.request("DELETE", f"{stack.plan.cache_url}/cache/objects", json=body).json()["deleted"])

"""The Responses API through the gateway, on the real engine."""

import re
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.dialects import sse
from gateway.dialects.responses import ResponsesDialect
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, until

pytestmark = pytest.mark.stack

RESPONSES = "/v1/responses"
# What differs between two answers to the same request: ids and times.
_VOLATILE = re.compile(rb'"(id|item_id|call_id|created_at|completed_at)":("[^"]*"|[\d.]+)')
_BODY = {"model": "demo", "input": "Say something.", "max_output_tokens": 12, "temperature": 0}

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
STRICT = {**TOOL, "name": "strict", "strict": True, "defer_loading": False}
BARE = {"type": "function", "name": "bare"}
CUSTOM = {"type": "custom", "name": "patch", "description": "Applies a patch."}
SPACE = {"type": "namespace", "name": "maps", "description": "Maps.", "tools": [TOOL]}

USER = {"role": "user", "content": "How is the weather in Zürich?"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":  "Zürich"}'}
OTHER = {**CALL, "call_id": "c2", "arguments": '{"city": "Bern"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Snow ❄\n"}
PARTS = {
    **RESULT,
    "call_id": "c2",
    "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
}
WHY = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "It may be cold."}]}
SUMMARY = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Cold."}]}
SAID = {
    "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
    "content": [{"type": "output_text", "text": "It snows.", "annotations": []}],
}  # fmt: skip
EASY = {"role": "assistant", "content": "It snows."}
MORE = {"role": "user", "content": [{"type": "input_text", "text": "And "}, {"type": "input_text", "text": "Bern?"}]}
PATCH = {"type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": 'é "quoted"\n'}
PATCHED = {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"}

REQUESTS: list[dict[str, Any]] = [
    {"input": "Hello there"},
    {"input": ""},
    {"input": "Hello", "instructions": "Be terse."},
    {"input": "Hello", "instructions": ""},
    {"input": [USER], "instructions": "Be terse."},
    {"input": [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}, USER]},
    {"input": [{"role": "system", "content": "One."}, USER], "instructions": "Be terse."},
    {"input": [{"type": "message", **MORE}]},
    {"input": [USER, SAID, MORE]},
    {"input": [USER, EASY, MORE]},
    {"input": [USER, WHY, SAID, MORE]},
    {"input": [USER, SUMMARY, EASY, MORE]},
    {"input": [USER, CALL, RESULT]},
    {"input": [USER, CALL, RESULT], "tools": [TOOL]},
    {"input": [USER, WHY, CALL, RESULT, SAID, MORE], "tools": [TOOL]},
    {"input": [USER, SAID, CALL, OTHER, RESULT, PARTS], "tools": [TOOL, STRICT], "parallel_tool_calls": True},
    {"input": [USER, CALL, SAID, RESULT], "tools": [TOOL]},
    {"input": [USER, SAID, EASY, WHY, CALL, RESULT, WHY, SAID, MORE], "tools": [TOOL]},
    {"input": [USER, {**CALL, "namespace": "maps"}, RESULT], "tools": [SPACE, BARE]},
    {"input": [USER, PATCH, PATCHED], "tools": [CUSTOM]},
    {"input": "x", "tools": [TOOL], "tool_choice": "none"},
    {"input": "x", "tools": [TOOL], "tool_choice": "required"},
    {"input": "x", "tools": [TOOL, BARE], "tool_choice": {"type": "function", "name": "bare"}},
    {"input": "x", "instructions": "Be terse.", "tools": [TOOL, {"type": "web_search_preview"}]},
    {"input": "x", "tools": [{"type": "web_search_preview"}]},
    {"input": "x", "tool_choice": "auto"},
    {"input": "x", "reasoning": {"effort": "low"}},
    {"input": "x", "chat_template_kwargs": {"enable_thinking": False}},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: orjson.dumps(request).decode()[:60])
def test_a_request_read_into_chat_words_renders_to_its_own_tokens(stack: Stack, request_: dict[str, Any]) -> None:
    body = {"model": "demo", **request_}
    own = stack.engine.post("/v1/responses/render", json=body)
    assert own.status_code == 200, own.text
    call = ResponsesDialect().read(dict(body), orjson.dumps(body))
    assert call.messages
    in_chat = {**call.frame, "model": "demo", "messages": call.messages}
    rendered = stack.engine.post("/v1/chat/completions/render", json=in_chat)
    assert rendered.status_code == 200, rendered.text
    assert rendered.json()["token_ids"] == own.json()["token_ids"]


def test_an_answer_is_the_engines_own_but_for_ids_and_times(stack: Stack, shared: Gateway) -> None:
    for more in ({}, {"store": False}, {"store": True, "instructions": "Be terse."}, {"tools": [TOOL]}):
        # Each salt's first request misses, so that cached_tokens is 0 in both.
        salt = f"direct-{sorted(more)}"
        direct = stack.engine.post(RESPONSES, json={**_BODY, **more, "cache_salt": salt})
        relayed = shared.http.post(RESPONSES, json={**_BODY, **more})
        assert direct.status_code == relayed.status_code == 200
        assert _VOLATILE.sub(b"", relayed.content) == _VOLATILE.sub(b"", direct.content)


def test_a_stream_is_the_engines_own_but_for_ids_and_times(stack: Stack, shared: Gateway) -> None:
    for more in ({}, {"store": False}, {"store": True, "instructions": "Be terse."}, {"tools": [TOOL]}):
        body = {**_BODY, **more, "stream": True}
        direct = stack.engine.post(RESPONSES, json={**body, "cache_salt": f"streamed-{sorted(more)}"})
        relayed = shared.http.post(RESPONSES, json=body)
        assert direct.status_code == relayed.status_code == 200
        assert relayed.headers["content-type"] == direct.headers["content-type"]
        assert said_in(relayed.content) == said_in(direct.content)


def said_in(stream: bytes) -> list[dict[str, Any]]:
    """The events of a stream without ids and times; two words that the engine put into one event are two again."""
    found: list[dict[str, Any]] = []
    for data in sse.events([_VOLATILE.sub(b'"_":0', stream)]):
        event = orjson.loads(data)
        del event["sequence_number"]
        if found and "delta" in event and event["type"] == found[-1]["type"]:
            found[-1]["delta"] += event["delta"]
        else:
            found.append(event)
    return found


def test_engine_errors_pass_untouched(stack: Stack, shared: Gateway) -> None:
    for body in (
        {"model": "nobody", "input": "x"},
        {**_BODY, "max_output_tokens": "many"},
        {**_BODY, "input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ):
        direct = stack.engine.post(RESPONSES, json=body)
        relayed = shared.http.post(RESPONSES, json=body)
        assert direct.status_code >= 400
        assert (relayed.status_code, relayed.json()) == (direct.status_code, direct.json())


def ask(client: openai.OpenAI, text: Any, **more: Any) -> Any:
    """One greedy response of exact length unless said otherwise."""
    arguments = {"max_output_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True, "seed": 1}} | more
    return client.responses.create(model="demo", input=text, **arguments)


def plain_client(gateway: Gateway) -> openai.OpenAI:
    """The openai client with nothing but its base URL."""
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_a_chain_continues_after_a_restart_and_hits(own: Gateway) -> None:
    with plain_client(own) as client:
        first = ask(client, "The weather is fine. " * 120, instructions="Be terse.")
        second = ask(client, "And tomorrow? " * 30, previous_response_id=first.id, instructions="Be terse.")
        assert second.usage.input_tokens > first.usage.total_tokens
        assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 64
        own.stop()
        own.start()
        *_, last = ask(client, "Why?", previous_response_id=second.id, instructions="Be terse.", stream=True)
        assert last.type == "response.completed"
        third = last.response
        assert third.usage.input_tokens > second.usage.total_tokens
        assert third.usage.input_tokens_details.cached_tokens >= second.usage.input_tokens - 64
        kept = client.responses.retrieve(third.id)
        assert kept.output == third.output
        assert kept.previous_response_id == second.id
        asked = client.responses.input_items.list(second.id)
        assert [item.content[0].text for item in asked] == ["And tomorrow? " * 30]
        fork = ask(client, "Or else?", previous_response_id=first.id, instructions="Be terse.")
        assert fork.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 64
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as gone:
            ask(client, "x", previous_response_id=first.id)
        assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")
        assert ask(client, "x", previous_response_id=fork.id).output_text
    until(lambda: own.http.get("/admin/sessions").json()["total"] == 2, "a chain and its fork")
    chain, fork_ = own.http.get("/admin/sessions").json()["sessions"][::-1]
    assert (chain["turn_count"], fork_["turn_count"]) == (3, 2)


def test_a_prepended_history_renders_as_if_the_client_had_sent_it(stack: Stack, shared: Gateway) -> None:
    with plain_client(shared) as client:
        first = ask(client, [USER], tools=[TOOL])
        chained = ask(client, [MORE], previous_response_id=first.id, tools=[TOOL])
    output = [item.model_dump(exclude_none=True) for item in first.output]
    whole = {"model": "demo", "input": [USER, *output, MORE], "tools": [TOOL]}
    rendered = stack.engine.post("/v1/responses/render", json=whole).json()
    assert chained.usage.input_tokens == len(rendered["token_ids"])


def test_tool_calls_and_their_results_continue_by_id(stack: Stack, shared: Gateway) -> None:
    with plain_client(shared) as client:
        # The model is random: not every seed ends its arguments before the limit.
        choice = {"type": "function", "name": "weather"}
        for seed in range(20):
            reply = ask(
                client, [USER], tools=[TOOL], tool_choice=choice, temperature=1, max_output_tokens=80,
                extra_body={"seed": seed},
            )  # fmt: skip
            call = next((item for item in reply.output if item.type == "function_call"), None)
            if call:
                break
        assert call is not None
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Snow"}
        after = ask(client, [result], previous_response_id=reply.id, tools=[TOOL])
        items = list(client.responses.input_items.list(after.id))
    assert [(item.type, item.call_id, item.output) for item in items] == [
        ("function_call_output", call.call_id, "Snow")
    ]
    output = [item.model_dump(exclude_none=True) for item in reply.output]
    whole = {"model": "demo", "input": [USER, *output, result], "tools": [TOOL]}
    rendered = stack.engine.post("/v1/responses/render", json=whole).json()
    assert after.usage.input_tokens == len(rendered["token_ids"])


def test_a_session_of_responses_is_frozen_and_continues_in_chat_and_back(shared: Gateway) -> None:
    client = shared.client("of-responses")
    first = ask(client, "The weather is fine. " * 120, instructions="Be terse.", tools=[TOOL])
    second = ask(client, "And then? " * 30, previous_response_id=first.id, instructions="Be terse.", tools=[TOOL])
    frozen = shared.freeze("of-responses", "of-responses-window")
    assert frozen["receipt"]["chunks"] > 0
    window = shared.http.get("/admin/windows/of-responses-window/messages").json()
    assert [message["role"] for message in window["messages"]] == ["system", *["user", "assistant"] * 2]
    assert window["messages"][-1]["content"] == second.output_text
    # The window's ids are those with which the engine renders the next turn, so all of them are found again.
    thawed = shared.thaw("of-responses-window", warm="gpu")
    assert thawed["receipt"]["cached_tokens"] >= frozen["token_count"] - 16
    in_chat = chat(shared.client(thawed["session_id"]), [{"role": "user", "content": "Why?"}])
    assert in_chat.usage.prompt_tokens > frozen["token_count"]
    assert in_chat.usage.prompt_tokens_details.cached_tokens >= frozen["token_count"] - 16
    again = shared.thaw("of-responses-window")["session_id"]
    in_responses = ask(shared.client(again), "Why?")
    assert in_responses.usage.input_tokens == in_chat.usage.prompt_tokens
    assert in_responses.usage.input_tokens_details.cached_tokens >= frozen["token_count"] - 16
    chained = ask(shared.client(again), "Really?", previous_response_id=in_responses.id)
    assert chained.usage.input_tokens > in_responses.usage.total_tokens


def test_a_client_that_leaves_aborts_the_engines_work(stack: Stack, shared: Gateway) -> None:
    def running() -> float:
        lines = stack.engine.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    body = {**_BODY, "max_output_tokens": 6000, "stream": True, "ignore_eos": True}
    with httpx.Client(base_url=shared.url) as client:
        response = client.send(client.build_request("POST", "/s/response-leaver/v1/responses", json=body), stream=True)
        assert response.status_code == 200
        chunks = response.iter_bytes()  # held, as the response is closed with it
        assert next(chunks).startswith(b"event: response.created")
        until(lambda: running() > 0, "the engine works")
        response.close()
    until(lambda: running() == 0, "the engine has stopped", within=2)

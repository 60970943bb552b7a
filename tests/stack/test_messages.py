"""The anthropic client through the gateway, on the real engine; and the dialect's conversion compared with vLLM's."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from hypothesis import given, settings

from gateway.dialects import chat_to_messages, messages_to_chat
from gateway.dialects.base import INHERITED_FIELDS
from gateway.dialects.messages import MessagesDialect
from gateway.dialects.transcripts import split
from gateway.records import Front
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.support.conversations import without_turns
from tests.unit.dialects.test_chat_to_messages import MESSAGES

pytestmark = pytest.mark.stack

_VOLATILE = re.compile(rb'"(id|signature)":"[^"]*"')
_CHUNK = 64
_HI: list[Any] = [{"role": "user", "content": "Say something."}]
_BODY: dict[str, Any] = {"model": "demo", "max_tokens": 12, "temperature": 0, "messages": _HI}
_EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
# Strict, or else the random model may give a number for an object.
_TOOLS: list[Any] = [
    {
        "name": "now",
        "description": "What time it is.",
        "strict": True,
        "input_schema": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
    {
        "name": "today",
        "strict": True,
        "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
    },
]


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def use(call_id: str, name: str, **value: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": value}


def result(call_id: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


THINKING = {"type": "thinking", "thinking": "Which zone?\nCET.", "signature": "s"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "text": {"messages": [*_HI, {"role": "assistant", "content": "ok"}, *_HI]},
    "blocks": {
        "messages": [user(text("one", **_EPHEMERAL), text("two"), text("")), assistant(text("ok")), user(text("x"))]
    },
    "system as a string": {"system": "You are terse."},
    "system as blocks": {
        "system": [text("x-anthropic-billing-header: cch=1;"), text("You are", **_EPHEMERAL), text(" terse.\n")]
    },
    "system in between": {"messages": [*_HI, assistant(text("ok")), {"role": "system", "content": "Hurry."}, *_HI]},
    "tools": {"tools": _TOOLS, "system": "You are terse."},
    "tools chosen": {"tools": _TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
    "tools refused": {"tools": _TOOLS, "tool_choice": {"type": "none"}},
    "a tool without a type": {"tools": [{"name": "f", "input_schema": {"properties": {}}, **_EPHEMERAL}]},
    "a tool named": {"tools": _TOOLS, "tool_choice": {"type": "tool", "name": "now"}},
    "a call and its result": {
        "tools": _TOOLS,
        "messages": [
            *_HI,
            assistant(text("Let me look."), use("toolu_1", "now", zone="CET", odd=["ü", None, 2.5, {"a": True}])),
            user(result("toolu_1", "9:00")),
        ],
    },
    "parallel calls, one failed": {
        "tools": _TOOLS,
        "messages": [
            *_HI,
            assistant(use("toolu_1", "now", zone="CET"), use("toolu_2", "today")),
            user(result("toolu_1", [text("no"), text("clock")], is_error=True), result("toolu_2"), text("And now?")),
            assistant(text("It is late.")),
            *_HI,
        ],
    },
    "words before the results": {
        "messages": [*_HI, assistant(use("toolu_1", "today")), user(text("Here:"), result("toolu_1", "Friday"))]
    },
    "thinking": {
        "tools": _TOOLS,
        "messages": [
            *_HI,
            assistant(THINKING, {"type": "redacted_thinking", "data": "AA=="}, text("So."), use("toolu_1", "today")),
            user(result("toolu_1", "Friday")),
            assistant(THINKING),
            *_HI,
        ],
        "thinking": {"type": "disabled"},
    },
    "effort": {"output_config": {"effort": "high"}, "chat_template_kwargs": {"x": 1}},
    "nothing said": {"messages": [user(text("")), *_HI, assistant(text("")), user(text("go on"))]},
    "tools that come and go": {
        "tools": _TOOLS,
        "messages": [
            *_HI,
            {
                "role": "system",
                "content": [
                    {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "now"}},
                    {
                        "type": "tool_addition",
                        "tool": {
                            "type": "tool_definition",
                            "definition": {"name": "f", "description": "F", "input_schema": {"type": "object"}},
                        },
                    },
                ],
            },
            *_HI,
        ],
    },
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_recorded_request_renders_to_the_engines_own_tokens(stack: Stack, name: str) -> None:
    body = {**_BODY, **CONVERSATIONS[name]}
    expected = _rendered(stack, "/v1/messages/render", body)
    call = MessagesDialect().read(body, b"")
    assert call.messages
    recorded = {"model": "demo", "messages": call.messages, **call.frame}
    assert _rendered(stack, "/v1/chat/completions/render", recorded) == expected
    # Converted back to Messages, as for a thawed session, it is the same again.
    system, rest = split(call.messages)
    front = Front(system, rest, {name: call.frame[name] for name in INHERITED_FIELDS if name in call.frame})
    said = chat_to_messages.in_front(front, {**body, "messages": []})
    assert _rendered(stack, "/v1/messages/render", said) == expected
    counted = stack.engine.post("/v1/messages/count_tokens", json=MessagesDialect().read(body, b"").body)
    assert counted.json()["input_tokens"] == len(expected)


@pytest.fixture(scope="module")
def vllm() -> Any:
    """vLLM's own conversion of a request."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest  # noqa: PLC0415 - takes seconds
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages  # noqa: PLC0415

    def converted(body: dict[str, Any]) -> list[dict[str, Any]]:
        request = AnthropicMessagesRequest.model_validate(body)
        return [dict(message) for message in AnthropicServingMessages.to_chat_completion_request(request).messages]

    return converted


def test_every_message_is_recorded_as_vllm_converts_it(vllm: Any) -> None:
    @settings(max_examples=300)
    @given(MESSAGES)
    def holds(messages: list[dict[str, Any]]) -> None:
        body = {"model": "demo", "max_tokens": 1, "messages": messages}
        theirs = [_plain(message) for message in vllm(body)]
        assert [_plain(message) for message in messages_to_chat.conversation(body)] == theirs

    holds()


# --- compared with the engine alone


@pytest.mark.parametrize("name", ["text", "system as blocks", "tools chosen", "parallel calls, one failed"])
def test_what_a_client_receives_is_the_engines_own_but_for_ids(stack: Stack, shared: Gateway, name: str) -> None:
    for stream in (False, True):
        body = {**_BODY, **CONVERSATIONS[name], "max_tokens": 60, "stream": stream}
        # Each salt's first request misses, so that the counts of what was cached are equal.
        session = f"direct-{name.split(maxsplit=1)[0]}-{stream}"
        direct = stack.engine.post("/v1/messages", json={**body, "cache_salt": session})
        relayed = shared.http.post("/v1/messages", json=body, headers={"x-session-id": session})
        assert direct.status_code == relayed.status_code == 200
        mine, theirs = _VOLATILE.sub(b"", relayed.content), _VOLATILE.sub(b"", direct.content)
        assert (_events(mine) == _events(theirs)) if stream else (mine == theirs)


def test_refusals_of_the_engine_pass_untouched(stack: Stack, shared: Gateway) -> None:
    for change in (
        {"max_tokens": -1},
        {"model": "nobody"},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [user({"type": "document", "source": {}})]},
        {"messages": [user(text(7))]},  # type: ignore[arg-type]
        {"messages": "no list"},
        {"system": 7},
        {"tools": [{"name": "web_search", "type": "web_search_20250305"}]},
        {"messages": [{"role": "user", "content": "x " * 20_000}]},
    ):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            body = {**_BODY, **change}
            direct, relayed = stack.engine.post(path, json=body), shared.http.post(path, json=body)
            assert (relayed.status_code, relayed.json()) == (direct.status_code, direct.json())


# --- the official client


@pytest.fixture
def client(shared: Gateway, request: pytest.FixtureRequest) -> Iterator[anthropic.Anthropic]:
    with _client(shared, re.sub(r"\W", "-", request.node.name)[:100]) as client:
        yield client


def test_the_anthropic_client_talks_and_streams_through_the_base_url(client: anthropic.Anthropic) -> None:
    whole = _ask(client, _BODY)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)
    with client.messages.stream(**_arguments(_BODY)) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.cache_read_input_tokens is not None
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_session_counts_the_whole_prompt_and_what_of_it_was_cached(
    shared: Gateway, client: anthropic.Anthropic
) -> None:
    body = {**_BODY, "messages": [{"role": "user", "content": "count me " * 60}]}
    prompt = client.messages.count_tokens(model="demo", messages=body["messages"]).input_tokens
    for stream in (False, True, False):
        answer = _ask(client, body, stream)
        session = shared.http.get(f"/admin/sessions/{_session(client)}").json()
        turn = session["turns"][0]
        assert session["token_count"] == prompt + 12
        assert turn["prompt_tokens"] == prompt
        assert turn["cached_tokens"] == answer.usage.cache_read_input_tokens
    assert turn["cached_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_result_continues_the_recorded_transcript(
    stack: Stack, shared: Gateway, client: anthropic.Anthropic, stream: bool
) -> None:
    asked = {**_BODY, "tools": _TOOLS, "tool_choice": {"type": "any"}, "temperature": 1.0, "max_tokens": 300}
    called = _until_called(client, asked, stream)
    calls = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use"
    name = f"w-{_session(client)}"
    kept = shared.freeze(_session(client), name)
    recorded = shared.http.get(f"/admin/windows/{name}/messages").json()
    assert [call["id"] for call in recorded["messages"][-1]["tool_calls"]] == [call.id for call in calls]
    results = user(*(result(call.id, "9:00") for call in calls))
    following = {**asked, "messages": [*_HI, {"role": "assistant", "content": called.content}, results]}
    answer = _ask(client, {**following, "tool_choice": {"type": "none"}})
    # The next turn begins with the very tokens that were frozen.
    said = {**following, "messages": [*_HI, assistant(*(b.to_dict() for b in called.content)), results]}
    ids = _rendered(stack, "/v1/messages/render", said)
    frozen = _rendered(
        stack,
        "/v1/chat/completions/render",
        {"model": "demo", **recorded["frame"], "messages": recorded["messages"], "add_generation_prompt": False},
    )
    assert len(frozen) == kept["token_count"]
    assert ids[: len(frozen)] == frozen
    assert answer.usage.cache_read_input_tokens >= kept["receipt"]["chunks"] * _CHUNK


def test_parallel_calls_are_recorded_as_the_client_sends_them_back(
    shared: Gateway, client: anthropic.Anthropic
) -> None:
    # As hot as the engine takes it: of the few tokens that the grammar allows, the end is by far the likeliest.
    asked = {**_BODY, "tools": _TOOLS, "tool_choice": {"type": "any"}, "temperature": 2.0, "max_tokens": 400}
    called = _until_called(client, asked, stream=True, calls=2)
    shared.freeze(_session(client), "w-parallel")
    recorded = without_turns(shared.http.get("/admin/windows/w-parallel/messages").json()["messages"])
    sent_back = {"role": "assistant", "content": [block.to_dict() for block in called.content]}
    assert [recorded[-1]] == messages_to_chat.conversation({"messages": [sent_back]})
    assert len(recorded[-1]["tool_calls"]) >= 2


# --- windows, across dialects


def test_a_messages_window_continues_in_chat_and_in_messages_with_its_cache(
    stack: Stack, shared: Gateway, client: anthropic.Anthropic
) -> None:
    _converse(client, "begun in messages")
    window = shared.freeze(_session(client), "begun-in-messages")
    assert window["kv"] == "complete"
    _continue_in_both(stack, shared, "begun-in-messages", window)


def test_a_chat_window_continues_in_messages_and_in_chat_with_its_cache(stack: Stack, shared: Gateway) -> None:
    converse(shared.client("begun-in-chat"), "begun in chat")
    window = shared.freeze("begun-in-chat", "begun-in-chat")
    _continue_in_both(stack, shared, "begun-in-chat", window)


def test_a_window_of_thoughts_and_tools_continues_in_either_api(stack: Stack, shared: Gateway) -> None:
    with _client(shared, "thoughts") as client:
        body = {**_BODY, **CONVERSATIONS["thinking"], "system": "You are terse. " * 20}
        _ask(client, {**body, "tool_choice": {"type": "none"}})
    window = shared.freeze("thoughts", "thoughts")
    _continue_in_both(stack, shared, "thoughts", window)


def _continue_in_both(stack: Stack, shared: Gateway, name: str, window: dict[str, Any]) -> None:
    """Thaw into both dialects, sending only what is new: every whole chunk hits, and both prompts are the same."""
    chunks = window["receipt"]["chunks"]
    assert chunks > 2
    thawed = [shared.thaw(name)["session_id"] for _ in range(2)]
    answer = chat(shared.client(thawed[0]), [{"role": "user", "content": "go on"}])
    assert answer.usage.prompt_tokens_details.cached_tokens >= chunks * _CHUNK
    with _client(shared, thawed[1]) as client:
        new = {**_BODY, "messages": [{"role": "user", "content": "go on"}]}
        counted = client.messages.count_tokens(model="demo", messages=new["messages"]).input_tokens
        said = _ask(client, new)
        usage = said.usage
        assert usage.cache_read_input_tokens >= chunks * _CHUNK
        whole = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        assert whole == counted == answer.usage.prompt_tokens
        # A client that has kept what it said since, and one that has the whole history.
        since = [*new["messages"], {"role": "assistant", "content": said.content}, *_HI]
        again = _ask(client, {**new, "messages": since})
        kept = shared.http.get(f"/admin/windows/{name}/messages").json()
        front = Front(
            *split(without_turns(kept["messages"])),
            {n: kept["frame"][n] for n in INHERITED_FIELDS if n in kept["frame"]},
        )
        full = _ask(client, chat_to_messages.in_front(front, {**new, "messages": since}))
        for usage in (again.usage, full.usage):
            assert usage.cache_read_input_tokens >= whole // _CHUNK * _CHUNK
    session = shared.http.get(f"/admin/sessions/{thawed[1]}").json()
    assert [turn["outcome"] for turn in session["turns"]] == ["completed"] * 3


def _client(gateway: Gateway, session: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"{gateway.url}/s/{session}", api_key="none", max_retries=0, timeout=120)


def _ask(client: anthropic.Anthropic, body: dict[str, Any], stream: bool = False) -> Any:
    if not stream:
        return client.messages.create(**_arguments(body))
    with client.messages.stream(**_arguments(body)) as streamed:
        return streamed.get_final_message()


def _arguments(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a body; newer clients have none for the temperature."""
    return {
        **{name: body[name] for name in body if name != "temperature"},
        "extra_body": {"temperature": body["temperature"]},
    }


def _session(client: anthropic.Anthropic) -> str:
    return str(client.base_url).rstrip("/").rsplit("/", 1)[-1]


def _converse(client: anthropic.Anthropic, topic: str, turns: int = 3) -> None:
    messages: list[Any] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": [text(f"{topic} {turn} " * 60, **_EPHEMERAL)]})
        reply = _ask(client, {**_BODY, "system": "You are terse.", "max_tokens": 12, "messages": messages})
        messages.append({"role": "assistant", "content": reply.content})


def _until_called(client: anthropic.Anthropic, asked: dict[str, Any], stream: bool, calls: int = 1) -> Any:
    """Ask until so many tools are called: the model is random."""
    for _ in range(200):
        answer = _ask(client, asked, stream)
        if answer.stop_reason == "tool_use" and sum(block.type == "tool_use" for block in answer.content) >= calls:
            return answer
    raise AssertionError(f"never {calls} calls in one reply")


def _rendered(stack: Stack, path: str, body: dict[str, Any]) -> list[int]:
    answer = stack.engine.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["token_ids"])


def _events(stream: bytes) -> list[bytes]:
    """A stream's events; pieces that follow each other are one, because a busy engine sends several at once."""
    events: list[bytes] = []
    for event in stream.split(b"\n\n"):
        piece = re.fullmatch(rb'(.*"(?:text|partial_json)":")(.*)("},"index":\d+})', event, re.DOTALL)
        if piece and b"_delta" in piece[1] and events and events[-1].startswith(piece[1]):
            events[-1] = events[-1][: -len(piece[3])] + piece[2] + piece[3]
        else:
            events.append(event)
    return events


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message with lists where pydantic keeps iterators."""
    return {name: value if isinstance(value, (str, dict)) else list(value) for name, value in message.items()}

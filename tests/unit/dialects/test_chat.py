"""The chat dialect: requests written with as few changed bytes as can be, and replies read from what vLLM sends."""

import json
from typing import Any

import pytest

from gateway.dialects.base import PRIVATE_FIELDS, Call, Reply, with_fields
from gateway.dialects.chat import ChatDialect
from gateway.errors import GatewayError
from gateway.records import Usage
from tests.support.fakes.engine import DONE, chunk_event, delta, event, stream_of, usage_of

CHAT = ChatDialect()
SALT = "5a" * 16
USAGE = usage_of(120, 9, cached=96)


def finish(reason: str, index: int = 0, **fields: Any) -> bytes:
    """The event with which vLLM finishes a choice."""
    choice = {"index": index, "delta": fields, "logprobs": None, "finish_reason": reason, "stop_reason": None}
    return chunk_event([choice])


def tool(index: int, **fields: Any) -> bytes:
    """A piece of a tool call."""
    return delta(tool_calls=[{"index": index, **fields}])


def read(value: Any) -> tuple[Call, bytes]:
    """A request as the dialect gets it."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return CHAT.read(json.loads(raw), raw), raw


def streamed(*events: bytes) -> Reply:
    """A recorded stream, read at every cut: it has to be the same every time."""
    stream = b"".join(events)
    whole = CHAT.reply([stream], streamed=True)
    assert CHAT.reply([stream[i : i + 1] for i in range(len(stream))], streamed=True) == whole
    for cut in range(0, len(stream), 7):
        assert CHAT.reply([stream[:cut], stream[cut:]], streamed=True) == whole
    return whole


# --- replies in a stream, as recorded

WEATHER = [
    delta(role="assistant", content=""),
    tool(0, id="chatcmpl-tool-1", type="function", function={"name": "get_weather", "arguments": ""}),
    tool(0, function={"arguments": '{"ci'}),
    tool(0, function={"arguments": 'ty": "Zü'}),
    tool(0, function={"arguments": 'rich"}'}),
    finish("tool_calls"),
    chunk_event([], USAGE),
    DONE,
]
PARALLEL = [
    delta(role="assistant", content=""),
    delta(content="Let me look."),
    tool(0, id="a", type="function", function={"name": "one", "arguments": "{"}),
    tool(1, id="b", type="function", function={"name": "two", "arguments": '{"x":'}),
    tool(0, function={"arguments": "}"}),
    delta(
        tool_calls=[
            {"index": 1, "function": {"arguments": " 2}"}},
            {"index": 2, "id": "c", "type": "function", "function": {"name": "three", "arguments": "{}"}},
        ]
    ),
    finish("tool_calls"),
    DONE,
]


def call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_words_are_put_together_and_usage_is_read() -> None:
    reply = streamed(*stream_of(["Hel", "lo", " 日本", "語 🎉", ""], USAGE))
    assert reply == Reply({"role": "assistant", "content": "Hello 日本語 🎉"}, Usage(120, 9, 96), "")


def test_a_tool_call_in_pieces_is_one_call() -> None:
    reply = streamed(*WEATHER)
    assert reply.message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("get_weather", '{"city": "Zürich"}', "chatcmpl-tool-1")],
    }
    assert reply.usage == Usage(120, 9, 96)


def test_parallel_tool_calls_are_kept_apart_and_in_order() -> None:
    assert streamed(*PARALLEL).message == {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [call("one", "{}", "a"), call("two", '{"x": 2}', "b"), call("three", "{}", "c")],
    }


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_under_its_own_name_next_to_the_content(name: str) -> None:
    events = [delta(role="assistant", content=""), delta(**{name: "be"}), delta(**{name: "cause"}), delta(content="so")]
    assert streamed(*events, finish("stop"), DONE).message == {"role": "assistant", "content": "so", name: "because"}


def test_of_several_choices_the_first_is_the_conversation() -> None:
    def choice(index: int, text: str) -> bytes:
        return chunk_event([{"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}])

    both = chunk_event([{"index": 1, "delta": {"content": "!"}}, {"index": 0, "delta": {"content": "?"}}])
    events = [choice(1, "B"), choice(0, "A"), choice(1, "b"), choice(0, "a"), both, finish("stop"), finish("stop", 1)]
    assert streamed(*events, DONE).message == {"role": "assistant", "content": "Aa?"}


def test_usage_in_every_event_counts_as_its_last() -> None:
    growing = [chunk_event([{"index": 0, "delta": {"content": "x"}}], usage_of(10, n)) for n in range(1, 4)]
    assert streamed(*growing, finish("stop"), DONE).usage == Usage(10, 3, 0)


def test_logprobs_pings_and_empty_deltas_add_no_text() -> None:
    logprobs = chunk_event(
        [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": [{"token": "y"}]}, "finish_reason": None}]
    )
    events = [b": ping\n\n", delta(role="assistant"), delta(), logprobs, delta(content=None), chunk_event([])]
    assert streamed(*events, finish("length"), DONE).message == {"role": "assistant", "content": "x"}


def test_a_reply_without_a_word_is_still_a_reply() -> None:
    assert streamed(delta(role="assistant", content=""), finish("stop"), DONE).message == {
        "role": "assistant",
        "content": "",
    }


def test_an_error_event_in_a_stream_gives_no_reply() -> None:
    error = event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
    reply = streamed(*stream_of(["half"], USAGE)[:2], error, DONE)
    assert reply.message is None
    assert "EngineCore died" in reply.error


def test_a_null_error_in_an_event_is_no_error() -> None:
    reply = streamed(event({"choices": [{"index": 0, "delta": {"content": "x"}}], "error": None}), finish("stop"), DONE)
    assert (reply.error, reply.message) == ("", {"role": "assistant", "content": "x"})


@pytest.mark.parametrize("events", [WEATHER, PARALLEL, stream_of(["a", "b"], USAGE)])
def test_a_cut_stream_gives_no_reply(events: list[bytes]) -> None:
    stream = b"".join(events)
    whole = CHAT.reply([stream], streamed=True)
    assert whole.message is not None
    for cut in range(len(stream)):
        reply = CHAT.reply([stream[:cut]], streamed=True)
        if reply.message is not None:  # only the last line end may be missing, and then nothing else is
            assert reply == whole
        else:
            assert reply.error
    assert CHAT.reply([], streamed=True) == Reply(None, None, "the stream ended before [DONE]")


def test_an_event_other_than_a_json_object_makes_the_reply_unreadable() -> None:
    for odd in (b"data: [1]\n\n", b"data: {\n\n", b"data: x\n\n", b'data: "x"\n\n', b"data: {},{}\n\n"):
        reply = streamed(*stream_of(["a"])[:2], odd, *stream_of([])[1:])
        assert reply.message is None
        assert "not a JSON object" in reply.error


# --- whole replies


def whole(*messages: Any, usage: Any = USAGE) -> Reply:
    """A reply in one piece, read at every cut."""
    choices = [{"index": n, "message": m, "finish_reason": "stop"} for n, m in enumerate(messages)]
    raw = json.dumps({"id": "x", "choices": choices, "usage": usage}).encode()
    reply = CHAT.reply([raw], streamed=False)
    assert CHAT.reply([raw[i : i + 1] for i in range(len(raw))], streamed=False) == reply
    return reply


def test_empty_fields_of_a_reply_are_dropped() -> None:
    empty: dict[str, Any] = {
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
    }
    assert whole({"role": "assistant", "content": "Hi", **empty, "reasoning": None, "reasoning_content": ""}) == Reply(
        {"role": "assistant", "content": "Hi"}, Usage(120, 9, 96), ""
    )


def test_a_whole_reply_is_what_the_stream_of_it_would_have_been() -> None:
    calls = [call("get_weather", '{"city": "Zürich"}', "chatcmpl-tool-1")]
    assert whole({"role": "assistant", "content": "", "tool_calls": calls}).message == streamed(*WEATHER).message
    assert whole({"role": "assistant", "content": None, "tool_calls": calls}).message == {
        "role": "assistant", "content": None, "tool_calls": calls,
    }  # fmt: skip


def test_of_whole_choices_the_first_is_the_conversation() -> None:
    reply = whole({"role": "assistant", "content": "A", "reasoning": "r"}, {"role": "assistant", "content": "B"})
    assert reply.message == {"role": "assistant", "content": "A", "reasoning": "r"}


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"x", b"{}", b'{"choices": []}', b'{"choices": 7}', b'{"choices": [{}]}',
            b'{"choices": [{"message": null}]}', b'{"error": {"message": "no"}}', b'{"choices": [{"message": "x"}]}'],
)  # fmt: skip
def test_an_answer_without_a_message_gives_no_reply(raw: bytes) -> None:
    reply = CHAT.reply([raw], streamed=False)
    assert reply.message is None
    assert reply.error


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        (usage_of(5, 2, 4), Usage(5, 2, 4)),
        ({"prompt_tokens": 5}, Usage(5, 0, None)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(5, 2, None)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": None}}, Usage(5, 0, None)),
        ({"prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}, Usage(0, 0, 0)),
        (None, None),
        ({}, None),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": 5.0}, None),
        ({"prompt_tokens": True}, None),
    ],
)
def test_usage_is_only_what_the_engine_reported(usage: Any, read: Usage | None) -> None:
    assert whole({"role": "assistant", "content": "x"}, usage=usage).usage == read


# --- requests

HI = [{"role": "user", "content": "hi"}]
PLAIN = b'{ "model":"demo",\n"messages" : [{"role":"user","content":"\\u0068i"}], "temperature": 0.10, "seed": 1e2 }\n'


def test_an_unchanged_request_keeps_every_byte_and_gets_the_salt_appended() -> None:
    made, raw = read(PLAIN)
    written = CHAT.write_with_salt(made, SALT)
    assert written == raw.rstrip()[:-1] + b',"cache_salt":"' + SALT.encode() + b'"}'
    assert json.loads(written) == {**json.loads(PLAIN), "cache_salt": SALT}


def test_a_stream_without_usage_gets_it_asked_for_and_keeps_every_byte() -> None:
    made, raw = read(PLAIN.replace(b'"seed"', b'"stream": true, "seed"'))
    written = CHAT.write_with_salt(made, SALT)
    assert written.startswith(raw.rstrip()[:-1])
    assert json.loads(written)["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    assert made.hide_usage


@pytest.mark.parametrize(
    ("options", "hide"),
    [
        ({"include_usage": True}, False),
        ({"include_usage": True, "continuous_usage_stats": True}, False),
        ({"include_usage": False}, True),
        ({}, True),
        (None, True),
        ({"continuous_usage_stats": True, "x": 1}, True),
    ],
)
def test_usage_is_hidden_from_a_client_that_did_not_ask_for_it(options: Any, hide: bool) -> None:
    made, raw = read({"messages": HI, "stream": True, "stream_options": options})
    assert made.hide_usage is hide
    sent = json.loads(CHAT.write_with_salt(made, SALT))
    if not hide:
        assert CHAT.write_with_salt(made, SALT).startswith(raw[:-1])
        assert sent["stream_options"] == options
    else:
        assert sent["stream_options"] == {
            **(options or {}), "include_usage": True, "continuous_usage_stats": False,
        }  # fmt: skip


@pytest.mark.parametrize("stream", [False, None, "true", 1])
def test_only_a_stream_has_hidden_usage(stream: Any) -> None:
    made, _ = read({"messages": HI, "stream": stream})
    assert not made.hide_usage
    assert "stream_options" not in json.loads(CHAT.write_with_salt(made, SALT))


@pytest.mark.parametrize("options", ["x", 7, ["include_usage"], True])
def test_stream_options_that_the_engine_will_refuse_are_left_for_it_to_refuse(options: Any) -> None:
    made, _ = read({"messages": HI, "stream": True, "stream_options": options})
    assert json.loads(CHAT.write_with_salt(made, SALT))["stream_options"] == options


@pytest.mark.parametrize("name", PRIVATE_FIELDS)
def test_a_private_field_is_taken_out_wherever_the_engine_would_look_for_it(name: str) -> None:
    escaped = b'{"messages":[],"\\u00%02x%s": "mine", "top_p": 1}' % (ord(name[0]), name[1:].encode())
    for body in (
        json.dumps({"messages": HI, name: "mine"}).encode(),
        json.dumps({"messages": HI, "vllm_xargs": {name: "mine", "kept": 1}}).encode(),
        escaped,
        b'{"messages":[],"%s":1,"%s":"mine"}' % (name.encode(), name.encode()),
    ):
        made, _ = read(body)
        written = CHAT.write_with_salt(made, SALT)
        assert b"mine" not in written
        sent = json.loads(written)
        assert sent.pop("cache_salt") == SALT
        assert name not in sent
        assert sent.get("vllm_xargs", {"kept": 1}) == {"kept": 1}
        assert written.count(b'"cache_salt"') == 1


def test_only_the_clients_salt_is_remembered_and_only_from_its_own_field() -> None:
    for body, salt in (
        ({"cache_salt": "a"}, "a"),
        ({"cache_salt": ""}, ""),
        ({"cache_salt": None}, ""),
        ({"cache_salt": 7}, "7"),
        ({"vllm_xargs": {"cache_salt": "a"}}, ""),
        ({}, ""),
    ):
        made, _ = read({"messages": HI, **body})
        assert made.client_salt == salt


def test_names_deeper_down_are_the_clients_own() -> None:
    deep = {"messages": [{"role": "user", "content": "x", "cache_salt": "a"}], "tools": [{"priority": 1}]}
    made, raw = read(deep)
    assert CHAT.write_with_salt(made, SALT).startswith(raw[:-1])


@pytest.mark.parametrize("xargs", [None, "x", 7, ["cache_salt"], {}])
def test_odd_xargs_are_left_for_the_engine_to_refuse(xargs: Any) -> None:
    made, _ = read({"messages": HI, "vllm_xargs": xargs})
    assert json.loads(CHAT.write_with_salt(made, SALT))["vllm_xargs"] == xargs


@pytest.mark.parametrize("messages", [None, [], "x", 7, {"role": "user"}, [1], [None], ["x"], [[]]])
def test_messages_that_the_engine_will_refuse_are_relayed_unread(messages: Any) -> None:
    made, raw = read({"model": "demo", "messages": messages})
    assert made.messages == []
    assert CHAT.write_with_salt(made, SALT).startswith(raw[:-1])


@pytest.mark.parametrize(("model", "known"), [("demo", "demo"), (None, ""), (7, ""), (["demo"], ""), ("", "")])
def test_a_model_is_a_text(model: Any, known: str) -> None:
    assert read({"model": model, "messages": HI})[0].model == known


def test_the_frame_is_what_a_template_sees_besides_the_messages() -> None:
    frame = {
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"x": 1},
        "documents": [],
        "reasoning_effort": "low",
    }
    made, _ = read({"messages": HI, **frame, "temperature": 1, "tool_choice": None})
    assert made.frame == frame


def test_an_empty_object_gets_its_first_field() -> None:
    assert with_fields(b" { } ", {}, {"a": 1}) == b' { "a":1}'
    assert with_fields(b"", {"b": 2}, {"a": 1}) == b'{"b":2,"a":1}'


def test_a_body_too_deep_to_write_is_refused_in_words() -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = {"a": deep}
    made = CHAT.read({"messages": HI, "metadata": deep, "priority": 1}, b"")
    with pytest.raises(GatewayError, match="cannot be forwarded") as refused:
        CHAT.write_with_salt(made, SALT)
    assert refused.value.code == "invalid_request"


# --- errors in the shape of OpenAI


@pytest.mark.parametrize(
    ("code", "kind"), [("invalid_request", "invalid_request_error"), ("engine_timeout", "server_error")]
)
def test_an_error_has_the_shape_that_the_sdk_reads(code: str, kind: str) -> None:
    error = GatewayError(code, "what", hint="how")
    assert json.loads(CHAT.error(error)) == {
        "error": {"message": "what (how)", "type": kind, "param": None, "code": code}
    }
    assert json.loads(CHAT.error(GatewayError(code, "what")))["error"]["message"] == "what"
    reply = streamed(*stream_of(["half"])[:2], CHAT.error_event(error))
    assert reply.message is None
    assert "what" in reply.error

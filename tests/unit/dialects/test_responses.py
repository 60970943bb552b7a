"""The Responses dialect: what is read, written and answered, with nothing around it."""

import json
from typing import Any

import pytest

from gateway.dialects.base import PRIVATE_FIELDS, Call, Reply
from gateway.dialects.responses import ResponsesDialect
from gateway.errors import GatewayError
from gateway.records import Front, Usage
from tests.support.fakes.responses import called, event, response_of, said, stream_of, thought, usage_of

RESPONSES = ResponsesDialect()
SALT = "5a" * 16
USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be terse"}
USAGE = usage_of(120, 9, cached=96)


def read(value: Any) -> tuple[Call, bytes]:
    """A request as the dialect gets it."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return RESPONSES.read(json.loads(raw), raw), raw


def sent(value: Any) -> dict[str, Any]:
    """What the engine gets of a request."""
    written: dict[str, Any] = json.loads(RESPONSES.write_with_salt(read(value)[0], SALT))
    assert written.pop("cache_salt") == SALT
    return written


# --- requests


def test_a_text_is_a_users_message_and_instructions_come_before_it() -> None:
    made, _ = read({"model": "demo", "input": "hi", "instructions": "be terse"})
    assert (made.model, made.messages, made.hide_usage) == ("demo", [SYSTEM, USER], False)
    assert read({"input": "hi", "instructions": ""})[0].messages == [USER]
    assert read({"input": "hi", "instructions": None})[0].messages == [USER]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": None},
        {"input": 7},
        {"input": []},
        {"input": [1]},
        {"input": "x", "instructions": 7},
        {"input": "x", "prompt": {"id": "p"}},
        {"input": "x", "previous_input_messages": [{"role": "user"}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [USER, {**said("half"), "status": "incomplete"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
    ],
)
def test_what_has_no_words_in_chat_goes_through_as_it_is_and_is_not_recorded(body: Any) -> None:
    made, raw = read(body)
    assert made.messages == []
    assert RESPONSES.write_with_salt(made, SALT).startswith(raw[:-1])


@pytest.mark.parametrize("body", [{"input": "hi"}, {"input": "hi", "store": False}, {"input": "hi", "store": None}])
def test_the_clients_own_items_are_not_rewritten(body: Any) -> None:
    raw = json.dumps({**body, "top_p": 1, "big": 12345678901234567890123, "unknown": {"deep": [1]}}, indent=1).encode()
    made, _ = read(raw)
    written = RESPONSES.write_with_salt(made, SALT)
    assert written.startswith(raw.rstrip()[:-1].rstrip())
    assert json.loads(written)["store"] is body.get("store", False)


def test_what_is_the_gateways_own_to_do_never_reaches_the_engine() -> None:
    body = {"input": "hi", "store": True, "previous_response_id": "resp_1", "metadata": {"a": "b"}, "background": False}
    assert sent(body) == {"input": "hi", "store": False, "metadata": {"a": "b"}, "background": False}
    assert sent({"input": "hi", "conversation": {"id": "conv_1"}}) == {"input": "hi", "store": False}
    made, _ = read(body)
    assert made.storage is not None
    assert (made.storage.previous, made.storage.keep) == ("resp_1", True)


@pytest.mark.parametrize("name", PRIVATE_FIELDS)
def test_a_private_field_is_taken_out(name: str) -> None:
    assert name not in sent({"input": "hi", name: "mine"})
    assert sent({"input": "hi", "vllm_xargs": {name: "mine", "kept": 1}})["vllm_xargs"] == {"kept": 1}
    assert read({"input": "hi", "cache_salt": "mine"})[0].client_salt == "mine"


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"background": True}, "background", "background responses are not supported"),
        ({"previous_response_id": 7}, "previous_response_id", "must be a string"),
        ({"store": "yes"}, "store", "must be true or false"),
        ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id", "exclude each other"),
        ({"previous_response_id": "a", "conversation": {"id": "b"}}, "previous_response_id", "exclude each other"),
    ],
)
def test_what_the_gateway_cannot_do_is_refused_by_the_field(body: Any, field: str, says: str) -> None:
    with pytest.raises(GatewayError, match=says) as refused:
        read({"input": "hi", **body})
    error = json.loads(RESPONSES.error(refused.value))["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_request", field)


def test_the_frame_is_what_a_template_sees_besides_the_messages() -> None:
    tool = {"type": "function", "name": "now", "parameters": {}}
    made, _ = read(
        {
            "input": "hi", "tools": [tool], "tool_choice": {"type": "function", "name": "now"}, "temperature": 1,
            "reasoning": {"effort": "low", "summary": "auto"}, "chat_template_kwargs": {"x": 1},
            "parallel_tool_calls": False,
        }
    )  # fmt: skip
    assert made.frame == {
        "tools": [{"type": "function", "function": {"name": "now", "parameters": {}}}],
        "tool_choice": {"type": "function", "function": {"name": "now"}},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"x": 1},
        "parallel_tool_calls": False,
    }
    # The engine's chat refuses a choice without tools.
    assert read({"input": "hi", "tools": [{"type": "web_search"}], "tool_choice": "auto"})[0].frame == {}


# --- a window in front


def fronted(body: Any, front: Front) -> dict[str, Any]:
    """What the engine gets of a request with something in front."""
    made, _ = read(body)
    call = Call(made.body, made.raw, made.model, made.messages, made.frame, False, "", front, storage=made.storage)
    written: dict[str, Any] = json.loads(RESPONSES.write_with_salt(call, SALT))
    return written


HISTORY = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a"}]
ITEMS = [
    {"type": "message", "role": "user", "content": "1"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
    {"type": "message", "role": "user", "content": "hi"},
]


def test_a_history_is_prepended_as_items_and_instructions_are_unchanged() -> None:
    body = {"input": "hi", "instructions": "be terse", "user": "u"}
    written = fronted(body, Front(None, HISTORY))
    assert (written["instructions"], written["input"], written["user"]) == ("be terse", ITEMS, "u")


def test_a_windows_system_message_takes_the_place_of_the_instructions() -> None:
    other = {"role": "system", "content": "other"}
    written = fronted({"input": "hi", "instructions": "be terse"}, Front([other], HISTORY))
    assert "instructions" not in written
    assert written["input"] == [{"type": "message", **other}, *ITEMS]


def test_the_tools_of_a_window_take_the_form_of_this_api() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    written = fronted({"input": "hi"}, Front(None, HISTORY, {"tools": [tool], "chat_template_kwargs": {"x": 1}}))
    assert written["tools"] == [{"type": "function", "name": "now", "parameters": {}}]
    assert written["chat_template_kwargs"] == {"x": 1}


def test_the_reasoning_effort_of_a_window_joins_the_clients_own_options() -> None:
    body = {"input": "hi", "reasoning": {"summary": "auto"}}
    written = fronted(body, Front(None, HISTORY, {"reasoning_effort": "low"}))
    assert written["reasoning"] == {"summary": "auto", "effort": "low"}
    assert body["reasoning"] == {"summary": "auto"}


@pytest.mark.parametrize("name", ["chat_template", "documents"])
def test_a_window_that_this_api_cannot_say_is_refused(name: str) -> None:
    with pytest.raises(GatewayError, match=name):
        fronted({"input": "hi"}, Front(None, HISTORY, {name: "x"}))
    with pytest.raises(GatewayError, match="message 0"):
        fronted({"input": "hi"}, Front(None, [{"role": "function", "content": "x"}]))


# --- replies


def whole(*output: Any, **more: Any) -> Reply:
    """A reply in one piece."""
    return RESPONSES.reply([json.dumps(response_of({}, output, USAGE, **more)).encode()], streamed=False)


def streamed(*events: bytes) -> Reply:
    """A recorded stream, read at every cut: it has to be the same every time."""
    stream = b"".join(events)
    first = RESPONSES.reply([stream], streamed=True)
    assert RESPONSES.reply([stream[i : i + 1] for i in range(len(stream))], streamed=True) == first
    assert RESPONSES.reply([stream.replace(b"\n", b"\r\n")], streamed=True) == first
    return first


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_an_output_is_one_message_and_usage_is_read(status: str) -> None:
    output = [thought("because"), said("Hello 日本"), called("now", '{"a": 1}', "c1"), called("now", "{}", "c2")]
    response = response_of({}, output, USAGE, status=status)
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    message = {"role": "assistant", "reasoning": "because", "content": "Hello 日本", "tool_calls": calls}
    expected = Reply(message, Usage(120, 9, 96), "", response)
    assert RESPONSES.reply([json.dumps(response).encode()], streamed=False) == expected
    assert streamed(*stream_of(response)) == expected
    assert RESPONSES.reply([*stream_of(response), b"data: [DONE]\n\n"], streamed=True) == expected


def test_an_output_that_is_empty_is_a_reply_that_says_nothing() -> None:
    silent = {**said(""), "content": []}
    for reply in (whole(), whole(silent), whole(said(""))):
        assert reply.message == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "output", [[said("a"), said("b")], [{"type": "web_search_call", "id": "x"}], [called("a", "{}", "b"), 7]]
)
def test_an_output_that_is_not_one_message_is_kept_but_not_gone_on_from(output: Any) -> None:
    reply = whole(*output)
    assert (reply.message, reply.error, reply.usage) == (None, "", Usage(120, 9, 96))
    assert reply.answer is not None


def test_a_stream_without_its_end_gives_no_reply() -> None:
    events = stream_of(response_of({}, [said("one two")], USAGE))
    for count in range(len(events)):
        reply = streamed(*events[:count])
        assert (reply.message, reply.answer) == (None, None)
        assert "ended before response.completed" in reply.error


@pytest.mark.parametrize(
    "last",
    [
        event("error", 3, code="x", message="it broke", param=None),
        event("response.failed", 3, response=response_of({}, [], None, status="failed", error={"m": "it broke"})),
        b'data: {"error": {"message": "it broke"}}\n\n',
        event("response.completed", 3, response=response_of({}, [], None, status="failed", error="it broke")),
    ],
)
def test_an_error_event_in_a_stream_gives_no_reply(last: bytes) -> None:
    reply = streamed(*stream_of(response_of({}, [said("one")], USAGE))[:3], last)
    assert (reply.message, reply.answer) == (None, None)
    assert "it broke" in reply.error


@pytest.mark.parametrize("answer", [b"", b"[]", b"null", b"x", b"{}", b'{"output": 7}', b'{"output": null}'])
def test_an_unexpected_answer_gives_no_reply(answer: bytes) -> None:
    reply = RESPONSES.reply([answer], streamed=False)
    assert reply.message is None
    assert reply.error
    assert RESPONSES.reply([b"data: " + answer + b"\n\n"], streamed=True).message is None


@pytest.mark.parametrize("usage", [None, 7, {}, {"input_tokens": "x"}, {"input_tokens": True}])
def test_an_invalid_usage_is_ignored(usage: Any) -> None:
    answer = response_of({}, [said("a")], usage)
    assert RESPONSES.reply([json.dumps(answer).encode()], streamed=False).usage is None


def test_an_error_event_continues_the_sequence_numbers() -> None:
    error = GatewayError("engine_timeout", "no answer", hint="wait")
    events = stream_of(response_of({}, [said('"sequence_number":99 is said')], USAGE))[:-2]
    shown = RESPONSES.error_event(error, events)
    assert shown.startswith(b"event: error\ndata: ")
    assert json.loads(shown.split(b"data: ")[1]) == {
        "type": "error", "code": "engine_timeout", "message": "no answer (wait)", "param": None,
        "sequence_number": len(events),
    }  # fmt: skip
    assert json.loads(RESPONSES.error_event(error).split(b"data: ")[1])["sequence_number"] == 0
    assert "no answer" in streamed(*events, shown).error

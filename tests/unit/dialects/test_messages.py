"""The Messages dialect by itself: streams as vLLM sends them, requests with as few changed bytes as can be."""

import json
from typing import Any

import pytest
from msgspec import structs

from gateway.dialects.base import PRIVATE_FIELDS, Call, Reply
from gateway.records import Front, Usage
from tests.support.messages_api import (
    AS_SENT,
    BODY,
    HI,
    MESSAGES,
    PARALLEL,
    PARALLEL_MESSAGE,
    USAGE,
    block,
    end,
    event,
    start,
    tool,
    words,
)
from tests.unit.dialects.test_messages_to_chat import text, use

SALT = "5a" * 16


PLAIN = [start(), words(0, "Hel", "lo", " 日本", "語 🎉"), end()]


def read(value: Any) -> tuple[Call, bytes]:
    """A request as the dialect gets it."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return MESSAGES.read(json.loads(raw), raw), raw


def streamed(*events: bytes) -> Reply:
    """A recorded stream, read at every cut: it has to be the same every time."""
    stream = b"".join(events)
    whole = MESSAGES.reply([stream], streamed=True)
    for cut in range(0, len(stream), 5):
        assert MESSAGES.reply([stream[:cut], stream[cut:]], streamed=True) == whole
    assert MESSAGES.reply([stream[i : i + 1] for i in range(len(stream))], streamed=True) == whole
    assert MESSAGES.reply([stream.replace(b"\n", b"\r\n")], streamed=True) == whole
    return whole


def in_one_piece(content: Any, usage: Any = USAGE) -> Reply:
    raw = json.dumps({"id": "x", "type": "message", "role": "assistant", "content": content, "usage": usage}).encode()
    return MESSAGES.reply([raw[:9], raw[9:]], streamed=False)


def test_words_are_put_together_and_the_whole_prompt_is_counted() -> None:
    assert streamed(*PLAIN) == Reply({"role": "assistant", "content": "Hello 日本語 🎉"}, Usage(120, 9, 96))


def test_thinking_words_and_parallel_tools_are_one_message() -> None:
    assert streamed(*PARALLEL) == Reply(PARALLEL_MESSAGE, Usage(120, 9, 96))


def test_a_reply_in_one_piece_is_what_the_stream_of_it_would_have_been() -> None:
    content = [
        {"type": "thinking", "thinking": "because", "signature": "s"},
        text("Let me look."),
        use("chatcmpl-tool-1", "get_weather", {"city": "Zürich"}),
        use("chatcmpl-tool-2", "now", {}),
        use("chatcmpl-tool-3", "now", {}),
    ]
    assert in_one_piece(content) == Reply(PARALLEL_MESSAGE, Usage(120, 9, 96))


def test_a_reply_is_what_read_makes_of_it_when_it_is_sent_back() -> None:
    content = [text("Look: "), use("a", "f", {"x": [1, None, "ü"]}), text("done")]
    made, _ = read({**BODY, "messages": [*HI, {"role": "assistant", "content": content}]})
    assert in_one_piece(content).message == made.messages[-1]
    pieces = words(0, "Lo", "ok: ") + tool(1, "a", "f", '{"x":[1,nu', 'll,"ü"]}') + words(2, "done")
    assert streamed(start(), pieces, end()).message == made.messages[-1]


@pytest.mark.parametrize("content", [[text("")], []])
def test_a_reply_without_a_word_is_still_a_reply(content: list[Any]) -> None:
    assert in_one_piece(content).message == {"role": "assistant"}
    assert streamed(start(), *(words(0) for _ in content), end()).message == {"role": "assistant"}


def test_pings_and_unknown_events_add_no_text() -> None:
    odd = [event("ping"), b": keep-alive\n\n", event("later", index=0), event("message_delta", delta={})]
    citation = block(0, text("x"), {"type": "citations_delta", "citation": {}}, {"type": "text_delta", "text": "y"})
    assert streamed(start(), *odd, citation, end()).message == {"role": "assistant", "content": "xy"}


@pytest.mark.parametrize("recording", [PLAIN, PARALLEL])
def test_a_cut_stream_gives_no_reply(recording: list[bytes]) -> None:
    stream = b"".join(recording)
    whole = MESSAGES.reply([stream], streamed=True)
    for cut in range(len(stream)):
        reply = MESSAGES.reply([stream[:cut]], streamed=True)
        if reply.message is not None:  # only the last line end may be missing, and then nothing else is
            assert (reply, len(stream) - cut) == (whole, 1)
        else:
            assert reply.error == "the stream ended before message_stop"


def test_an_error_event_in_a_stream_gives_no_reply() -> None:
    error = event("error", error={"type": "internal_error", "message": "EngineCore died"})
    for events in ([start(), error], [*PLAIN, error], [start(), error, words(0, "x"), end()]):
        reply = streamed(*events)
        assert reply.message is None
        assert "EngineCore died" in reply.error


@pytest.mark.parametrize("pieces", [('{"cut": ',), ("6", "33e3"), ("[1]",), ("null",)])
def test_arguments_other_than_an_object_give_no_reply_to_continue(pieces: tuple[str, ...]) -> None:
    reply = streamed(start(), tool(0, "a", "f", *pieces), end("max_tokens"))
    assert reply == Reply(None, Usage(120, 9, 96), "the arguments of a tool call are not a JSON object")


@pytest.mark.parametrize(
    "odd",
    [
        b"event: x\ndata: [1]\n\n",
        b"event: x\ndata: {\n\n",
        b"data: [DONE]\n\n",
        event("content_block_start", index="0", content_block={}),
        event("content_block_start", index=0),
        event("content_block_delta", index=7, delta={"type": "text_delta", "text": "x"}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": 7}),
        event("content_block_delta", index=0, delta="x"),
        event("content_block_delta"),
        block(1, {"type": "later_block"}),
    ],
)
def test_a_stream_without_a_message_gives_no_reply(odd: bytes) -> None:
    reply = streamed(start(), words(0, "x"), odd, end())
    assert reply.message is None
    assert reply.error


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"{}", b'{"content": null}', b'{"content": "x"}', b'{"content": [1]}',
            b'{"content": [{"type": "text", "text": 1}]}', b'{"type": "error", "error": {}}'],
)  # fmt: skip
def test_an_answer_without_a_message_gives_no_reply(raw: bytes) -> None:
    reply = MESSAGES.reply([raw], streamed=False)
    assert reply.message is None
    assert reply.error


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        (USAGE, Usage(120, 9, 96)),
        ({"input_tokens": 5, "output_tokens": 2}, Usage(5, 2, None)),
        ({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": None}, Usage(5, 2, None)),
        ({"input_tokens": 0, "cache_read_input_tokens": 7}, Usage(7, 0, 7)),
        ({"output_tokens": 2}, None),
        ({"input_tokens": -1}, None),
        ({"input_tokens": "5"}, None),
        ({"input_tokens": True}, None),
        ({"input_tokens": 2**63}, None),
        ({}, None),
        (None, None),
        ([1], None),
    ],
)
def test_usage_is_only_what_the_engine_reported(usage: Any, read: Usage | None) -> None:
    assert in_one_piece([text("x")], usage).usage == read


def test_a_final_usage_of_the_reply_alone_keeps_the_prompts_count() -> None:
    assert streamed(start(50), words(0, "x"), end(usage={"output_tokens": 3})).usage == Usage(50, 3, None)
    assert streamed(start(50), words(0, "x"), end(usage=None)).usage == Usage(50, 0, None)
    assert streamed(words(0, "x"), end(usage={"output_tokens": 3})).usage is None
    assert streamed(event("message_start"), words(0, "x"), end(usage={})).usage is None


def test_a_request_keeps_every_byte_and_gets_the_salt_behind_them() -> None:
    made, raw = read(AS_SENT)
    assert MESSAGES.write_with_salt(made, SALT) == raw.rstrip()[:-1] + b',"cache_salt":"' + SALT.encode() + b'"}'
    assert MESSAGES.question(made) == raw
    assert made.messages == HI
    assert not made.hide_usage


def test_a_streamed_request_needs_no_usage_option() -> None:
    made, raw = read({**BODY, "stream": True})
    assert MESSAGES.write_with_salt(made, SALT).startswith(raw[:-1])
    assert not made.hide_usage


@pytest.mark.parametrize("name", PRIVATE_FIELDS)
def test_a_private_field_is_taken_out(name: str) -> None:
    for body in ({**BODY, name: "mine"}, {**BODY, "vllm_xargs": {name: "mine", "kept": 1}}):
        made, _ = read(body)
        for written in (MESSAGES.write_with_salt(made, SALT), MESSAGES.question(made)):
            assert b"mine" not in written
            assert json.loads(written).get("vllm_xargs", {"kept": 1}) == {"kept": 1}
        assert made.client_salt == ("mine" if name == "cache_salt" and name in body else "")


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "robot", "content": "x"}]}, {"messages": "x"}, {"messages": None}, {"system": 7},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, {"tools": [{"name": "web_search"}]},
        {"tools": 7}, {"thinking": "on"}, {"messages": []},
    ],
)  # fmt: skip
def test_a_request_that_the_engine_will_refuse_is_relayed_unread(change: dict[str, Any]) -> None:
    made, raw = read({**BODY, **change})
    assert (made.messages, made.frame) == ([], {})
    assert MESSAGES.write_with_salt(made, SALT).startswith(raw[:-1])


@pytest.mark.parametrize(("model", "known"), [("demo", "demo"), (None, ""), (7, ""), (["demo"], "")])
def test_a_model_is_a_text(model: Any, known: str) -> None:
    assert read({**BODY, "model": model})[0].model == known


def test_a_history_is_prepended_and_the_clients_messages_are_unchanged() -> None:
    made, _ = read(AS_SENT)
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fronted = structs.replace(made, front=Front(None, history))
    written = json.loads(MESSAGES.write_with_salt(fronted, SALT))
    before = [history[0], {"role": "assistant", "content": [text("b")]}]
    assert written == {
        **json.loads(AS_SENT), "messages": [*before, *json.loads(AS_SENT)["messages"]], "cache_salt": SALT,
    }  # fmt: skip
    assert json.loads(MESSAGES.question(fronted)) == {k: v for k, v in written.items() if k != "cache_salt"}

"""The Messages dialect: streams as vLLM sends them, requests with as few changed bytes as can be, and its errors."""

import json
from dataclasses import replace
from typing import Any

import anthropic
import pytest

from gateway.dialects.base import PRIVATE_FIELDS, Call, Reply
from gateway.dialects.messages import MessagesDialect
from gateway.errors import CODES, GatewayError
from gateway.records import Front, Usage
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient
from tests.unit.dialects.test_messages_to_chat import call, text, use

MESSAGES = MessagesDialect()
SALT = "5a" * 16
PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": HI}


def event(kind: str, **fields: Any) -> bytes:
    """One event, spelt as vLLM spells it."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n".encode()


def start(prompt: int = 120) -> bytes:
    usage = {"input_tokens": prompt, "output_tokens": 0}
    head = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [], "model": MODEL}
    return event("message_start", message={**head, "stop_reason": None, "stop_sequence": None, "usage": usage})


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    begun = event("content_block_start", content_block=content, index=index)
    pieces = b"".join(event("content_block_delta", delta=delta, index=index) for delta in deltas)
    return begun + pieces + event("content_block_stop", index=index)


def words(index: int, *pieces: str) -> bytes:
    return block(index, text(""), *({"type": "text_delta", "text": piece} for piece in pieces))


def thought(index: int, *pieces: str) -> bytes:
    signed = {"type": "signature_delta", "signature": "50b20169"}
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    return block(index, {"type": "thinking", "thinking": ""}, *deltas, signed)


def tool(index: int, call_id: str, name: str, *pieces: str) -> bytes:
    return block(index, use(call_id, name, {}), *({"type": "input_json_delta", "partial_json": p} for p in pieces))


# As vLLM counts: the whole prompt at first, at the end without what was cached or is cached now.
USAGE = {
    "input_tokens": 8,
    "output_tokens": 9,
    "cache_creation_input_tokens": 16,
    "cache_read_input_tokens": 96,
}


def end(reason: str = "end_turn", usage: Any = USAGE) -> bytes:
    last = event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=usage)
    return last + event("message_stop")


PLAIN = [start(), words(0, "Hel", "lo", " 日本", "語 🎉"), end()]
PARALLEL = [
    start(),
    thought(0, "be", "cause"),
    words(1, "Let me look."),
    tool(2, "chatcmpl-tool-1", "get_weather", '{"', "city", '": "Zü', 'rich"}'),
    tool(3, "chatcmpl-tool-2", "now", "{}"),
    tool(4, "chatcmpl-tool-3", "now"),
    end("tool_use"),
]
PARALLEL_MESSAGE = {
    "role": "assistant",
    "reasoning": "because",
    "content": "Let me look.",
    "tool_calls": [
        call("chatcmpl-tool-1", "get_weather", '{"city": "Z\\u00fcrich"}'),
        call("chatcmpl-tool-2", "now", "{}"),
        call("chatcmpl-tool-3", "now", "{}"),
    ],
}


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


# --- replies


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


def test_pings_and_events_of_later_versions_are_no_words() -> None:
    odd = [event("ping"), b": keep-alive\n\n", event("later", index=0), event("message_delta", delta={})]
    citation = block(0, text("x"), {"type": "citations_delta", "citation": {}}, {"type": "text_delta", "text": "y"})
    assert streamed(start(), *odd, citation, end()).message == {"role": "assistant", "content": "xy"}


@pytest.mark.parametrize("recording", [PLAIN, PARALLEL])
def test_a_stream_that_was_cut_is_never_taken_for_a_reply(recording: list[bytes]) -> None:
    stream = b"".join(recording)
    whole = MESSAGES.reply([stream], streamed=True)
    for cut in range(len(stream)):
        reply = MESSAGES.reply([stream[:cut]], streamed=True)
        if reply.message is not None:  # only the last line end may be missing, and then nothing else is
            assert (reply, len(stream) - cut) == (whole, 1)
        else:
            assert reply.error == "the stream ended before message_stop"


def test_an_error_inside_a_stream_is_no_reply() -> None:
    error = event("error", error={"type": "internal_error", "message": "EngineCore died"})
    for events in ([start(), error], [*PLAIN, error], [start(), error, words(0, "x"), end()]):
        reply = streamed(*events)
        assert reply.message is None
        assert "EngineCore died" in reply.error


@pytest.mark.parametrize("pieces", [('{"cut": ',), ("6", "33e3"), ("[1]",), ("null",)])
def test_arguments_that_are_no_object_are_no_reply_to_go_on_with(pieces: tuple[str, ...]) -> None:
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
def test_a_stream_that_is_none_of_a_message_is_no_reply(odd: bytes) -> None:
    reply = streamed(start(), words(0, "x"), odd, end())
    assert reply.message is None
    assert reply.error


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"{}", b'{"content": null}', b'{"content": "x"}', b'{"content": [1]}',
            b'{"content": [{"type": "text", "text": 1}]}', b'{"type": "error", "error": {}}'],
)  # fmt: skip
def test_what_holds_no_message_is_no_reply(raw: bytes) -> None:
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
def test_usage_is_what_the_engine_said_and_nothing_is_made_up(usage: Any, read: Usage | None) -> None:
    assert in_one_piece([text("x")], usage).usage == read


def test_an_end_that_counts_the_reply_alone_leaves_the_prompt_as_it_was_counted() -> None:
    assert streamed(start(50), words(0, "x"), end(usage={"output_tokens": 3})).usage == Usage(50, 3, None)
    assert streamed(start(50), words(0, "x"), end(usage=None)).usage == Usage(50, 0, None)
    assert streamed(words(0, "x"), end(usage={"output_tokens": 3})).usage is None
    assert streamed(event("message_start"), words(0, "x"), end(usage={})).usage is None


# --- requests

AS_SENT = (
    b'{ "model":"demo", "max_tokens": 9,\n"messages" : [{"role":"user","content":[{"type":"text","text":"\\u0068i",'
    b'"cache_control":{"type":"ephemeral"}}]}], "temperature": 0.10, "metadata": {"user_id": "u"} }\n'
)


def test_a_request_keeps_every_byte_and_gets_the_salt_behind_them() -> None:
    made, raw = read(AS_SENT)
    assert MESSAGES.write(made, SALT) == raw.rstrip()[:-1] + b',"cache_salt":"' + SALT.encode() + b'"}'
    assert MESSAGES.question(made) == raw
    assert made.messages == HI
    assert not made.hide_usage


def test_a_stream_needs_nothing_to_be_asked_for() -> None:
    made, raw = read({**BODY, "stream": True})
    assert MESSAGES.write(made, SALT).startswith(raw[:-1])
    assert not made.hide_usage


@pytest.mark.parametrize("name", PRIVATE_FIELDS)
def test_a_private_field_is_taken_out(name: str) -> None:
    for body in ({**BODY, name: "mine"}, {**BODY, "vllm_xargs": {name: "mine", "kept": 1}}):
        made, _ = read(body)
        for written in (MESSAGES.write(made, SALT), MESSAGES.question(made)):
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
def test_what_the_engine_will_refuse_is_no_turn_and_goes_through_as_it_is(change: dict[str, Any]) -> None:
    made, raw = read({**BODY, **change})
    assert (made.messages, made.frame) == ([], {})
    assert MESSAGES.write(made, SALT).startswith(raw[:-1])


@pytest.mark.parametrize(("model", "known"), [("demo", "demo"), (None, ""), (7, ""), (["demo"], "")])
def test_a_model_is_a_text(model: Any, known: str) -> None:
    assert read({**BODY, "model": model})[0].model == known


def test_a_front_comes_before_the_clients_own_words_which_stay_as_they_are() -> None:
    made, _ = read(AS_SENT)
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fronted = replace(made, front=Front(None, history))
    written = json.loads(MESSAGES.write(fronted, SALT))
    before = [history[0], {"role": "assistant", "content": [text("b")]}]
    assert written == {
        **json.loads(AS_SENT), "messages": [*before, *json.loads(AS_SENT)["messages"]], "cache_salt": SALT,
    }  # fmt: skip
    assert json.loads(MESSAGES.question(fronted)) == {k: v for k, v in written.items() if k != "cache_salt"}


# --- errors

KINDS = {
    "invalid_request": "invalid_request_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "window_not_found": "not_found_error",
    "session_busy": "conflict_error",
    "payload_too_large": "request_too_large",
    "rate_limited": "rate_limit_error",
    "internal": "api_error",
    "engine_unreachable": "api_error",
    "cache_unavailable": "overloaded_error",
    "engine_timeout": "timeout_error",
    "request_timeout": "timeout_error",
    "storage_full": "api_error",
    "window_corrupted": "invalid_request_error",
}


@pytest.mark.parametrize("code", CODES)
def test_every_error_has_anthropics_shape_and_our_code(code: str) -> None:
    told = json.loads(MESSAGES.error(GatewayError(code, "so it is", hint="do this")))
    assert told.keys() == {"type", "error", "request_id"}
    assert told["type"] == "error"
    assert told["error"]["message"] == "so it is (do this)"
    assert told["error"]["code"] == told["error"]["details"]["error_code"] == code
    assert told["error"]["type"] == KINDS.get(code, told["error"]["type"])
    assert told["error"]["type"].endswith(("_error", "request_too_large"))


def test_an_error_event_ends_a_stream_as_the_client_expects_it() -> None:
    last = MESSAGES.error_event(GatewayError("engine_unreachable", "it died"))
    assert last.startswith(b"event: error\ndata: ")
    reply = MESSAGES.reply([start(), last], streamed=True)
    assert "it died" in reply.error


# --- through the gateway


def answer(exchange: Exchange) -> None:
    """Answer as vLLM does."""
    if exchange.request.path not in (PATH, COUNT):
        exchange.json({"detail": "Not Found"}, 404)
    elif exchange.request.path == COUNT:
        exchange.json({"input_tokens": len(exchange.request.json["messages"])})
    elif exchange.request.json.get("stream"):
        exchange.begin()
        for piece in PARALLEL:
            exchange.chunk(piece)
        exchange.end()
    else:
        exchange.json({"type": "message", "role": "assistant", "content": [text("Hello")], "usage": USAGE})


def talk(gateway: Gateway, session: str, path: str = PATH, **body: Any) -> Any:
    return gateway.http.post(path, json={**BODY, **body}, headers={"x-session-id": session})


def test_a_turn_is_recorded_in_canonical_words(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    engine.on_other = answer
    assert talk(gateway, session, system="Be terse.").json()["content"] == [text("Hello")]
    gateway.turns(session)
    state = gateway.http.get(f"/admin/sessions/{session}").json()
    assert (state["token_count"], state["turns"][0]["outcome"]) == (129, "completed")
    gateway.freeze(session, f"w-{session}").raise_for_status()
    kept = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"]
    assert kept == [{"role": "system", "content": "Be terse."}, *HI, {"role": "assistant", "content": "Hello"}]


def test_a_stream_passes_byte_for_byte_and_its_reply_is_kept(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_other = answer
    with RawHttpClient(gateway.url) as wire:
        wire.post(PATH, json.dumps({**BODY, "stream": True}).encode(), f"x-session-id: {session}")
        assert wire.head() == 200
        assert wire.chunks() == PARALLEL
    gateway.turns(session)
    gateway.freeze(session, f"w-{session}").raise_for_status()
    kept = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"]
    assert kept[-1] == PARALLEL_MESSAGE


def test_a_window_begun_in_chat_goes_on_in_messages_and_back_with_the_same_salt(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_other = answer
    gateway.chat(session, "hello")
    gateway.freeze(session, f"w-{session}").raise_for_status()
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()
    talk(gateway, thawed["session_id"])
    (request,) = engine.seen(PATH)
    assert request.json["cache_salt"] == thawed["cache_salt"]
    front = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [text("Hello there!")]}]
    assert request.json["messages"] == [*front, *HI]
    gateway.turns(thawed["session_id"])
    gateway.freeze(thawed["session_id"], f"v-{session}").raise_for_status()
    again = gateway.http.post(f"/admin/windows/v-{session}/thaw", json={}).json()
    gateway.chat(again["session_id"], "and now?")
    last = engine.seen("/v1/chat/completions")[-1].json
    assert last["cache_salt"] == thawed["cache_salt"]
    assert [m["content"] for m in last["messages"]] == ["hello", "Hello there!", "hi", "Hello", "and now?"]


def test_a_number_beyond_64_bits_in_a_tool_call_goes_on_in_either_api_as_the_model_wrote_it(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_other = answer
    number = "1" + "0" * 20
    count = call("c1", "count", f'{{"n": {number}}}')
    reply = whole_reply("", usage_of(5, 5))
    reply["choices"][0]["message"]["tool_calls"] = [count]
    engine.on_chat = lambda exchange: exchange.json(reply)
    gateway.chat(session, "hello")
    gateway.turns(session)
    gateway.freeze(session, f"w-{session}").raise_for_status()
    for dialect in ("messages", "chat"):
        thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={})
        assert thawed.status_code == 200, thawed.text
        here = thawed.json()["session_id"]
        gone_on = talk(gateway, here) if dialect == "messages" else gateway.chat(here, "and now?")
        assert gone_on.status_code == 200, gone_on.text
    assert f'"input": {{"n": {number}}}'.encode() in engine.seen(PATH)[-1].body
    (again,) = engine.seen("/v1/chat/completions")[-1].json["messages"][1]["tool_calls"]
    assert again["function"]["arguments"] == count["function"]["arguments"]


def test_tokens_are_counted_with_what_the_engine_would_get_in_front(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_other = answer
    assert talk(gateway, f"{session}-new", COUNT).json() == {"input_tokens": 1}
    assert gateway.http.post(COUNT, content=AS_SENT, headers={"content-type": "application/json"}).json() == {
        "input_tokens": 1
    }
    assert engine.seen(COUNT)[-1].body == AS_SENT
    gateway.chat(session, "hello")
    gateway.freeze(session, f"w-{session}").raise_for_status()
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    assert talk(gateway, thawed, COUNT).json() == {"input_tokens": 3}
    for path in (f"/s/{thawed}{COUNT}", f"/s/{thawed}/v1/messages/count%5Ftokens/"):
        assert gateway.http.post(path, json=BODY).json() == {"input_tokens": 3}
    assert "cache_salt" not in engine.seen(COUNT)[-1].json
    assert gateway.http.get(f"/admin/sessions/{session}-new").status_code == 404


def test_tokens_are_counted_as_a_conversation_begun_under_a_window_would_have_them(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_other = answer
    tool = {"name": "now", "input_schema": {"type": "object"}}
    talk(gateway, session, tools=[tool])
    gateway.freeze(session, f"w-{session}").raise_for_status()
    billing = text("x-anthropic-billing-header: cc_version=2.1.0; cch=a1b2c;")
    for headers in ({}, {"x-session-id": f"{session}-new"}):
        response = gateway.http.post(f"/w/w-{session}{COUNT}", json={**BODY, "system": [billing]}, headers=headers)
        assert response.json() == {"input_tokens": 3}
        asked = engine.seen(COUNT)[-1].json
        assert asked["tools"] == [tool]
        assert "billing" not in json.dumps(asked)
    assert _failed(gateway, f"/w/nobody{COUNT}", BODY, {}) == (404, "not_found_error", "window_not_found")
    refused = gateway.http.post(f"/w/w-{session}{COUNT}", json={**BODY, "messages": "x"})
    assert engine.seen(COUNT)[-1].json["messages"] == "x"
    assert refused.status_code == 200  # that is for the engine to say


def test_what_the_messages_api_has_no_words_for_is_refused_before_the_engine_sees_it(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "developer", "content": "y"}, *HI]
    gateway.http.post("/v1/chat/completions", json={**BODY, "messages": messages}, headers={"x-session-id": session})
    gateway.freeze(session, f"w-{session}").raise_for_status()
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    for path in (PATH, COUNT):
        response = talk(gateway, thawed, path)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
        assert "developer" in error["message"]
        assert engine.seen(path) == []


def test_headers_of_the_api_pass_and_the_engines_refusals_come_back_untouched(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    refusal = {"error": {"message": "Input should be 'user', 'assistant' or 'system'", "code": 400}}
    engine.on_other = lambda exchange: exchange.json(refusal, 400)
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x-1", "x-session-id": session}
    body = {**BODY, "messages": [{"role": "robot", "content": "x"}]}
    response = gateway.http.post(f"{PATH}?beta=true", json=body, headers=headers)
    assert (response.status_code, response.json()) == (400, refusal)
    (request,) = engine.seen(PATH)
    assert request.target == f"{PATH}?beta=true"
    assert (request.header("anthropic-version"), request.header("anthropic-beta")) == (["2023-06-01"], ["x-1"])


def test_errors_that_come_before_the_body_is_read_have_the_shape_of_their_path(
    engine: FakeEngine, tmp_path: Any
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="key", max_body_bytes=2000) as gateway:
        large = {**BODY, "system": "x" * 3000}
        for path in (PATH, COUNT, f"/s/a{PATH}", f"/s/a{COUNT}"):
            assert _failed(gateway, path, BODY, {"x-api-key": "wrong"}) == (401, "authentication_error", "unauthorized")
            assert _failed(gateway, path, large, {}) == (413, "request_too_large", "payload_too_large")
            assert _failed(gateway, path, 7, {}) == (400, "invalid_request_error", "invalid_request")
        bad_id = _failed(gateway, f"/s/-{PATH}", BODY, {})
        assert bad_id == (400, "invalid_request_error", "invalid_session_id")
        chat = gateway.http.post("/v1/chat/completions", json=7).json()
        assert chat.keys() == {"error"}


def _failed(gateway: Gateway, path: str, body: Any, headers: dict[str, str]) -> tuple[int, str, str]:
    response = gateway.http.post(path, json=body, headers=headers)
    told = response.json()
    assert told["type"] == "error"
    return response.status_code, told["error"]["type"], told["error"]["code"]


def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error_the_client_raises(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def half(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(start() + words(0, "half")[:150])
        exchange.cut()

    engine.on_other = half
    # Words of its own: the same ones without an id would be taken for another try of this turn.
    body = {**BODY, "messages": [{"role": "user", "content": f"die, {session}"}]}
    with _client(gateway, session) as client, pytest.raises(anthropic.APIStatusError, match="closed") as raised:
        for _ in client.messages.create(**body, stream=True):
            pass
    assert raised.value.error_code == "engine_unreachable"
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_cut"


def test_the_anthropic_client_reads_our_errors(engine: FakeEngine, tmp_path: Any) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="key") as gateway:
        with _client(gateway, "a") as client, pytest.raises(anthropic.AuthenticationError) as raised:
            client.messages.create(**BODY)
        assert raised.value.error_code == "unauthorized"
        engine.on_other = answer
        with anthropic.Anthropic(base_url=gateway.url, api_key="key", max_retries=0) as client:
            assert client.messages.create(**BODY).content[0].text == "Hello"
            assert [model.id for model in client.models.list()] == [MODEL]


def _client(gateway: Gateway, session: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"{gateway.url}/s/{session}", api_key="none", max_retries=0)

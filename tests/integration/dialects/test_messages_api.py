"""The Messages API of a gateway: turns, token counts, and errors in Anthropic's shape."""

import json
from typing import Any

import anthropic
import pytest

from gateway.errors import CODES, GatewayError
from tests.support.conversations import without_turns
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.messages_api import AS_SENT, BODY, HI, MESSAGES, PARALLEL, PARALLEL_MESSAGE, USAGE, start, words
from tests.support.raw_http import RawHttpClient
from tests.unit.dialects.test_messages_to_chat import call, text

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"


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


def test_a_turn_is_recorded_in_canonical_form(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    engine.on_other = answer
    assert talk(gateway, session, system="Be terse.").json()["content"] == [text("Hello")]
    gateway.turns(session)
    state = gateway.http.get(f"/admin/sessions/{session}").json()
    assert (state["token_count"], state["turns"][0]["outcome"]) == (129, "completed")
    gateway.freeze(session, f"w-{session}").raise_for_status()
    kept = without_turns(gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"])
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
    kept = without_turns(gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"])
    assert kept[-1] == PARALLEL_MESSAGE


def test_a_chat_window_continues_in_messages_and_back_with_the_same_salt(
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


def test_a_number_beyond_64_bits_in_a_tool_call_is_kept_as_written(
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


def test_tokens_are_counted_with_the_prepended_history(engine: FakeEngine, gateway: Gateway, session: str) -> None:
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


def test_tokens_under_a_window_url_are_counted_with_the_window(
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


def test_a_history_the_messages_api_cannot_express_is_refused(
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


def test_errors_before_the_body_is_read_have_the_shape_of_their_path(engine: FakeEngine, tmp_path: Any) -> None:
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


def test_an_engine_that_dies_mid_stream_makes_the_client_raise(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def half(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(start() + words(0, "half")[:150])
        exchange.cut()

    engine.on_other = half
    # Unique text: the same without an id would be taken for a retry of this turn.
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

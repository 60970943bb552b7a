"""Text completions as turns of a session: the dialect, and a gateway in front of an engine that can misbehave."""

import json
from typing import Any

import openai
import pytest

from gateway.dialects import transcripts
from gateway.dialects.base import Call, Reply
from gateway.dialects.completions import CompletionsDialect
from gateway.errors import GatewayError
from gateway.records import Front, Usage
from tests.support.conversations import without_turns
from tests.support.fakes.engine import DONE, MODEL, FakeEngine, event, text_event, texts_of, usage_of
from tests.support.gateway_process import Gateway
from tests.support.raw_http import RawHttpClient

COMPLETIONS = "/v1/completions"
DIALECT = CompletionsDialect()
SALT = "5a" * 16
HI = {"role": "user", "content": "hi"}
USAGE = usage_of(120, 9, cached=96)


def read(value: Any) -> tuple[Call, bytes]:
    """A request as the dialect gets it."""
    raw = json.dumps(value).encode()
    return DIALECT.read(json.loads(raw), raw), raw


def text(content: str) -> list[dict[str, Any]]:
    return [{"role": "text", "content": content}]


def row(*ids: int) -> list[dict[str, Any]]:
    return [{"role": "tokens", "content": list(ids)}]


# --- requests


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("Once", text("Once")),
        (["Once"], text("Once")),
        ([5, 6], row(5, 6)),
        ([[5, 6]], row(5, 6)),
        (["one", "two"], []),
        ([[1], [2]], []),
        ("", []),
        ([], []),
        ([[]], []),
        ([""], []),
        (None, []),
        (7, []),
        ({"a": 1}, []),
        ([None], []),
        ([{}], []),
    ],
)
def test_one_prompt_is_a_turn_and_anything_else_goes_through_as_it_is(prompt: Any, messages: Any) -> None:
    made, raw = read({"model": "demo", "prompt": prompt})
    assert made.messages == messages
    assert made.model == "demo"
    written = DIALECT.write_with_salt(made, SALT)
    assert written == raw[:-1] + b',"cache_salt":"' + SALT.encode() + b'"}'


@pytest.mark.parametrize(
    "more",
    [
        {"suffix": "the end"},
        {"prompt_embeds": "AAAA"},
        {"echo": "yes"},
        {"echo": 1},
        {"echo": True, "return_token_ids": "true"},
    ],
)
def test_a_reply_that_does_not_follow_its_prompt_is_not_recorded(more: dict[str, Any]) -> None:
    made, raw = read({"model": "demo", "prompt": "Once", **more})
    assert made.messages == []
    assert DIALECT.write_with_salt(made, SALT).startswith(raw[:-1])


@pytest.mark.parametrize(
    ("body", "echoes"),
    [
        ({}, False),
        ({"echo": None}, False),
        ({"echo": False}, False),
        ({"echo": True}, True),
        ({"echo": True, "return_token_ids": True}, False),
    ],
)
def test_an_echo_holds_the_prompt_unless_ids_are_returned(body: dict[str, Any], echoes: bool) -> None:
    made, _ = read({"prompt": "Once", **body})
    assert made.echoes is echoes
    assert made.messages == text("Once")


def test_ids_that_are_echoed_as_text_are_not_recorded() -> None:
    assert read({"prompt": [1, 2], "echo": True})[0].messages == []
    assert read({"prompt": [1, 2], "echo": True, "return_token_ids": True})[0].messages == row(1, 2)


def test_the_frame_is_whether_special_tokens_are_added() -> None:
    assert read({"prompt": "x", "tools": [1], "temperature": 0})[0].frame == {}
    assert read({"prompt": "x", "add_special_tokens": None})[0].frame == {}
    assert read({"prompt": "x", "add_special_tokens": False})[0].frame == {"add_special_tokens": False}


def test_usage_is_asked_for_and_hidden_as_in_chat() -> None:
    made, raw = read({"prompt": "x", "stream": True})
    assert made.hide_usage
    written = DIALECT.write_with_salt(made, SALT)
    assert written.startswith(raw[:-1])
    assert json.loads(written)["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    assert not read({"prompt": "x", "stream": True, "stream_options": {"include_usage": True}})[0].hide_usage


@pytest.mark.parametrize("sent", [" He", [" He"]])
def test_a_history_is_prepended_to_the_prompt(sent: Any) -> None:
    made, _ = read({"prompt": sent, "max_tokens": 3, "echo": True, "suffix": None, "n": 2, "logprobs": 1})
    front = Front(None, text("king."), {"add_special_tokens": False})
    made = Call(**{name: getattr(made, name) for name in Call.__slots__} | {"front": front})
    assert json.loads(DIALECT.write_with_salt(made, SALT)) == {
        "prompt": "king. He", "max_tokens": 3, "echo": True, "suffix": None, "n": 2, "logprobs": 1,
        "add_special_tokens": False, "cache_salt": SALT,
    }  # fmt: skip
    reply = {"role": "text", "content": "king. He was"}
    assert transcripts.followed(made.whole, reply, echoes=made.echoes) == text("king. He was")


def test_ids_cannot_be_put_behind_a_reply_that_is_known_as_text_only() -> None:
    made, _ = read({"prompt": [7]})
    made = Call(
        **{name: getattr(made, name) for name in Call.__slots__} | {"front": Front(None, [*row(1), *text("x")])}
    )
    with pytest.raises(GatewayError, match="stored as text only") as refused:
        DIALECT.write_with_salt(made, SALT)
    assert refused.value.code == "invalid_request"
    assert "return_token_ids" in refused.value.hint


# --- replies


def streamed(*events: bytes) -> Reply:
    """A recorded stream, read at every cut: it has to be the same every time."""
    stream = b"".join(events)
    whole = DIALECT.reply([stream], streamed=True)
    assert DIALECT.reply([stream[i : i + 1] for i in range(len(stream))], streamed=True) == whole
    for cut in range(0, len(stream), 7):
        assert DIALECT.reply([stream[:cut], stream[cut:]], streamed=True) == whole
    return whole


def test_words_are_put_together_and_usage_is_read() -> None:
    reply = streamed(*texts_of(["Hel", "lo", " 日本", "語 🎉", ""], USAGE))
    assert reply == Reply(text("Hello 日本語 🎉")[0], Usage(120, 9, 96), "")


def test_token_ids_are_kept_where_every_part_brought_them() -> None:
    def part(word: str, ids: Any, finish: str | None = None) -> bytes:
        return event(text_event(word, finish, token_ids=ids, prompt_token_ids=None))

    assert streamed(part("a", [1]), part("", []), part("bc", [2, 3], "length"), DONE).message == {
        **text("abc")[0], "token_ids": [1, 2, 3],
    }  # fmt: skip
    assert streamed(part("a", [1]), part("b", None, "length"), DONE).message == text("ab")[0]


def test_of_several_choices_the_first_is_the_conversation() -> None:
    def part(index: int, word: str) -> bytes:
        return event(text_event(word, index=index))

    assert streamed(part(1, "B"), part(0, "A"), part(1, "b"), part(0, "a"), DONE).message == text("Aa")[0]


def test_an_error_event_a_cut_and_invalid_json_give_no_reply() -> None:
    error = event({"error": {"message": "EngineCore died", "code": 500}})
    for events, says in (
        ([*texts_of(["half"])[:1], error, DONE], "EngineCore died"),
        (texts_of(["half"], USAGE)[:-1], "ended before [DONE]"),
        ([*texts_of(["half"])[:1], b"data: {\n\n", DONE], "not a JSON object"),
        ([DONE], "holds no text"),
        ([], "ended before [DONE]"),
    ):
        reply = streamed(*events)
        assert reply.message is None
        assert says in reply.error


@pytest.mark.parametrize("ids", [None, [1, 2]])
def test_a_whole_reply_is_what_the_stream_of_it_would_have_been(ids: Any) -> None:
    answer = {**text_event("Hi", "stop", token_ids=ids), "usage": USAGE}
    reply = DIALECT.reply([json.dumps(answer).encode()], streamed=False)
    assert reply.message == (text("Hi")[0] if ids is None else {**text("Hi")[0], "token_ids": ids})
    assert reply.usage == Usage(120, 9, 96)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"{}", b'{"choices": []}', b'{"choices": 7}', b'{"choices": [{}]}',
            b'{"choices": [{"text": null}]}', b'{"error": {"message": "no"}}', b'{"choices": [{"text": 5}]}'],
)  # fmt: skip
def test_an_answer_without_text_gives_no_reply(raw: bytes) -> None:
    reply = DIALECT.reply([raw], streamed=False)
    assert reply.message is None
    assert reply.error


def test_an_error_has_the_shape_of_chat() -> None:
    error = GatewayError("invalid_request", "what", hint="how")
    assert json.loads(DIALECT.error(error))["error"]["code"] == "invalid_request"
    assert DIALECT.error_event(error).endswith(DONE)


# --- turns, with an engine


def complete(gateway: Gateway, session: str, prompt: Any, **more: Any) -> Any:
    """One text completion of a session."""
    body = {"model": MODEL, "prompt": prompt, **more}
    return gateway.http.post(COMPLETIONS, json=body, headers={"x-session-id": session})


def kept(gateway: Gateway, window: str) -> Any:
    """The transcript of a window."""
    return without_turns(gateway.http.get(f"/admin/windows/{window}/messages").json()["messages"])


def thawed(gateway: Gateway, session: str) -> str:
    """Freeze a session and thaw it; the new session's id."""
    frozen = gateway.freeze(session, f"w-{session}")
    assert frozen.status_code == 201, frozen.text
    return str(gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"])


def prompts(engine: FakeEngine) -> list[Any]:
    """What the engine was asked to complete for clients; our own requests are greedy token ids."""
    return [r.json["prompt"] for r in engine.seen(COMPLETIONS)]


def test_a_completion_is_a_turn_with_tokens_a_salt_and_a_transcript(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    response = complete(gateway, session, "Once upon")
    assert response.json()["choices"][0]["text"] == "x"
    assert response.headers["x-session-id"] == session
    (turn,) = gateway.turns(session)
    assert (turn["outcome"], turn["prompt_tokens"], turn["completion_tokens"]) == ("completed", 9, 1)
    assert len(engine.seen(COMPLETIONS)[0].json["cache_salt"]) == 32
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    assert kept(gateway, f"w-{session}") == text("Once uponx")
    assert complete(gateway, session, "Once uponx a").headers["x-context-tokens"] == "10"


def test_usage_is_asked_for_but_hidden_from_a_stream_that_did_not_ask(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Once", "stream": True}).encode()
    with RawHttpClient(gateway.url) as wire:
        wire.post(COMPLETIONS, body, f"x-session-id: {session}")
        wire.head()
        assert wire.chunks() == texts_of(["x"])
    assert engine.seen(COMPLETIONS)[0].json["stream_options"]["include_usage"] is True
    (turn,) = gateway.turns(session)
    assert turn["completion_tokens"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_kept_once(engine: FakeEngine, gateway: Gateway, session: str, stream: bool) -> None:
    def echo(exchange: Any) -> None:
        if not stream:
            exchange.json({**text_event("Once upon", "length"), "usage": USAGE})
            return
        exchange.begin()
        for one in texts_of(["Once", " upon"], USAGE):
            exchange.chunk(one)
        exchange.end()

    engine.on_completion = echo
    complete(gateway, session, "Once", echo=True, stream=stream)
    gateway.freeze(session, f"w-{session}")
    assert kept(gateway, f"w-{session}") == text("Once upon")


def test_several_prompts_are_salted_and_counted_but_not_recorded(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    complete(gateway, session, "Once")
    engine.on_completion = lambda exchange: exchange.json({**text_event("many"), "usage": USAGE})
    assert complete(gateway, session, ["one", "two"]).json()["choices"][0]["text"] == "many"
    assert len({r.json["cache_salt"] for r in engine.seen(COMPLETIONS)}) == 1
    assert [turn["outcome"] for turn in gateway.turns(session, 2)] == ["completed", "completed"]
    engine.on_completion = engine.answer_completion
    gateway.freeze(session, f"w-{session}")
    assert kept(gateway, f"w-{session}") == text("Oncex")


def test_a_thawed_text_continues_from_the_whole_or_from_what_is_new(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    complete(gateway, session, "Once", add_special_tokens=False)
    new = thawed(gateway, session)
    engine.reset()
    complete(gateway, new, " upon")
    complete(gateway, new, "Oncex upon", add_special_tokens=False)
    delta, full = engine.seen(COMPLETIONS)
    assert delta.json["prompt"] == full.json["prompt"] == "Oncex upon"
    assert delta.json["cache_salt"] == full.json["cache_salt"]
    assert delta.json["add_special_tokens"] is False
    gateway.freeze(new, f"v-{session}")
    assert kept(gateway, f"v-{session}") == text("Oncex uponx")


def test_token_ids_continue_as_ids_where_the_engine_returned_them(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_completion = lambda exchange: exchange.json({**text_event("xy", token_ids=[8, 9]), "usage": USAGE})
    complete(gateway, session, [1, 2, 3], return_token_ids=True)
    new = thawed(gateway, session)
    assert kept(gateway, f"w-{session}") == row(1, 2, 3, 8, 9)
    window = gateway.http.get(f"/admin/windows/w-{session}").json()
    assert window["token_count"] == 5
    engine.reset()
    complete(gateway, new, [4], return_token_ids=True)
    complete(gateway, new, [1, 2, 3, 8, 9, 4])
    assert prompts(engine) == [[1, 2, 3, 8, 9, 4]] * 2
    assert engine.seen("/tokenize") == []


def test_token_ids_with_a_text_reply_freeze_and_continue_from_the_whole(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    complete(gateway, session, [1, 2, 3])
    new = thawed(gateway, session)
    assert kept(gateway, f"w-{session}") == [*row(1, 2, 3), *text("x")]
    assert gateway.http.get(f"/admin/windows/w-{session}").json()["token_count"] == 4
    (asked,) = engine.seen("/tokenize")
    assert (asked.json["prompt"], asked.json["add_special_tokens"]) == ("x", False)
    assert complete(gateway, new, [1, 2, 3, 120, 4]).status_code == 200
    refused = complete(gateway, new, [4])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert "return_token_ids" in refused.json()["error"]["message"]


def test_a_chat_cannot_follow_a_text_nor_a_text_a_chat(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    complete(gateway, f"{session}-t", "Once")
    complete(gateway, f"{session}-i", [1, 2, 3], return_token_ids=True)
    gateway.chat(f"{session}-c")
    from_text, from_ids, from_chat = (thawed(gateway, f"{session}-{kind}") for kind in "tic")
    engine.reset()
    for response, says in (
        (gateway.chat(from_text), "a chat cannot follow"),
        (gateway.chat(from_ids), "a chat cannot follow"),
        (complete(gateway, from_chat, "x"), "from a chat"),
        (complete(gateway, from_chat, [1]), "from a chat"),
        (complete(gateway, from_text, [1]), "from a text"),
        (complete(gateway, from_ids, "x"), "send a list of token ids"),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (400, "invalid_request", "invalid_request_error")
        assert says in error["message"]
    assert engine.asked == []


def test_errors_of_the_engine_come_through_untouched(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    refusal = {"error": {"message": "no", "type": "BadRequestError", "param": "prompt", "code": 400}}
    engine.on_completion = lambda exchange: exchange.json(refusal, 400)
    response = complete(gateway, session, {"odd": 1})
    assert (response.status_code, response.json()) == (400, refusal)
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_error"


def test_the_openai_client_reads_a_stream_that_the_engine_cuts_as_an_error(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def cut(exchange: Any) -> None:
        exchange.begin()
        exchange.chunk(event(text_event("Hel")))
        exchange.cut()

    engine.on_completion = cut
    with openai.OpenAI(base_url=f"{gateway.url}/s/{session}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model=MODEL, prompt="Once", stream=True)
        with pytest.raises(openai.APIError, match="engine closed the connection"):
            list(stream)
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "engine_cut"


def test_a_window_as_a_base_url_begins_branches_from_a_text(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    complete(gateway, session, "Once")
    thawed(gateway, session)
    engine.reset()
    path = f"/w/w-{session}{COMPLETIONS}"
    answers = [gateway.http.post(path, json={"model": MODEL, "prompt": p}) for p in (" upon", "Oncex upon")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.headers["x-session-id"] for answer in answers} - {session}) == 2
    assert prompts(engine) == ["Oncex upon"] * 2
    assert len({r.json["cache_salt"] for r in engine.seen(COMPLETIONS)}) == 1
    refused = gateway.http.post(f"/w/w-{session}/v1/chat/completions", json={"model": MODEL, "messages": [HI]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")

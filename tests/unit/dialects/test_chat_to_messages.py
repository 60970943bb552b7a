"""Canonical messages as the Messages API says them: the way there and back changes nothing, or is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.chat_to_messages import in_front, messages
from gateway.dialects.messages_to_chat import conversation, frame
from gateway.dialects.transcripts import canonical, merged, same
from gateway.errors import GatewayError
from gateway.records import Front
from tests.unit.dialects.test_messages_to_chat import ADD, ADD_TOOL, NOW, NOW_TOOL, call, change

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAA="}}
CHAT = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "What time is it?"},
    {
        "role": "assistant",
        "reasoning": "Two of them.",
        "content": "Let me look.",
        "tool_calls": [call("a", "now", '{"zone": "CET"}'), call("b", "now", "{}")],
    },
    {"role": "tool", "tool_call_id": "a", "content": "9:00"},
    {"role": "tool", "tool_call_id": "b", "content": ""},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "tool_reference", "name": "grep"}]},
    {"role": "user", "content": [{"type": "text", "text": "And"}, PICTURE, {"type": "text", "text": "this?"}]},
    {"role": "assistant", "content": "Nine."},
    {"role": "system", "content": "Hurry."},
    {"role": "user", "content": ""},
    {"role": "assistant"},
    {"role": "tool", "tool_call_id": "z", "content": "out of turn"},
    {"role": "user", "content": "Thanks."},
]


def back(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return conversation({"messages": said})


def test_a_conversation_comes_back_as_it_was() -> None:
    assert back(messages(CHAT)) == CHAT


def test_results_one_after_the_other_are_one_message_of_the_user() -> None:
    roles = [message["role"] for message in messages(CHAT[1:7])]
    assert roles == ["user", "assistant", "user", "user"]
    first, second = messages(CHAT[3:6])[0]["content"]
    assert first == {"type": "tool_result", "tool_use_id": "a", "content": "9:00"}
    assert second["content"][1] == {"type": "tool_reference", "tool_name": "grep"}


@pytest.mark.parametrize(
    ("message", "comes_back"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [call("a", "f", "{}")]}, None),
        ({"role": "assistant", "content": "", "tool_calls": [], "refusal": None, "annotations": []}, None),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
            {"role": "assistant", "content": "a", "reasoning": "r"},
        ),
        ({"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}] * 2},
         {"role": "tool", "tool_call_id": "a", "content": "x\nx"}),
        # The engine, too, takes arguments that are no object for an empty one.
        ({"role": "assistant", "content": "", "tool_calls": [call("a", "f", '{"cut": ')]},
         {"role": "assistant", "tool_calls": [call("a", "f", "{}")]}),
        ({"role": "assistant", "content": "", "tool_calls": [call("a", "f", '{"n": ' + "1" * 5000 + "}")]},
         {"role": "assistant", "tool_calls": [call("a", "f", "{}")]}),
        ({"role": "assistant", "content": "", "tool_calls": [call("a", "f", "[1]")]},
         {"role": "assistant", "tool_calls": [call("a", "f", "{}")]}),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]},
         {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}),
    ],
)  # fmt: skip
def test_variants_of_other_clients_come_back_as_the_engine_accepts_them(
    message: dict[str, Any], comes_back: dict[str, Any] | None
) -> None:
    (found,) = back(messages([message]))
    assert same(found, message) if comes_back is None else found == comes_back


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "developer", "content": "x"}, "developer"),
        ({"role": "function", "name": "f", "content": "x"}, "function"),
        ({"content": "x"}, "None"),
        ({"role": "user", "content": "x", "name": "bob"}, "'name' of a message of role user"),
        ({"role": "assistant", "content": "x", "name": "bob"}, "'name'"),
        ({"role": "tool", "content": "x", "tool_call_id": "a", "name": "f"}, "'name'"),
        ({"role": "user", "content": "x", "tool_calls": [1]}, "'tool_calls'"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "'input_audio'"),
        ({"role": "user", "content": ["x", "y"]}, "'str'"),
        ({"role": "user", "content": [{"type": "text", "text": ""}, PICTURE]}, "empty text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, "'image_url'"),
        ({"role": "user", "content": {"type": "text"}}, "several parts"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "'refusal'"),
        ({"role": "system", "content": ""}, "empty"),
        ({"role": "system", "content": [{"type": "text", "text": "a"}] * 2}, "several parts"),
        ({"role": "system", "content": "x-anthropic-billing-header: a"}, "billing header"),
        ({"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}, "no id"),
        ({"role": "assistant", "tool_calls": ["x"]}, "no id"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": {}}]}, "no function"),
        ({"role": "tool", "tool_call_id": "a", "content": [PICTURE]}, "'image_url'"),
        ({"role": "tool", "tool_call_id": "a", "content": [{"type": "tool_reference", "name": "f"}]}, "names tools"),
    ],
)  # fmt: skip
def test_a_message_the_api_cannot_express_is_refused_with_a_remedy(message: dict[str, Any], named: str) -> None:
    with pytest.raises(GatewayError) as raised:
        messages([message])
    assert raised.value.code == "invalid_request"
    assert named in raised.value.message
    assert "/v1/chat/completions" in raised.value.hint


WORDS = st.text(max_size=8)
SOME = st.text(min_size=1, max_size=8).filter(lambda text: not text.startswith("x-anthropic-billing-header"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda v: st.lists(v) | st.dictionaries(WORDS, v),
    max_leaves=5,
)
RESULT = st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": SOME, "content": WORDS})
TEXT = st.fixed_dictionaries({"type": st.just("text"), "text": WORDS})
USE = st.fixed_dictionaries(
    {"type": st.just("tool_use"), "id": SOME, "name": SOME, "input": st.dictionaries(WORDS, JSON)}
)
THOUGHT = st.fixed_dictionaries({"type": st.just("thinking"), "thinking": SOME, "signature": WORDS})
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": WORDS | st.lists(TEXT | RESULT, max_size=4)})
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": WORDS | st.lists(TEXT | USE | THOUGHT, max_size=4)}
    )
    | st.fixed_dictionaries({"role": st.just("system"), "content": SOME | st.lists(TEXT, max_size=2)}),
    max_size=6,
)


@given(MESSAGES)
def test_every_conversation_of_messages_can_be_converted_back(sent: list[dict[str, Any]]) -> None:
    once = conversation({"messages": sent})
    if any(m["role"] == "system" and m["content"].startswith("x-anthropic-billing-header") for m in once):
        return  # put together of two blocks, neither of which began like that
    twice = back(messages(once))
    assert [canonical(message) for message in twice] == [canonical(message) for message in once]


@given(MESSAGES, MESSAGES, st.none() | SOME, st.booleans())
def test_a_prepended_history_and_the_request_make_the_recorded_conversation(
    window: list[dict[str, Any]], sent: list[dict[str, Any]], system: str | None, keep: bool
) -> None:
    history = [m for m in conversation({"messages": window}) if m["role"] != "system"]
    body = {"messages": sent, **({"system": system} if system else {})}
    front = Front([{"role": "system", "content": "Be terse."}] if keep else None, history)
    whole = conversation(in_front(front, body))
    assert [canonical(m) for m in whole] == [canonical(m) for m in merged(front, conversation(body))]


# --- the front as a whole

BODY: dict[str, Any] = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "Go on."}]}


def test_a_history_replaces_the_system_prompt_or_keeps_it() -> None:
    own = {**BODY, "system": [{"type": "text", "text": "Mine", "cache_control": {"type": "ephemeral"}}]}
    kept = in_front(Front(None, CHAT[1:2]), own)
    assert kept == {**own, "messages": [CHAT[1], *BODY["messages"]]}
    replaced = in_front(Front(CHAT[:1], CHAT[1:2]), own)
    assert replaced == {**BODY, "system": "Be terse.", "messages": [CHAT[1], *BODY["messages"]]}
    assert "system" not in in_front(Front([], []), own)


def test_of_two_system_messages_the_second_is_one_of_the_messages() -> None:
    front = Front([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}], CHAT[1:2])
    made = in_front(front, {**BODY, "messages": [{"role": "system", "content": "mine"}, *BODY["messages"]]})
    assert made["system"] == "a"
    assert made["messages"] == [{"role": "system", "content": "b"}, CHAT[1], *BODY["messages"]]


def test_a_system_message_that_is_replaced_still_changes_the_tools() -> None:
    added = change("tool_addition", type="tool_definition", definition=ADD)
    added["content"].append({"type": "text", "text": "Use it."})
    body = {**BODY, "messages": [added, *BODY["messages"]], "tools": [NOW]}
    made = in_front(Front(CHAT[:1], CHAT[1:2]), body)
    assert conversation(made) == [*CHAT[:2], *BODY["messages"]]
    assert frame(made) == {"tools": [NOW_TOOL, ADD_TOOL]}


@pytest.mark.parametrize("effort", ["none", "low", "max"])
def test_the_reasoning_effort_of_a_window_survives_the_round_trip(effort: str) -> None:
    made = in_front(Front(None, [], {"reasoning_effort": effort}), {**BODY, "output_config": {"format": None}})
    assert frame(made) == {"reasoning_effort": effort}
    assert "format" in made["output_config"]


def test_a_clients_own_thinking_wins_and_an_unknown_effort_is_refused() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    made = in_front(Front(None, [], {"reasoning_effort": "none"}), {**BODY, "thinking": thinking})
    assert made["thinking"] == thinking
    with pytest.raises(GatewayError, match="'minimal'"):
        in_front(Front(None, [], {"reasoning_effort": "minimal"}), BODY)


def test_tools_of_a_window_survive_the_round_trip() -> None:
    tools = [NOW_TOOL, ADD_TOOL]
    made = in_front(Front(None, [], {"tools": tools, "chat_template_kwargs": {"x": 1}, "documents": []}), BODY)
    assert frame(made) == {"tools": tools, "chat_template_kwargs": {"x": 1}}
    assert made["tools"][0] == NOW
    assert BODY.keys() == {"model", "max_tokens", "messages"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"documents": [{"title": "a", "text": "b"}]}, "'documents'"),
        ({"chat_template": "{{ messages }}"}, "'chat_template'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "parameters"),
        ({"tools": [{**NOW_TOOL, "defer_loading": True}]}, "'defer_loading'"),
        ({"tools": ["x"]}, "parameters"),
    ],
)
def test_a_frame_that_the_api_cannot_express_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(GatewayError) as raised:
        in_front(Front(None, [], fields), BODY)
    assert (raised.value.code, named in raised.value.message) == ("invalid_request", True)
    assert ("tools" in raised.value.hint) is ("tools" in fields)

"""Items of the Responses API into chat messages and back. That they render to the same tokens is seen on the real stack
(tests/stack/test_responses.py)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import response_items, transcripts
from gateway.errors import GatewayError

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "12"}
WHY = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "because"}]}
SAID = {
    "type": "message", "id": "msg", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "so", "annotations": []}],
}  # fmt: skip


def tool_call(call_id: str = "c1", name: str = "now", arguments: str = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


ANSWER = {"role": "tool", "content": "12", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("given_items", "messages"),
    [
        ([USER], [USER]),
        ([{"type": "message", "id": "m", "status": "completed", **USER}], [USER]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        ),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x", "detail": "low"}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}]}],
        ),
        ([{"role": "developer", "content": "d"}, USER], [{"role": "developer", "content": "d"}, USER]),
        ([USER, SAID], [USER, {"role": "assistant", "content": "so"}]),
        ([USER, {"role": "assistant", "content": "so"}], [USER, {"role": "assistant", "content": "so"}]),
        (
            [WHY, SAID, CALL, {**CALL, "call_id": "c2"}, RESULT],
            [
                {"role": "assistant", "reasoning": "because", "content": "so", "tool_calls": [
                    tool_call(), tool_call("c2")
                ]},
                ANSWER,
            ],
        ),
        ([CALL, SAID], [{"role": "assistant", "tool_calls": [tool_call()], "content": "so"}]),
        ([SAID, SAID], [{"role": "assistant", "content": "so"}] * 2),
        (
            [CALL, RESULT, CALL],
            [
                {"role": "assistant", "tool_calls": [tool_call()]}, ANSWER,
                {"role": "assistant", "tool_calls": [tool_call()]},
            ],
        ),
        ([{**CALL, "namespace": "ns"}], [{"role": "assistant", "tool_calls": [tool_call(name="ns__now")]}]),
        (
            [{"type": "custom_tool_call", "call_id": "c1", "name": "now", "input": 'é"\n'},
             {"type": "custom_tool_call_output", "call_id": "c1", "output": "12"}],
            [{"role": "assistant", "tool_calls": [tool_call(arguments='{"input": "é\\"\\n"}')]}, ANSWER],
        ),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}], [
            {"role": "assistant", "reasoning": "s"}
        ]),
        ([], []),
    ],
)  # fmt: skip
def test_items_are_put_together_as_the_engine_does_it(given_items: Any, messages: Any) -> None:
    assert response_items.read(given_items) == messages


@pytest.mark.parametrize(
    "item",
    [
        1,
        None,
        "hi",
        {},
        {"type": "item_reference", "id": "x"},
        {"type": "web_search_call", "id": "x", "status": "completed"},
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [1]},
        {"role": "user", "content": [{"type": "input_file", "file_data": "x"}]},
        {"role": "user", "content": [{"type": "input_image", "file_id": "x"}]},
        {"role": "user", "content": [{"type": "input_text", "text": 7}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"type": "function_call", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": {}},
        {"type": "function_call_output", "call_id": "c"},
        {"type": "reasoning", "summary": [], "encrypted_content": "zzz"},
        {"type": ["message"], "role": "user", "content": "x"},
        {"type": "message", "role": ["user"], "content": "x"},
    ],
)
def test_what_chat_has_no_words_for_is_not_guessed(item: Any) -> None:
    assert response_items.read([USER, item]) is None


def test_only_an_unfinished_reply_at_the_end_is_written_on() -> None:
    unfinished = {**SAID, "status": "incomplete"}
    assert response_items.continues_reply([USER, unfinished])
    assert response_items.continues_reply([USER, {**WHY, "status": "in_progress"}])
    for complete in ([], [USER, SAID], [unfinished, USER], [USER, {**CALL, "status": "incomplete"}], [1]):
        assert not response_items.continues_reply(complete)


TEXT = st.text(max_size=8)
CONTENT = TEXT | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT)
    | st.builds(lambda url: {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}, TEXT),
    min_size=1,
    max_size=3,
)
PLAIN = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "system", "developer"]), CONTENT
)
RESULTS = st.builds(lambda content, name: {"role": "tool", "content": content, "tool_call_id": name}, CONTENT, TEXT)
CALLS = st.lists(st.builds(tool_call, TEXT, TEXT, TEXT), min_size=1, max_size=3)
REPLIES = st.builds(
    lambda content, calls, reasoning: {"role": "assistant", "content": content, **calls, **reasoning},
    TEXT,
    st.just({}) | st.builds(lambda calls: {"tool_calls": calls}, CALLS),
    st.just({}) | st.builds(lambda text: {"reasoning": text}, TEXT),
)


@given(st.lists(st.tuples(st.lists(PLAIN | RESULTS, min_size=1, max_size=3), REPLIES), max_size=4))
def test_messages_written_as_items_read_back_the_same(exchanges: Any) -> None:
    conversation = [message for before, reply in exchanges for message in (*before, reply)]
    again = response_items.read(response_items.write(conversation))
    assert again is not None
    assert transcripts.common(conversation, again) == len(conversation) == len(again)
    for one, other in zip(conversation, again, strict=True):
        assert (one.get("reasoning") or None) == other.get("reasoning")


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ({"role": "function", "name": "x", "content": "y"}, 1),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, 1),
        ({"role": "user", "content": "x", "name": "bob"}, 1),
        ({"role": "user"}, 1),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, 1),
        ({"role": "assistant", "content": "", "tool_calls": [{"type": "custom", "custom": {}}]}, 1),
        ({"role": "tool", "content": "x"}, 1),
    ],
)
def test_a_message_that_items_have_no_words_for_is_refused_by_its_number(message: Any, number: int) -> None:
    with pytest.raises(GatewayError, match=f"message {number} of the conversation") as refused:
        response_items.write([USER, message])
    assert refused.value.code == "invalid_request"


def test_replies_that_would_run_into_each_other_are_refused() -> None:
    said, called = {"role": "assistant", "content": "a"}, {"role": "assistant", "tool_calls": [tool_call()]}
    assert len(response_items.write([USER, said, said])) == 3
    with pytest.raises(GatewayError, match="message 1"):
        response_items.write([USER, said, called])


def test_tools_are_shown_as_the_engine_shows_them() -> None:
    parameters = {"type": "object", "properties": {"z": {}, "a": {}}}
    function = {"type": "function", "name": "now", "description": None, "strict": True, "parameters": parameters}
    inner = {"type": "function", "name": "find", "parameters": parameters}
    shown = response_items.chat_tools(
        [
            {**function, "output_schema": {}},
            {"type": "web_search_preview"},
            {"type": "namespace", "name": "maps", "tools": [inner, {"type": "custom", "name": "x"}, 1]},
            {"type": "custom", "name": "patch", "description": "d", "format": {"type": "text"}},
            7,
        ]
    )
    assert [tool["function"]["name"] for tool in shown] == ["now", "maps__find", "patch"]
    assert shown[0] == {"type": "function", "function": {"name": "now", "parameters": parameters, "strict": True}}
    assert shown[2]["function"]["parameters"]["required"] == ["input"]
    assert response_items.response_tools(shown[:1]) == [
        {"type": "function", "name": "now", "parameters": parameters, "strict": True}
    ]
    for odd in (None, "x", 7, {}, []):
        assert response_items.chat_tools(odd) == []


def test_a_tool_choice_is_converted_where_chat_has_it() -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for choice in ("auto", "none", "required"):
        assert response_items.chat_tool_choice(choice) == choice
    assert response_items.chat_tool_choice({"type": "function", "name": "now"}) == named
    assert response_items.chat_tool_choice({"type": "custom", "name": "now"}) == named
    for other in (None, 7, "any", {"type": "web_search_preview"}, {"type": "allowed_tools", "tools": []}):
        assert response_items.chat_tool_choice(other) is None

"""What the Messages API says, in canonical messages. That it is what vLLM makes of it: tests/stack/test_messages.py."""

from typing import Any

import pytest

from gateway.dialects.messages_to_chat import Unreadable, assistant, conversation, frame

HI = {"role": "user", "content": "hi"}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAA="}}
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAA="}}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def use(call_id: str, name: str, value: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": value}


def result(call_id: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def said(*messages: Any, **body: Any) -> list[dict[str, Any]]:
    return conversation({**body, "messages": list(messages)})


@pytest.mark.parametrize(
    ("system", "content"),
    [
        ("Be terse.", "Be terse."),
        ([text("Be", cache_control={"type": "ephemeral"}), text(" terse.")], "Be terse."),
        ([text("x-anthropic-billing-header: cc_version=2; cch=a1b2;"), text("Be terse.")], "Be terse."),
        ([text(""), text("Be terse.")], "Be terse."),
        ("x-anthropic-billing-header: a", "x-anthropic-billing-header: a"),
    ],
)
def test_the_system_prompt_becomes_the_first_message(system: Any, content: str) -> None:
    assert said(HI, system=system) == [{"role": "system", "content": content}, HI]


@pytest.mark.parametrize("system", [None, "", [], [text("")], [text("x-anthropic-billing-header: a")]])
def test_an_empty_system_prompt_adds_no_message(system: Any) -> None:
    assert said(HI, system=system) == [HI]


def test_a_system_message_between_others_stays_where_it_is_and_is_one_text() -> None:
    between = {"role": "system", "content": [text("x-anthropic-billing-header: a"), text("Now"), text(" this.")]}
    billing = {"role": "system", "content": "x-anthropic-billing-header: a"}
    assert said(HI, between, billing, HI) == [HI, {"role": "system", "content": "Now this."}, HI]


def test_one_block_of_text_is_a_text_and_several_are_parts() -> None:
    assert said({"role": "user", "content": [text("a", cache_control={"type": "ephemeral"}), text("")]}) == [
        {"role": "user", "content": "a"}
    ]
    assert said({"role": "user", "content": [text("a"), PNG, text("b")]}) == [
        {"role": "user", "content": [text("a"), PNG_PART, text("b")]}
    ]


def test_an_image_by_address_keeps_it() -> None:
    source = {"type": "url", "url": "https://example.org/a.png"}
    (message,) = said({"role": "user", "content": [{"type": "image", "source": source}]})
    assert message["content"] == [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]


def test_thinking_is_reasoning_and_what_was_redacted_is_gone() -> None:
    blocks = [
        {"type": "thinking", "thinking": "be", "signature": "s"},
        {"type": "redacted_thinking", "data": "AA=="},
        {"type": "thinking", "thinking": "cause", "signature": "t"},
        text("So."),
    ]
    assert said({"role": "assistant", "content": blocks}) == [
        {"role": "assistant", "reasoning": "because", "content": "So."}
    ]


def test_parallel_calls_are_one_message_and_their_results_precede_user_text() -> None:
    blocks = [text("Let me look."), use("a", "one", {}), use("b", "two", {"x": "ü", "y": [1, 2.5, None]})]
    answers = [text("And?"), result("a", "1"), result("b", [text("2"), text("3")], is_error=True)]
    assert said({"role": "assistant", "content": blocks}, {"role": "user", "content": answers}) == [
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [call("a", "one", "{}"), call("b", "two", '{"x": "\\u00fc", "y": [1, 2.5, null]}')],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2\n3"},
        {"role": "user", "content": "And?"},
    ]


def test_results_alone_add_no_user_message() -> None:
    assert said({"role": "user", "content": [result("a", None), result("b", "")]}) == [
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "tool", "tool_call_id": "b", "content": ""},
    ]


def test_images_and_tools_that_a_tool_names_are_messages_after_its_text() -> None:
    content = [text("see"), PNG, {"type": "tool_reference", "tool_name": "grep"}, {"type": "search_result"}]
    assert said({"role": "user", "content": [result("a", content)]}) == [
        {"role": "tool", "tool_call_id": "a", "content": "see"},
        {"role": "user", "content": [PNG_PART]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "tool_reference", "name": "grep"}]},
    ]


def test_a_reply_without_a_word_is_sent_back_as_one() -> None:
    assert assistant([text("")]) == {"role": "assistant"}
    assert said({"role": "assistant", "content": []}) == [{"role": "assistant"}]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "x"},
        {"messages": {"role": "user"}},
        {"messages": [1]},
        {"messages": [None]},
        {"messages": [HI], "system": 7},
        {"messages": [HI], "system": [1]},
        {"messages": [HI], "system": ["x"]},
        {"messages": [HI], "system": [text(7)]},  # type: ignore[arg-type]
        *(
            {"messages": [{"role": role, "content": "x"}]}
            for role in ("developer", "tool", "robot", None, 7, ["user"], {})
        ),
        *({"messages": [{"role": "user", "content": content}]} for content in (7, True, {"type": "text"}, ["x"], [7])),
        *(
            {"messages": [{"role": "user", "content": [block]}]}
            for block in (
                {},
                {"type": None},
                {"type": ["text"]},
                {"type": "document"},
                {"type": "text", "text": 7},
                {"type": "thinking", "thinking": []},
                {"type": "image", "source": "x"},
                {"type": "image", "source": {"type": "url", "url": 7}},
                {"type": "tool_use", "id": 7},
                {"type": "tool_use", "id": "a", "name": "b", "input": "{}"},
                {"type": "tool_use", "id": "a", "name": "b", "input": [1]},
                {"type": "tool_result", "tool_use_id": ["a"]},
                {"type": "tool_result", "tool_use_id": "a", "content": 7},
                {"type": "tool_result", "tool_use_id": "a", "content": ["x"]},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": 7}]},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": 7}]},
                {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "a"}},
            )
        ),
    ],
)
def test_what_the_engine_will_refuse_is_unreadable(body: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        conversation(body)


def test_arguments_nested_too_deep_are_unreadable() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(Unreadable):
        assistant([use("a", "b", deep)])


# --- the frame

NOW = {"name": "now", "description": "The time", "input_schema": {"type": "object", "properties": {}}}
ADD = {"name": "add", "input_schema": {"properties": {"a": {}}}, "strict": True, "cache_control": {"type": "ephemeral"}}
NOW_TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
}
ADD_TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {}}, "type": "object"}, "strict": True},
}


def framed(**body: Any) -> dict[str, Any]:
    return frame({"messages": [HI], **body})


def test_tools_are_functions_whose_parameters_have_a_type() -> None:
    assert framed(tools=[NOW, ADD]) == {"tools": [NOW_TOOL, ADD_TOOL]}
    assert framed(tools=[]) == framed(tools=None) == {}


@pytest.mark.parametrize(
    ("choice", "chosen", "parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "now"}, {"type": "function", "function": {"name": "now"}}, True),
    ],
)
def test_a_choice_of_tools_is_that_of_the_chat(choice: Any, chosen: Any, parallel: bool) -> None:
    assert framed(tools=[NOW], tool_choice=choice) == {
        "tools": [NOW_TOOL], "tool_choice": chosen, "parallel_tool_calls": parallel,
    }  # fmt: skip
    assert framed(tool_choice=choice) == {}  # without tools, there is nothing to choose


def test_effort_and_thinking_are_the_effort_of_the_chat() -> None:
    assert framed(output_config={"effort": "low"}) == {"reasoning_effort": "low"}
    assert framed(output_config={"effort": "low"}, thinking={"type": "disabled"}) == {"reasoning_effort": "none"}
    assert framed(thinking={"type": "enabled", "budget_tokens": 2048}) == {}
    assert framed(chat_template_kwargs={"x": 1}, temperature=1, max_tokens=9) == {"chat_template_kwargs": {"x": 1}}


def change(kind: str, **tool: Any) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": kind, "tool": tool}]}


def test_tools_added_and_removed_by_system_messages_count_at_the_end() -> None:
    removed = change("tool_removal", type="tool_reference", name="now")
    added = change("tool_addition", type="tool_definition", definition=ADD)
    again = change("tool_addition", type="tool_reference", name="now")
    assert framed(messages=[HI, removed, added], tools=[NOW]) == {"tools": [ADD_TOOL]}
    assert framed(messages=[HI, removed, again], tools=[{**NOW, "defer_loading": True}]) == {"tools": [NOW_TOOL]}
    assert said(HI, removed, added) == [HI]
    with pytest.raises(Unreadable):
        framed(messages=[HI, again])


@pytest.mark.parametrize(
    "body",
    [
        {"tools": "x"},
        {"tools": [7]},
        {"tools": [{"name": "web_search", "type": "web_search_20250305"}]},
        {"tools": [{"name": 7, "input_schema": {}}]},
        {"tools": [{"name": "a", "input_schema": []}]},
        {"tools": [NOW], "tool_choice": "any"},
        {"tools": [NOW], "tool_choice": {"type": "some"}},
        {"tools": [NOW], "tool_choice": {}},
        {"thinking": "on"},
        {"output_config": ["low"]},
        {"chat_template_kwargs": "x"},
        {"messages": [{"role": "system", "content": [{"type": "tool_removal"}]}]},
        {"messages": [{"role": "system", "content": [{"type": "tool_removal", "tool": "now"}]}]},
    ],
)
def test_a_frame_that_the_engine_will_refuse_is_unreadable(body: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        framed(**body)

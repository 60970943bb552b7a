"""What counts as the same message, and what a thawed session's turn then consists of."""

import copy
from typing import Any

import pytest

from gateway.dialects.transcripts import SystemRule, common, has_media, hoisted, merged, missing, same
from gateway.errors import GatewayError

SYSTEM = {"role": "system", "content": "be terse"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2], "b": "x y"}'}}


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def with_arguments(text: str, **more: Any) -> dict[str, Any]:
    return a("", tool_calls=[{**CALL, "function": {"name": "f", "arguments": text}, **more}])


WINDOW = [SYSTEM, u("1"), a("one"), u("2"), a("two")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (a("x"), a("x", provider_specific_fields={"token_ids": None})),
        (a("x"), a("x", refusal=None, tool_calls=[], audio=None, function_call=None, annotations=[])),
        (a("x", reasoning="because"), a("x")),
        (a("x", reasoning_content="because"), a("x", reasoning_content="otherwise")),
        (a("", tool_calls=[CALL]), {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        (a("", tool_calls=[CALL]), {"role": "assistant", "tool_calls": [CALL]}),
        (u("xy"), {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}),
        (u(""), {"role": "user", "content": []}),
        (u("x"), {"content": "x", "role": "user", "name": None}),
        (with_arguments('{"a": [1, 2], "b": "x y"}'), with_arguments('{"a":[1,2],"b":"x y"}')),
        (with_arguments('{"a": [1, 2], "b": "x y"}'), with_arguments('{\n  "b": "x y",\n  "a": [1, 2]\n}')),
        (with_arguments('{"a": "\\u00e9"}'), with_arguments('{"a": "é"}')),
        (with_arguments("not json"), with_arguments("not json")),
    ],
)
def test_what_clients_change_on_the_way_makes_no_other_message(one: dict[str, Any], other: dict[str, Any]) -> None:
    before = copy.deepcopy((one, other))
    assert same(one, other)
    assert same(other, one)
    assert (one, other) == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (u("x"), a("x")),
        (u("x"), u("x ")),
        (u("x"), u("X")),
        (u("x"), {**u("x"), "name": "bob"}),
        (u("x"), {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}),
        (with_arguments('{"b": "x y"}'), with_arguments('{"b": "xy"}')),
        (with_arguments('{"a": [1, 2]}'), with_arguments('{"a": [2, 1]}')),
        (with_arguments("{}"), with_arguments("{}", id="2")),
        (with_arguments("not json"), with_arguments("not  json")),
        (a("", tool_calls=[CALL]), a("", tool_calls=[CALL, CALL])),
        (a("", tool_calls=[CALL]), a("")),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, {"role": "tool", "content": "x", "tool_call_id": "2"}),
        ({"role": "user"}, {"role": "user", "content": "x"}),
    ],
)
def test_a_message_with_different_content_differs(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not same(one, other)
    assert not same(other, one)


@pytest.mark.parametrize(
    "odd",
    [{}, {"role": 1}, {"role": "user", "content": 7}, {"role": "user", "content": [1, None]}, a("", tool_calls="x"),
     a("", tool_calls=[None, 1, {}, {"function": None}, {"function": {"arguments": {"a": 1}}}])],
)  # fmt: skip
def test_an_odd_message_is_the_same_as_itself_and_as_no_other(odd: dict[str, Any]) -> None:
    assert same(odd, copy.deepcopy(odd))
    assert not same(odd, u("x"))
    assert continued([u("1"), a("one")], [odd], "") == [u("1"), a("one"), odd]


def test_the_common_beginning() -> None:
    assert common(WINDOW, WINDOW) == 5
    assert common(WINDOW, WINDOW[:2]) == common(WINDOW[:2], WINDOW) == 2
    assert common(WINDOW, [SYSTEM, u("other"), *WINDOW[2:]]) == 1
    assert common([], WINDOW) == common(WINDOW, []) == 0


@pytest.mark.parametrize(
    "sent",
    [
        [*WINDOW, u("3")],
        [*WINDOW[:2], {"role": "assistant", "content": "one", "refusal": None}, *WINDOW[3:], u("3")],
        [SYSTEM, u("1"), a("one"), u("edited")],
        [SYSTEM, u("1"), a("one"), u("2")],  # the last reply once more
        WINDOW,
    ],
)
def test_a_full_history_is_taken_as_it_was_sent(sent: list[dict[str, Any]]) -> None:
    assert continued(WINDOW, sent, "") == sent


@pytest.mark.parametrize(
    "sent", [[u("3")], [u("1")], [u("3"), a("x"), u("4")], [{"role": "tool", "content": "x", "tool_call_id": "1"}]]
)
def test_new_messages_get_the_window_prepended(sent: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(WINDOW)
    assert continued(WINDOW, sent, "") == [*WINDOW, *sent]
    assert continued(WINDOW, [SYSTEM, *sent], "") == [*WINDOW, *sent]
    assert before == WINDOW


def continued(window: list[dict[str, Any]], sent: list[dict[str, Any]], rule: SystemRule) -> list[dict[str, Any]]:
    """What the engine gets to see."""
    front = missing(window, sent, rule)
    return sent if front is None else merged(front, sent)


SINCE = [*WINDOW, u("3"), a("three")]
LATER = [*SINCE, u("4"), a("four")]


@pytest.mark.parametrize(
    ("current", "sent", "whole", "origin", "unsure"),
    [
        # New messages alone continue the whole history.
        (SINCE, [u("4")], [*SINCE, u("4")], "session", False),
        (LATER, [u("5"), u("6")], [*LATER, u("5"), u("6")], "session", False),
        (SINCE, [{"role": "tool", "content": "x"}], [*SINCE, {"role": "tool", "content": "x"}], "session", False),
        # A client that keeps what was said since the window.
        (SINCE, [u("3"), a("three"), u("4")], [*SINCE, u("4")], "window", False),
        (LATER, [u("3"), a("3!"), u("4")], [*WINDOW, u("3"), a("3!"), u("4")], "window", False),
        # The last turns alone: they are not there twice.
        (LATER, [u("4"), a("four"), u("5")], [*LATER, u("5")], "session", False),
        (LATER, [a("four"), u("5")], [*LATER, u("5")], "session", False),
        (LATER, [u("2"), a("two"), u("3"), a("three"), u("x")], [*SINCE, u("x")], "window", False),
        (None, [u("2"), a("two"), u("3")], [*WINDOW, u("3")], "window", False),
        (None, [u("2"), a("two"), u("x"), a("y"), u("3")], [*WINDOW, u("x"), a("y"), u("3")], "window", False),
        # The first question since the window once more: a retry, or the same words again?
        (SINCE, [u("3")], [*WINDOW, u("3")], "window", True),
        (LATER, [u("3")], [*LATER, u("3")], "session", True),
        # Something else is said to have been said since the window.
        (SINCE, [u("x"), a("y"), u("z")], [*WINDOW, u("x"), a("y"), u("z")], "window", True),
        (None, [u("x"), a("y"), u("z")], [*WINDOW, u("x"), a("y"), u("z")], "window", False),
    ],
)
def test_a_turn_extends_its_sessions_history_without_repeating_it(
    current: list[dict[str, Any]] | None,
    sent: list[dict[str, Any]],
    whole: list[dict[str, Any]],
    origin: str,
    *,
    unsure: bool,
) -> None:
    for system in ([], [SYSTEM]):
        front = missing(WINDOW, [*system, *sent], "", current)
        assert front is not None
        assert (merged(front, [*system, *sent]), front.origin, front.unsure) == (whole, origin, unsure)


def test_the_same_turn_more_than_once_is_taken_up_at_the_last() -> None:
    current = [*WINDOW, *[u("go on"), a("more")] * 3]
    front = missing(WINDOW, [u("go on"), a("more"), u("x")], "", [*WINDOW, u("0"), a("zero"), *current[5:]])
    assert front is not None
    assert merged(front, [u("go on"), a("more"), u("x")]) == [*WINDOW, u("0"), a("zero"), *current[5:], u("x")]


def test_a_session_whose_system_message_was_replaced_keeps_it() -> None:
    current = [OTHER, *SINCE[1:]]
    front = missing(WINDOW, [u("4")], "", current)
    assert front is not None
    assert merged(front, [u("4")]) == [*current, u("4")]
    assert missing(WINDOW, [OTHER, u("4")], "", current) is not None


OTHER = {"role": "system", "content": "be verbose"}


@pytest.mark.parametrize("sent", [[OTHER, u("3")], [SYSTEM, OTHER, u("3")], [OTHER, u("2"), a("other"), u("3")]])
def test_another_system_message_is_a_conflict_unless_a_rule_decides(sent: list[dict[str, Any]]) -> None:
    with pytest.raises(GatewayError) as conflict:
        continued(WINDOW, sent, "")
    assert conflict.value.code == "window_system_conflict"
    assert "X-Window-System" in conflict.value.hint
    theirs, rest = [m for m in sent if m["role"] == "system"], [m for m in sent if m["role"] != "system"]
    assert continued(WINDOW, sent, "keep") == [*WINDOW, *rest]
    assert continued(WINDOW, sent, "replace") == [*theirs, *WINDOW[1:], *rest]


@pytest.mark.parametrize("sent", [WINDOW[1:], WINDOW[3:]])
def test_a_client_with_its_own_history_keeps_its_own_system_message(sent: list[dict[str, Any]]) -> None:
    """It tells the time, holds retrieved passages, or is that of a sub-agent."""
    assert continued(WINDOW, [OTHER, *sent, u("3")], "") == [OTHER, *WINDOW[1:], u("3")]
    assert continued(WINDOW, [OTHER, *sent, u("3")], "keep") == [*WINDOW, u("3")]


def test_a_first_question_without_its_former_surroundings_is_a_full_history() -> None:
    reply = a("a reply that is hardly said twice")
    window = [SYSTEM, u("<reminder>be brief</reminder> 1"), reply]
    sent = [SYSTEM, u("1"), reply, u("2")]
    assert continued(window, sent, "") == sent
    short = [SYSTEM, u("1"), a("ok"), u("2")]
    assert continued([*window[:2], a("ok")], short, "") == [*window[:2], a("ok"), *short[1:]]


def test_a_developer_message_is_a_system_message() -> None:
    developer = {"role": "developer", "content": "be terse"}
    with pytest.raises(GatewayError):
        continued(WINDOW, [developer, u("3")], "")
    assert continued([developer, *WINDOW[1:]], [developer, u("3")], "") == [developer, *WINDOW[1:], u("3")]


def test_a_full_history_without_its_system_message_gets_it_back() -> None:
    assert continued(WINDOW, [*WINDOW[1:], u("3")], "") == [*WINDOW, u("3")]
    assert continued(WINDOW, [*WINDOW[1:], u("3")], "replace") == [*WINDOW, u("3")]


def test_a_window_without_a_system_message_takes_none_unasked() -> None:
    with pytest.raises(GatewayError):
        continued(WINDOW[1:], [SYSTEM, u("3")], "")
    assert continued(WINDOW[1:], [SYSTEM, u("3")], "keep") == [*WINDOW[1:], u("3")]
    assert continued(WINDOW[1:], [SYSTEM, u("3")], "replace") == [*WINDOW, u("3")]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", "anything", 7])
def test_media_is_found_wherever_it_is(kind: Any) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": kind}]
    assert has_media([*WINDOW, {"role": "user", "content": parts}, u("x")])


def test_text_in_parts_is_not_media() -> None:
    assert not has_media([])
    assert not has_media(WINDOW)
    assert not has_media([{"role": "user", "content": [{"type": "text", "text": "image_url"}, {"type": "refusal"}]}])
    assert not has_media([{"role": "user", "content": None}, {"role": "user"}])


def test_system_messages_between_others_are_merged_at_the_beginning() -> None:
    one, two, user = (
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c"},
    )
    assert hoisted([one, user, two, user]) == [{"role": "system", "content": "ab"}, user, user]
    assert hoisted([user, two]) == [two, user]
    assert hoisted([one, two, user]) is None
    assert hoisted([user]) is None
    assert hoisted([user, {"role": "system", "content": [{"type": "text", "text": "a"}]}]) is None

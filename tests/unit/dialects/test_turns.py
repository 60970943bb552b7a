"""Where the turns of a transcript end."""

from typing import Any

import pytest

from gateway.dialects.turns import Turns

CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
SHORT = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool", "f": "function"}


def of(roles: str) -> Turns:
    """The turns of a transcript, a letter for each message; `c` is a reply that calls a tool, `o` an old one."""
    messages: list[dict[str, Any]] = [
        {"c": CALL, "o": OLD_CALL}.get(role) or {"role": SHORT[role], "content": "x"} for role in roles
    ]
    return Turns.of(messages)


@pytest.mark.parametrize(
    ("roles", "numbers", "ends"),
    [
        ("", "", []),
        ("ua", "11", [2]),
        ("suaua", "11122", [3, 5]),
        ("uuaua", "11122", [3, 5]),
        ("suctctaua", "111111122", [7, 9]),
        ("uotfaua", "1111122", [5, 7]),
        ("uctuctaua", "111111122", [7, 9]),  # a reminder beside a tool's result
        ("ucua", "1111", [4]),  # the user interrupted a call
        ("uasua", "11222", [2, 5]),
        ("uaaua", "11122", [3, 5]),  # a reply in two messages
        ("aua", "111", [3]),  # a greeting
        ("uauc", "1122", [2]),
        ("uauct", "11222", [2]),
        ("uau", "112", [2]),
        ("uas", "112", [2]),
        ("sd", "11", []),
    ],
)
def test_turn_ends_with_a_reply_that_calls_no_tool(roles: str, numbers: str, ends: list[int]) -> None:
    found = of(roles)
    assert ("".join(map(str, found.numbers)), list(found.ends)) == (numbers, ends)
    assert found.open == (bool(roles) and ends[-1:] != [len(roles)])


@pytest.mark.parametrize("message", [{"role": "text", "content": "abc"}, {"role": "tokens", "content": [1, 2]}])
def test_text_has_no_turns(message: dict[str, Any]) -> None:
    found = Turns.of([message])
    assert (list(found.numbers), list(found.ends), found.open) == ([], [], False)

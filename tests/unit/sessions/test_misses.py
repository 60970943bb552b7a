"""Why a turn missed: every reason, told from evidence alone, and never by what was said."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sessions import misses
from gateway.sessions.misses import MAX_DETAIL, PreviousTurn, TurnCacheStats, explain_miss, first_change

SECRET = "the launch code is 0000"
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def m(role: str, content: Any = SECRET, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# 300 tokens of prompt, 100 of reply; the next prompt has 450. Chunks of 64: 384 expected, 256 without the reply.
BEFORE = [m("system"), m("user", "one"), m("assistant", "1"), m("user", "two"), m("assistant", "2")]
NEXT = [*BEFORE, m("user", "three")]
LEFT: dict[str, Any] = {"tokens": 400, "prompt": 300, "messages": BEFORE, "frame": {"tools": TOOLS}, "salt": "s",
                        "fingerprint": "f", "engine": "a"}  # fmt: skip
TURN: dict[str, Any] = {"prompt": 450, "cached": 0, "chunk_size": 64, "messages": NEXT, "frame": {"tools": TOOLS},
                        "salt": "s", "fingerprint": "f", "engine": "a", "idle_s": 7.4}  # fmt: skip


def evidence(turn: dict[str, Any] | None = None, left: dict[str, Any] | None = None) -> TurnCacheStats:
    return TurnCacheStats(**{**TURN, **(turn or {})}, before=PreviousTurn(**{**LEFT, **(left or {})}))


CASES: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    ({"cached": 384}, {}, 384, "none"),
    ({"cached": 416}, {}, 384, "none"),
    ({"cached": 384, "messages": [m("user")]}, {}, 384, "none"),
    ({"cached": None}, {}, 384, "unknown: the engine does not report what it found; vLLM does with "
     "--enable-prompt-tokens-details"),
    ({}, {"tokens": 64}, 0, "shorter-than-chunk: 64 tokens, a chunk has 64"),
    ({"prompt": 64}, {}, 0, "shorter-than-chunk: 64 tokens, a chunk has 64"),
    ({"cached": 32}, {"tokens": 60}, 0, "none"),
    ({"prompt": 65, "cached": 64}, {}, 64, "none"),
    ({"salt": "t"}, {}, 384, "new-salt: the salt changed"),
    ({"salt": "t", "fingerprint": "g"}, {}, 384, "new-salt: the model's fingerprint changed"),
    ({"salt": "t"}, {"salt": ""}, 384, "evicted: nothing else explains it; 7 s since the previous turn"),
    ({}, {"messages": None, "frame": None}, 384, "unknown: the previous turn is no longer kept"),
    ({"frame": {}}, {}, 384, "frame-changed: tools differs"),
    ({"frame": {"tools": [], "chat_template_kwargs": {"a": 1}}}, {}, 384,
     "frame-changed: chat_template_kwargs, tools differ"),
    ({"frame": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}, "cached": 256}, {}, 384,
     "reply-rerendered: found up to the last reply of 100 tokens"),
    ({"frame": {"tools": TOOLS, "tool_choice": "none"}}, {}, 384, "frame-changed: tool_choice differs"),
    ({"frame": {"tools": [dict(reversed(TOOLS[0].items()))]}}, {}, 384, "frame-changed: tools differs"),
    ({"frame": {}, "messages": [m("system", f"{SECRET}!"), *NEXT[1:]]}, {}, 384,
     f"message-changed: message 0 (system): differs (content, from character {len(SECRET)} on)"),
    ({"cached": 256, "messages": [*BEFORE[:4], m("assistant", "2 "), m("user")]}, {}, 384,
     "message-changed: message 4 (assistant): the reply was sent back differently (white space)"),
    ({"cached": 256, "messages": [*BEFORE[:4], m("assistant", "<think>so</think>2"), m("user")]}, {}, 384,
     "message-changed: message 4 (assistant): the reply was sent back differently (reasoning in its text)"),
    ({"messages": [*BEFORE[:3], m("user", "2"), *NEXT[4:]]}, {}, 384,
     "evicted: most of what precedes a change was not found "
     "(message 3 (user): differs (content, from character 0 on))"),
    ({"engine": "b"}, {}, 384, "other-engine: the previous turn went to another engine"),
    ({"engine": "b", "cached": 128}, {}, 384, "other-engine: the previous turn went to another engine"),
    ({"engine": "b", "cached": 128, "messages": [m("system"), m("user", "ONE")]}, {}, 384,
     "message-changed: message 1 (user): differs (content, from character 0 on)"),
    ({"messages": [m("system", f"{SECRET}!"), *NEXT[1:]]}, {}, 384,
     f"message-changed: message 0 (system): differs (content, from character {len(SECRET)} on)"),
    ({"cached": 256, "messages": [*BEFORE[:4], m("assistant", "2!"), m("user")]}, {}, 384,
     "message-changed: message 4 (assistant): the reply was sent back differently (content, from character 1 on)"),
    ({"cached": 256}, {}, 384, "reply-rerendered: found up to the last reply of 100 tokens"),
    ({"cached": 320}, {}, 384, "reply-rerendered: found up to the last reply of 100 tokens"),
    ({"cached": 192}, {"prompt": 260}, 384, "reply-rerendered: found up to the last reply of 140 tokens"),
    ({"cached": 128}, {}, 384, "evicted: nothing else explains it; 7 s since the previous turn"),
    ({"cached": 128}, {"messages": [*BEFORE[:2], m("assistant", "1", reasoning="hm"), *BEFORE[3:]]}, 384,
     "reply-rerendered: earlier replies have reasoning, which templates drop later on; or it was evicted"),
    ({"cached": 128, "prompt": 300, "messages": BEFORE[:4]}, {}, 256,
     "evicted: nothing else explains it; 7 s since the previous turn"),
    ({"cached": 256, "prompt": 300, "messages": BEFORE[:4]}, {}, 256, "none"),
]  # fmt: skip


@pytest.mark.parametrize(("turn", "left", "expected", "verdict"), CASES)
def test_the_evidence_gives_the_reason(turn: dict[str, Any], left: dict[str, Any], expected: int, verdict: str) -> None:
    e = evidence(turn, left)
    miss = explain_miss(e)
    assert (miss.expected, miss.cached, str(miss)) == (expected, e.cached, verdict)
    assert e.missed is (e.cached is not None and e.cached < expected)


def test_a_first_turn_expects_nothing() -> None:
    first = explain_miss(TurnCacheStats(**TURN))
    assert (first.expected, str(first)) == (0, "first-turn")


def test_every_reason_can_be_given() -> None:
    given_reasons = {explain_miss(evidence(turn, left)).reason for turn, left, _, _ in CASES}
    assert given_reasons | {"first-turn"} == set(get_args(misses.Reason))


def test_tools_that_the_cache_reached_beyond_are_not_blamed() -> None:
    long = [BEFORE[0], m("user", "one " * 3_000), *BEFORE[2:]]
    left = {"tokens": 3_100, "prompt": 3_000, "messages": long}
    turn = {"prompt": 3_500, "frame": {}, "messages": [*long, m("user")]}
    assert explain_miss(evidence({**turn, "cached": 2_944}, left)).reason == "reply-rerendered"
    assert explain_miss(evidence({**turn, "cached": 64}, left)).reason == "frame-changed"


def test_a_fork_expects_what_it_shares_and_nothing_under_other_tools() -> None:
    before = PreviousTurn(**{**LEFT, "tokens": 4000, "prompt": 3900})
    forked = misses.shared(before, [*BEFORE[:3], m("user", "otherwise")], {"tools": TOOLS})
    assert forked is not None
    assert forked.messages == BEFORE[:3]
    assert 1000 < forked.tokens < 4000
    whole = misses.shared(before, NEXT, {"tools": TOOLS})
    assert whole is not None
    assert forked.tokens < whole.tokens < 4000
    assert misses.shared(before, NEXT, {}) is None
    assert misses.shared(before, [m("system", "another"), *NEXT[1:]], {"tools": TOOLS}) is None
    assert misses.shared(before, [BEFORE[0], m("user", "x")], {"tools": TOOLS}) is None


CHANGES: list[tuple[list[dict[str, Any]], str | None]] = [
    (NEXT, None),
    (BEFORE, None),
    (BEFORE[:4], None),
    (BEFORE[:3], "the last 2 of 5 messages are gone"),
    ([], "the last 5 of 5 messages are gone"),
    ([m("system", [{"type": "text", "text": SECRET}]), *NEXT[1:]], None),
    ([*BEFORE[:4], m("assistant", "2", refusal=None, tool_calls=[])], None),
    ([BEFORE[0], *BEFORE[2:]], "message 1 (user) is gone"),
    ([*BEFORE[:2], m("user", "new"), *BEFORE[2:]], "message 2 (user) was inserted"),
    ([*BEFORE[:4], m("user", "2")], "message 4: user in place of assistant"),
    ([*BEFORE[:3], m("user", "2wo"), BEFORE[4]], "message 3 (user): differs (content, from character 0 on)"),
    ([m("developer"), *BEFORE[1:]], "message 0: developer in place of system"),
    (
        [*BEFORE[:4], m("assistant", None, tool_calls=[{"id": "1", "function": {"name": SECRET}}])],
        "message 4 (assistant): the reply was sent back differently (content, tool_calls)",
    ),
    ([*BEFORE[:3], m(SECRET, "two")], "message 3: unknown role in place of user"),
]


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (m("text", "abc"), m("text", "abcd"), None),
        (m("text", "abc"), m("text", "ab"), None),
        (m("text", "abc"), m("text", "abX"), "the text differs from character 2 on"),
        (m("tokens", [1, 2]), m("tokens", [1, 2, 3]), None),
        (m("tokens", [1, 2]), m("tokens", [1, 3, 3]), "token 1 differs"),
        (m("tokens", [1, 2]), m("text", "ab"), "text in place of tokens"),
        (m("user", "x"), m("text", "ab"), "text in place of a chat"),
        (m("text", "ab"), m("user", "x"), "a chat in place of text"),
    ],
)
def test_the_first_change_of_a_text_is_named(before: dict[str, Any], now: dict[str, Any], change: str | None) -> None:
    found = first_change([before], [now])
    assert (found and found.detail) == change


@pytest.mark.parametrize(("now", "change"), CHANGES)
def test_the_first_change_of_a_history_is_named(now: list[dict[str, Any]], change: str | None) -> None:
    found = first_change(BEFORE, now)
    assert (found and found.detail) == change


contents = (
    st.none() | st.text(max_size=5) | st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3)), max_size=2)
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name", "x" * 99]), contents, max_size=4),
    max_size=5,
)


@given(messages, messages, st.integers(0, 500), st.none() | st.integers(0, 500), st.integers(1, 300))
def test_whatever_is_sent_there_is_a_short_verdict(
    before: list[Any], now: list[Any], prompt: int, cached: int | None, chunk: int
) -> None:
    miss = explain_miss(
        evidence({"messages": now, "prompt": prompt, "cached": cached, "chunk_size": chunk}, {"messages": before})
    )
    assert len(miss.detail) <= MAX_DETAIL
    assert 0 <= miss.expected <= max(prompt - 1, 0)
    assert (miss.reason == "none") <= (cached is not None and cached >= miss.expected)


@pytest.mark.parametrize(("turn", "left", "expected", "verdict"), CASES)
def test_no_reason_contains_message_text(
    turn: dict[str, Any], left: dict[str, Any], expected: int, verdict: str
) -> None:
    assert SECRET not in str(explain_miss(evidence(turn, left)))

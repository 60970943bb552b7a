"""The normaliser: what is taken from the front of a prompt, what never is, and what is left to the last character."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.prompt_filters import RULES, apply, in_body
from tests.support.conversations import without_turns
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import Gateway

ALL = frozenset(RULES)
CHAT, MESSAGES, RESPONSES = b"/v1/chat/completions", b"/v1/messages", b"/v1/responses"
USER = {"role": "user", "content": "hi"}
BILLING = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch=71fea;"
STAMP = "[2026-03-09T18:00:31.123Z]"
REQUEST = "Request ID: 36e1c1a2-1111-2222-3333-444455556666"
PROMPT = "You are an agent.\n\nBe terse."


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


FOUND = [
    (f"{BILLING}\n{PROMPT}", PROMPT, "claude-billing-header"),
    (f"{BILLING}\n\n  {PROMPT}", f"  {PROMPT}", "claude-billing-header"),
    (f"{BILLING}{PROMPT}", PROMPT, "claude-billing-header"),
    (f"\r\n{BILLING}\r\n\t\r\n{PROMPT}", PROMPT, "claude-billing-header"),
    ("x-anthropic-billing-header: cc_version=2.1.227.7d1; cc_entrypoint=sdk-cli;\nX", "X", "claude-billing-header"),
    ("x-anthropic-billing-header: cc_version=2.1.99; cc_workload=cron; cch=0\nX", "X", "claude-billing-header"),
    (f"{BILLING}\n{BILLING}\n{PROMPT}", PROMPT, "claude-billing-header"),
    (f"{REQUEST}\n{PROMPT}", PROMPT, "request-id-line"),
    (f"x-request-id={'0af7651916cd43dd8448eb211c80319c'}\n{PROMPT}", PROMPT, "request-id-line"),
    (f"[trace_id: req_0123456789abcdef]\n\n{PROMPT}", PROMPT, "request-id-line"),
    (f"{STAMP}\n{PROMPT}", PROMPT, "timestamp-line"),
    (f"2026-03-09 18:00:31 +01:00\n{PROMPT}", f"2026-03-09 18:00:31 +01:00\n{PROMPT}", ""),
    (f"2026-03-09 18:00:31+01:00\n{PROMPT}", PROMPT, "timestamp-line"),
    (f"Timestamp: 2026-03-09T18:00:31\n{PROMPT}", PROMPT, "timestamp-line"),
]


@pytest.mark.parametrize(("before", "after", "rule"), FOUND)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_volatile_line_is_taken_and_the_rest_is_left_to_the_last_character(
    before: str, after: str, rule: str, role: str
) -> None:
    applied = (rule,) if rule else ()
    assert apply([system(before, role), USER], ALL) == ([system(after, role), USER], applied)
    parts = [text(before), text("second")]
    assert apply([system(parts, role), USER], ALL) == ([system([text(after), text("second")], role), USER], applied)


def test_a_line_in_a_block_or_message_of_its_own_goes_with_it() -> None:
    assert apply([system([text(BILLING), text(PROMPT)]), USER], ALL)[0] == [system([text(PROMPT)]), USER]
    assert apply([system(BILLING), system(PROMPT), USER], ALL)[0] == [system(PROMPT), USER]
    assert apply([system([text(BILLING), text(STAMP)]), USER], ALL)[0] == [USER]
    assert apply([system([text(BILLING), text(STAMP)]), system(f"{REQUEST}\n{PROMPT}"), USER], ALL) == (
        [system(PROMPT), USER],
        ("claude-billing-header", "timestamp-line", "request-id-line"),
    )


KEPT = [
    f"I was told: {BILLING}\n{PROMPT}",
    f"{PROMPT}\n{BILLING}",
    f"Current time is 15:09:20. Today's date is 2026-09-09.\n{PROMPT}",
    f"Current date and time: 2026-03-09 18:00:31\n{PROMPT}",
    f"Today's date is 2026-03-09.\n{PROMPT}",
    f"2026-03-09\n{PROMPT}",
    f"2026-03-09 18:00\n{PROMPT}",
    f"2026-03-09 18:00:31 was the day\n{PROMPT}",
    f"Request ID: take it from the user\n{PROMPT}",
    f"{REQUEST} is what you answer with\n{PROMPT}",
    "x-anthropic-billing-header: you may see it in logs",
    "x-anthropic-billing-header:",
    "",
    "\n",
]


@pytest.mark.parametrize("content", KEPT)
def test_what_the_model_is_meant_to_read_is_left_where_it_is(content: str) -> None:
    for messages in ([system(content), USER], [system([text(content)]), USER]):
        assert apply(messages, ALL) == (messages, ())
        assert apply(messages, ALL)[0] is messages


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": f"{BILLING}\nhi"}],
        [system(PROMPT), system(f"{BILLING}\nlater")],
        [USER, system(f"{BILLING}\nlater")],
        [{"role": "assistant", "content": BILLING}, USER],
        [system(BILLING)],
        [system([text(BILLING)])],
        [system(None), USER],
        [system([{"type": "image_url", "image_url": {"url": "x"}}, text(BILLING)]), USER],
        [system([text(""), text(BILLING)]), USER],
        [system(["x", 1]), 7],
        ["x", None],
        [{"content": BILLING}],
        [{"role": ["system"], "content": BILLING}],
        [system([{"type": ["text"], "text": BILLING}]), USER],
    ],
)
def test_only_the_beginning_of_leading_system_messages_is_filtered(messages: list[Any]) -> None:
    assert apply(messages, ALL)[0] is messages


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_off_takes_nothing(rule: str) -> None:
    for before, after, name in FOUND:
        if name == rule:
            messages = [system(before), USER]
            assert apply(messages, ALL - {rule})[0] is messages
            assert apply(messages, frozenset({rule}))[0] == [system(after), USER]
            assert apply(messages, frozenset())[0] is messages


# --- each dialect's own body


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        (CHAT, {"messages": [system(f"{BILLING}\n{PROMPT}"), USER]}, {"messages": [system(PROMPT), USER]}),
        (MESSAGES, {"system": f"{BILLING}\n{PROMPT}", "messages": [USER]}, {"system": PROMPT, "messages": [USER]}),
        (
            MESSAGES,
            {"system": [text(BILLING), text(PROMPT)], "messages": [USER]},
            {"system": [text(PROMPT)], "messages": [USER]},
        ),
        (MESSAGES, {"system": [text(BILLING)], "messages": [USER]}, {"messages": [USER]}),
        (MESSAGES, {"system": BILLING, "messages": [system(BILLING), USER]}, {"messages": [USER]}),
        (b"/v1/messages/count_tokens", {"system": BILLING, "messages": [USER]}, {"messages": [USER]}),
        (RESPONSES, {"instructions": f"{BILLING}\n\n{PROMPT}", "input": "hi"}, {"instructions": PROMPT, "input": "hi"}),
        (
            RESPONSES,
            {"input": [{"role": "developer", "content": [{"type": "input_text", "text": f"{STAMP}\nX"}]}, USER]},
            {"input": [{"role": "developer", "content": [{"type": "input_text", "text": "X"}]}, USER]},
        ),
    ],
)
def test_the_system_prompt_of_every_dialect_is_filtered(
    path: bytes, before: dict[str, Any], after: dict[str, Any]
) -> None:
    body = {"model": "m", **before}
    kept = copy.deepcopy(body)
    got, applied = in_body(body, path, ALL)
    assert (got, body) == ({"model": "m", **after}, kept)
    assert len(applied) == 1
    assert in_body(got, path, ALL)[0] is got
    assert in_body(body, path, frozenset())[0] is body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (MESSAGES, {"system": PROMPT, "messages": [system(BILLING), USER]}),
        (MESSAGES, {"system": 7, "messages": "x"}),
        (RESPONSES, {"instructions": None, "input": f"{BILLING}\nhi"}),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": BILLING}]}),
        (RESPONSES, {"instructions": PROMPT, "input": [system(BILLING)]}),
        (CHAT, {"system": BILLING, "messages": [USER]}),
        (CHAT, {"messages": {"role": "system", "content": BILLING}}),
        (CHAT, {}),
        (b"/v1/completions", {"prompt": f"{BILLING}\nhi"}),
        (b"/v1/embeddings", {"input": BILLING}),
    ],
)
def test_a_body_without_a_volatile_line_is_the_same_object(path: bytes, body: dict[str, Any]) -> None:
    assert in_body(body, path, ALL)[0] is body


# --- whatever comes

lines = st.sampled_from(
    [BILLING, STAMP, REQUEST, PROMPT, "", " ", "\n", f"{BILLING}\n", f"{STAMP}\n{PROMPT}"]
) | st.text(max_size=20)
contents = st.lists(lines, max_size=4).map("\n".join) | st.lists(lines.map(text), max_size=4)
conversations = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(
        ["system", "developer", "user", "assistant", "tool"]), contents), max_size=6
)  # fmt: skip


@given(conversations, st.sets(st.sampled_from(RULES)).map(frozenset))
def test_user_text_is_never_filtered_and_filtering_is_idempotent(
    messages: list[dict[str, Any]], rules: frozenset[str]
) -> None:
    before = copy.deepcopy(messages)
    got, applied = apply(messages, rules)
    assert messages == before
    assert apply(got, rules) == (got, ())
    assert set(applied) <= rules
    assert (got is messages) is not bool(applied)
    said = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    rest = messages[said:]
    assert got[len(got) - len(rest) :] == rest
    assert _all_text(got) == _all_text(messages)[len(_all_text(messages)) - len(_all_text(got)) :]


def _all_text(messages: list[dict[str, Any]]) -> str:
    contents = [m["content"] for m in messages]
    return "".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


@pytest.mark.parametrize(
    "content",
    [" " * 4_000_000, "[" + " " * 4_000_000, "\n" * 4_000_000, f"{BILLING}\n" * 20_000,
     "x-anthropic-billing-header:" + " cc_a=b" * 400_000 + "!", "2026-03-09T18:00:31" + " " * 4_000_000 + "x"],
)  # fmt: skip
def test_a_prompt_made_to_be_slow_is_read_in_linear_time(content: str) -> None:
    # A quadratic pattern would take hours here, and the test would never end.
    got, _ = apply([system(content), USER], ALL)
    assert got[-1] is USER


# --- through the gateway


def test_the_engine_gets_the_prompt_without_the_line_so_turns_share_a_prefix(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    for cch in ("aaaaa", "bbbbb"):
        front = BILLING.replace("71fea", cch)
        gateway.chat(session, messages=[system(f"{front}\n{PROMPT}"), USER])
    bodies = [request.json for request in engine.seen(CHAT.decode())]
    assert [body["messages"] for body in bodies] == [[system(PROMPT), USER]] * 2
    kept = gateway.freeze(session, f"{session}-w").json()
    messages = without_turns(gateway.http.get(f"/admin/windows/{kept['name']}/messages").json()["messages"])
    assert messages[:2] == [system(PROMPT), USER]


def test_what_only_passes_through_is_normalised_too(engine: FakeEngine, gateway: Gateway) -> None:
    gateway.http.post("/v1/responses", json={"model": MODEL, "instructions": f"{BILLING}\n{PROMPT}", "input": "hi"})
    (request,) = engine.seen("/v1/responses")
    assert request.json["instructions"] == PROMPT


def test_a_body_without_the_line_keeps_every_byte(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    body = b'{"model": "demo",  "messages":[{"role":"user","content":"h\\u0069"}], "seed": 1.0e0}'
    gateway.http.post(
        CHAT.decode(), content=body, headers={"x-session-id": session, "content-type": "application/json"}
    )
    (request,) = engine.seen(CHAT.decode())
    assert request.body.startswith(body[:-1])

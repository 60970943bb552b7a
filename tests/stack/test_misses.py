"""Why a turn missed, by the numbers of the real engine and cache: chunks of 64 tokens, blocks of 32."""

from typing import Any

import pytest

from tests.stack.driver import Gateway, chat

pytestmark = pytest.mark.stack

CHUNK = 64
SYSTEM = {"role": "system", "content": "You are terse."}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


LONG = [SYSTEM, u("tell me of windows " * 60)]


def turn(gateway: Gateway, session: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Send a turn; return how it was reviewed, and its reply."""
    answer = chat(gateway.client(session), messages, **{"max_tokens": 4, **more})
    shown = gateway.http.get(f"/admin/sessions/{session}").json()["turns"][0]
    assert shown["prompt_tokens"] == answer.usage.prompt_tokens
    assert shown["cached_tokens"] == answer.usage.prompt_tokens_details.cached_tokens
    return {**shown, "reply": {"role": "assistant", "content": answer.choices[0].message.content}}


def follow(gateway: Gateway, session: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The turn after a first one of `LONG`."""
    first = turn(gateway, session, LONG)
    assert (first["miss"], first["expected_cached_tokens"], first["cached_tokens"]) == ("first-turn", 0, 0)
    after = turn(gateway, session, messages, **more)
    whole = (first["prompt_tokens"] + 4 - 1) // CHUNK * CHUNK
    assert after["expected_cached_tokens"] == min(whole, (after["prompt_tokens"] - 1) // CHUNK * CHUNK) > 2 * CHUNK
    return after


def test_a_repeated_request_and_the_next_turn_miss_nothing(shared: Gateway) -> None:
    again = follow(shared, "again", LONG)
    assert again["miss"] == "none"
    assert again["cached_tokens"] >= again["expected_cached_tokens"]
    on = turn(shared, "again", [*LONG, again["reply"], u("and then?")])
    assert on["cached_tokens"] >= again["prompt_tokens"] // CHUNK * CHUNK
    assert on["miss"].startswith(("none", "reply-rerendered"))


def test_a_message_that_changed_is_named_by_its_place(shared: Gateway) -> None:
    system = follow(shared, "other-system", [{**SYSTEM, "content": "You are kind."}, *LONG[1:]])
    assert system["miss"] == "message-changed: message 0 (system): differs (content, from character 8 on)"
    assert system["cached_tokens"] < CHUNK
    text = LONG[1]["content"]
    late = follow(shared, "late-change", [SYSTEM, u(text[:600] + "X" + text[601:])])
    assert late["miss"] == "message-changed: message 1 (user): differs (content, from character 600 on)"
    assert 0 < late["cached_tokens"] < late["expected_cached_tokens"]


def test_tools_that_came_are_named(shared: Gateway) -> None:
    tools = follow(shared, "tools-came", [*LONG, {"role": "assistant", "content": "x"}, u("?")], tools=TOOLS)
    assert tools["miss"] == "frame-changed: tools differs"
    assert tools["cached_tokens"] < CHUNK


def test_another_salt_of_the_clients_finds_nothing(shared: Gateway) -> None:
    body = {"ignore_eos": True, "cache_salt": "another"}
    salted = follow(shared, "another-salt", LONG, extra_body=body)
    assert (salted["miss"], salted["cached_tokens"]) == ("new-salt: the salt changed", 0)


def test_a_conversation_shorter_than_a_chunk_has_that_reason(shared: Gateway) -> None:
    first = turn(shared, "short", [u("hi")], max_tokens=2)
    assert first["prompt_tokens"] + 2 < CHUNK // 2
    second = turn(shared, "short", [u("hi"), first["reply"], u("?")], max_tokens=2)
    assert second["miss"] == f"shorter-than-chunk: {first['prompt_tokens'] + 2} tokens, a chunk has {CHUNK}"
    assert (second["expected_cached_tokens"], second["cached_tokens"]) == (0, 0)


def test_a_reply_that_tokenizes_differently_than_sampled_differs_from_a_hit(shared: Gateway) -> None:
    """The demo model's replies rarely tokenise back to what was sampled; the engine's count tells which did."""
    for seed in range(3):
        session = f"reply-{seed}"
        first = turn(shared, session, LONG, max_tokens=200, temperature=1, seed=seed)
        on = turn(shared, session, [*LONG, first["reply"], u("and then?")])
        assert on["expected_cached_tokens"] == (first["prompt_tokens"] + 200 - 1) // CHUNK * CHUNK
        assert on["cached_tokens"] >= first["prompt_tokens"] // CHUNK * CHUNK
        hit = on["cached_tokens"] >= on["expected_cached_tokens"]
        assert on["miss"] == ("none" if hit else "reply-rerendered: found up to the last reply of 200 tokens")

"""Going back: a window at an earlier turn, and a session that is taken back to a window, on real KV."""

from typing import Any

import pytest

from tests.stack.clients import mcp
from tests.stack.driver import Gateway, chat
from tests.support.conversations import user, without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
TURNS = 20
QUESTION = user("And then?")
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def long(shared: Gateway) -> Messages:
    """A conversation of 20 turns, frozen after each as `long-1` and so on."""
    client = shared.client("long")
    messages: Messages = []
    for turn in range(1, TURNS + 1):
        messages.append(user(f"Turn {turn}: go through point {turn} of the list. " * 4))
        reply = chat(client, messages, temperature=1, seed=turn).choices[0].message.content
        messages.append({"role": "assistant", "content": reply})
        assert shared.freeze("long", f"long-{turn}")["kv"] == "complete"
    return messages


def isolated(gateway: Gateway, source: str, target: str) -> str:
    """A copy of a window under a salt of its own, of which the engine has nothing in its own cache yet."""
    mcp(gateway, "window_clone", source_window=source, target_window=target, isolate=True)
    return target


def ask(gateway: Gateway, session: str) -> Any:
    """The session's next turn, which sends only what is new."""
    return chat(gateway.client(session), [QUESTION], max_tokens=24, logprobs=True, top_logprobs=3)


def logprobs(answer: Any) -> list[Any]:
    return [token.model_dump() for token in answer.choices[0].logprobs.content]


@pytest.mark.parametrize("turn", range(1, TURNS + 1))
def test_a_window_of_20_turns_thaws_at_each_turn_as_one_that_was_frozen_there(
    shared: Gateway, long: Messages, turn: int
) -> None:
    """Each under a salt of its own, so that both compute the same tail: its last bits depend on how many tokens that
    are. What the engine finds is then in the stored chunks alone."""
    frozen = isolated(shared, f"long-{turn}", f"apart-{turn}")
    expected = shared.thaw(frozen, warm="gpu")
    found = shared.thaw(isolated(shared, f"long-{TURNS}", f"whole-{turn}"), warm="gpu", at_turn=turn)
    assert found["token_count"] == expected["token_count"]
    receipt, other = found["receipt"], expected["receipt"]
    assert receipt["at_turn"] == turn
    assert receipt["chunks_found"] == receipt["chunks_expected"] == found["token_count"] // CHUNK > 0
    whole = min(receipt["chunks_expected"] * CHUNK, found["token_count"] - 1)
    assert receipt["cached_tokens"] == receipt["expected_cached_tokens"] == other["cached_tokens"] == whole
    assert not receipt["partial"]
    one, control = ask(shared, found["session_id"]), ask(shared, expected["session_id"])
    assert one.usage.prompt_tokens == control.usage.prompt_tokens
    assert one.usage.prompt_tokens_details.cached_tokens == control.usage.prompt_tokens_details.cached_tokens >= whole
    assert logprobs(one) == logprobs(control)  # tokens and, to the last bit, their probabilities


def test_a_thaw_at_a_turn_shares_the_windows_salt_and_kv(shared: Gateway, long: Messages) -> None:
    whole = shared.thaw(f"long-{TURNS}")
    for turn in (1, TURNS // 2, TURNS - 1):
        thawed = shared.thaw(f"long-{TURNS}", warm="gpu", at_turn=turn)
        assert thawed["cache_salt"] == whole["cache_salt"]
        assert thawed["receipt"]["chunks_found"] == thawed["receipt"]["chunks_expected"]
        assert thawed["receipt"]["cached_tokens"] >= thawed["receipt"]["expected_cached_tokens"]
        answer = ask(shared, thawed["session_id"])
        assert answer.usage.prompt_tokens_details.cached_tokens >= thawed["receipt"]["expected_cached_tokens"]
        shared.freeze(thawed["session_id"], f"on-from-{turn}")
        assert messages_of(shared, f"on-from-{turn}")[:-1] == [*long[: 2 * turn], QUESTION]


def messages_of(gateway: Gateway, window: str) -> Messages:
    return without_turns(gateway.http.get(f"/admin/windows/{window}/messages").json()["messages"])

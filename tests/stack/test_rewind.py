"""Going back: a window at an earlier turn, and a session that is taken back to a window, on real KV."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.stack.clients import mcp
from tests.stack.driver import Gateway, chat
from tests.support import old_guide
from tests.support.conversations import user, without_turns
from tests.support.old_guide_scripts import SCRIPTS

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


def test_a_base_url_of_a_turn_and_a_question_at_it(shared: Gateway, long: Messages) -> None:
    answer = shared.http.post(
        f"/w/long-{TURNS}@3/v1/chat/completions",
        json={"model": "demo", "messages": [QUESTION], "max_tokens": 4, "temperature": 0},
    )
    expected = shared.thaw("long-3", warm="none")["receipt"]
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= expected["expected_cached_tokens"] > 0
    asked = mcp(shared, "window_ask", window_name=f"long-{TURNS}", question="And then?", max_tokens=4, at_turn=3)
    assert asked["receipt"]["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert asked["receipt"]["cached_tokens"] >= asked["receipt"]["expected_cached_tokens"] > 0


def messages_of(gateway: Gateway, window: str) -> Messages:
    return without_turns(gateway.http.get(f"/admin/windows/{window}/messages").json()["messages"])


def say_in_chat(gateway: Gateway, text: str) -> Any:
    """One turn of `exploration` by a client that sends only what is new; the tokens that were cached."""
    return chat(gateway.client("exploration"), [user(text)]).usage.prompt_tokens_details.cached_tokens


def say_in_responses(gateway: Gateway, text: str) -> Any:
    """The same in the Responses API, where the gateway keeps the conversation from its first turn on."""
    body = {"model": "demo", "input": text, "conversation": "exploration", "max_output_tokens": 12, "temperature": 0}
    answer = gateway.http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["input_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("say", [say_in_chat, say_in_responses])
def test_w02_as_in_the_old_guide_for_a_client_that_sends_only_new_messages(
    own: Gateway, say: Callable[[Gateway, str], int]
) -> None:
    if say is say_in_chat:  # such a client begins with a window, or sends its own history until the first thaw
        chat(own.client("base"), [user("What do we build on? " * 20)])
        own.freeze("base", "base")
        own.thaw("base", new_session_id="exploration")
    say(own, "Explore what could be done. " * 20)
    cached: list[int] = []

    def meanwhile(line: str) -> None:
        _, _, text = line.partition(": ")
        cached.append(say(own, f"Try {text}. " * 10))

    script = SCRIPTS["W2"]
    thaw = 'window_thaw(window_name="before-experiment"'
    assert script.text.count(thaw) == 1
    old_guide.run(own.url, replace(script, text=script.text.replace(thaw, f'{thaw}, into="exploration"')), meanwhile)
    before, a, b = (messages_of(own, name) for name in ("before-experiment", "approach-a", "approach-b"))
    assert a[: len(before)] == b[: len(before)] == before
    assert ["approach A" in a[-2]["content"], "approach B" in b[-2]["content"]] == [True, True]
    assert len(a) == len(b) == len(before) + 2
    window = own.http.get("/admin/windows/before-experiment").json()
    assert window["receipt"]["chunks"] > 0
    assert min(cached) >= window["receipt"]["chunks"] * CHUNK, "both turns found all of the window's KV"
    assert own.http.get("/admin/windows/approach-b").json()["parent_window"] == "before-experiment"

"""The review of each turn in a session's status: the estimate of its prompt, and what it found in the cache."""

from pathlib import Path
from typing import Any

import pytest

from gateway.dialects.base import Reply
from gateway.dialects.chat import ChatDialect
from gateway.records import Session, Trace, Turn, Usage
from gateway.sessions.cache_review import CacheReviewer
from gateway.sessions.completed_turn import ParsedTurn
from gateway.sessions.prefix_chain import Prompt
from gateway.sessions.session_match import SessionMatch
from gateway.sessions.token_estimator import Estimator
from gateway.sessions.turn_context import RelayResult, TurnContext
from gateway.store.sqlite import SqliteStore
from gateway.store.types import TurnRecord
from tests.support.fakes.engine import Exchange, FakeEngine, render, whole_reply
from tests.support.gateway_process import Gateway

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "be terse " * 60}
REPLY = {"role": "assistant", "content": "Hello there!"}


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


LONG = [SYSTEM, u("tell me " * 60)]


def last(gateway: Gateway, session: str, count: int) -> dict[str, Any]:
    """The last of `count` turns."""
    return gateway.turns(session, count)[0]


def test_a_continued_conversation_misses_nothing(gateway: Gateway, session: str) -> None:
    messages = [*LONG]
    for count in (1, 2, 3):
        gateway.chat(session, messages=messages)
        turn = last(gateway, session, count)
        # The fake engine has a token for each byte, and caches by sixteen; without a cache a chunk is taken for 256.
        assert turn["miss"] == ("first-turn" if count == 1 else "none")
        assert turn["expected_cached_tokens"] == (0 if count == 1 else 1024)
        assert turn["expected_cached_tokens"] <= turn["cached_tokens"]
        messages += [REPLY, u("and then?")]


@pytest.mark.parametrize(
    ("messages", "more", "why"),
    [
        ([{**SYSTEM, "content": "be kind"}, *LONG[1:], REPLY, u("?")], {}, "message-changed: message 0 (system)"),
        ([LONG[0], u("ask me " * 90), REPLY, u("?")], {}, "message-changed: message 1 (user): differs (content"),
        ([LONG[0], u("?"), *LONG[1:], REPLY, u("?")], {}, "message-changed: message 1 (user) was inserted"),
        ([*LONG, REPLY, u("?")], {"cache_salt": "another"}, "new-salt"),
    ],
)
def test_a_turn_that_missed_has_a_reason(
    gateway: Gateway, session: str, messages: list[dict[str, Any]], more: dict[str, Any], why: str
) -> None:
    gateway.chat(session, messages=LONG)
    gateway.turns(session)
    gateway.chat(session, messages=messages, **more)
    turn = last(gateway, session, 2)
    assert turn["miss"].startswith(why)
    assert turn["cached_tokens"] < turn["expected_cached_tokens"]
    assert "tell me" not in turn["miss"]


def test_a_tool_choice_is_not_in_the_prompt_and_explains_nothing(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    gateway.chat(session, messages=LONG, tools=tools, tool_choice="auto")
    gateway.turns(session)
    engine._kv.clear()
    gateway.chat(session, messages=[*LONG, REPLY, u("?")], tools=tools, tool_choice="required")
    assert last(gateway, session, 2)["miss"].startswith("evicted")


def test_a_reply_sent_back_without_its_blanks_makes_a_branch_miss(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def answer(exchange: Exchange) -> None:
        ids = render(exchange.request.json["messages"], generation_prompt=True)
        exchange.json(whole_reply(f" {'so it is ' * 60}", engine._usage("s", ids, completion=600)))

    engine.on_chat = answer
    reply = gateway.chat(session, messages=LONG).json()["choices"][0]["message"]["content"]
    gateway.turns(session)
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    messages = [*LONG, {"role": "assistant", "content": reply.strip()}, u("?")]
    answered = gateway.http.post(f"/w/w-{session}{CHAT}", json={"model": "demo", "messages": messages})
    (turn,) = gateway.turns(answered.headers["x-session-id"])
    assert turn["cached_tokens"] < turn["expected_cached_tokens"]
    assert turn["miss"] == "message-changed: message 2 (assistant): the reply was sent back differently (white space)"


def test_a_fork_expects_what_it_shares_with_the_conversation_that_it_left(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def ask(messages: list[dict[str, Any]]) -> str:
        answered = gateway.http.post(CHAT, json={"model": "demo", "messages": messages})
        return str(answered.headers["x-session-id"])

    beginning = [SYSTEM, u(f"{session} tell me " * 60), REPLY]
    origin = ask(beginning[:2])
    assert ask([*beginning, u("one " * 200)]) == origin
    gateway.turns(origin, 2)
    (turn,) = gateway.turns(ask([*beginning, u("another " * 200)]))
    assert (turn["recognised_by"], turn["miss"]) == ("fork", "none")
    assert 1024 < turn["expected_cached_tokens"] <= turn["cached_tokens"]
    engine._kv.clear()
    (turn,) = gateway.turns(ask([*beginning, u("a third " * 200)]))
    assert turn["miss"].startswith("evicted")


def test_a_deleted_session_leaves_nothing_to_the_next_of_its_name(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session, messages=LONG)
    gateway.turns(session)
    assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200
    engine._kv.clear()
    gateway.chat(session, messages=LONG)
    turn = last(gateway, session, 1)
    assert (turn["miss"], turn["expected_cached_tokens"]) == ("first-turn", 0)


def test_an_engine_that_forgot_differs_from_one_that_reports_nothing(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def silent(exchange: Exchange) -> None:
        exchange.json(whole_reply("x", {"prompt_tokens": 2000, "completion_tokens": 3}))

    gateway.chat(session, messages=LONG)
    gateway.turns(session)
    engine._kv.clear()
    gateway.chat(session, messages=[*LONG, REPLY, u("?")])
    assert last(gateway, session, 2)["miss"].startswith("evicted: nothing else explains it")
    engine.on_chat = silent
    gateway.chat(session, messages=[*LONG, REPLY, u("?"), REPLY, u("?")])
    assert last(gateway, session, 3)["miss"].startswith("unknown: the engine does not report")


def test_a_turn_that_follows_at_once_is_compared_with_the_one_just_before(gateway: Gateway, session: str) -> None:
    messages = [*LONG]
    for _ in range(6):  # faster than turns are recorded
        gateway.chat(session, messages=messages)
        messages += [REPLY, u("and then? " * 60)]
    turns = gateway.turns(session, 6)
    assert [turn["miss"] for turn in turns] == ["none"] * 5 + ["first-turn"]
    expected = [turn["expected_cached_tokens"] for turn in reversed(turns)]
    assert sorted(set(expected)) == expected


@pytest.mark.anyio
async def test_a_turn_is_not_compared_with_a_concurrent_one(tmp_path: Path) -> None:
    def read(asked: str, started_at: float, ended_at: float) -> ParsedTurn:
        call = ChatDialect().read({"model": "demo", "messages": [*LONG, REPLY, u(asked)]}, b"")
        turn = TurnContext("t", ChatDialect(), call, None, Prompt(call.messages, b""), (), False, 0.0, fingerprint="f")
        turn.match, turn.salt, turn.started_at = SessionMatch(known, "", b""), "salt", started_at
        turn.duration_ms, turn.result = (ended_at - started_at) * 1000, RelayResult("completed", 200)
        return ParsedTurn(turn, Reply(REPLY, Usage(1100, 5, 0)), call.whole, [*call.whole, REPLY])

    first = Turn("t", "s", "demo", "completed", 200, 1.0, 1000.0, Usage(1000, 5, 0))
    new = Session("t", "s", lineage="s")
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5) as store:
        await store.record([TurnRecord(first, new, "f", "salt", [*LONG, REPLY], {}, Trace(b"", b"", None))])
        known = await store.session("t", "s")
        assert known is not None
        reviews = CacheReviewer(store, Estimator(), lambda: 64)
        assert (await reviews.review(read("one", 10, 20))).miss.startswith("evicted")
        assert (await reviews.review(read("another", 11, 21))).miss.startswith("evicted")


def test_the_estimate_and_how_wrong_it_was_are_shown(gateway: Gateway, session: str) -> None:
    messages = [*LONG]
    for count in (1, 2, 3):
        gateway.chat(session, messages=messages)
        turn = last(gateway, session, count)
        assert turn["estimated_tokens"] > 0
        messages += [REPLY, u("and then? " * 30)]
    shown = gateway.http.get(f"/admin/sessions/{session}").json()["estimates"]
    assert (shown["source"], shown["exact"]) == ("bytes_per_token", False)
    assert "org/demo" in shown["why"]
    assert shown["prompts"] >= 3
    assert shown["mean_error"] is not None


def test_a_turn_that_failed_is_not_reviewed(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "no"}}, 400)
    gateway.chat(session, messages=LONG)
    turn = last(gateway, session, 1)
    assert (turn["estimated_tokens"], turn["expected_cached_tokens"], turn["miss"]) == (None, None, None)


def test_the_rules_that_normalised_a_prompt_are_in_the_sessions_status(gateway: Gateway, session: str) -> None:
    front = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch=71fea;\n2026-03-09T18:00:31Z\n"
    gateway.chat(session, messages=[{**SYSTEM, "content": front + SYSTEM["content"]}, u("hi")])
    gateway.turns(session)
    shown = gateway.http.get(f"/admin/sessions/{session}").json()
    assert shown["normalised"] == ["claude-billing-header", "timestamp-line"]

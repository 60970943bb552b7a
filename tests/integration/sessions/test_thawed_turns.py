"""Turns of a thawed session that bring only what is new, or only the last turns: what the engine then gets to see."""

from typing import Any

import httpx
import pytest

from tests.support.fakes.engine import MODEL, FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway

pytestmark = pytest.mark.usefixtures("each_store")

CHAT = "/v1/chat/completions"
Message = dict[str, Any]
SYSTEM = {"role": "system", "content": "You are terse."}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


WINDOW = [SYSTEM, user("turn 1"), assistant("re: turn 1"), user("turn 2"), assistant("re: turn 2")]


@pytest.fixture
def window(engine: FakeEngine, gateway: Gateway, session: str) -> str:
    """A window of two turns; the engine repeats each question."""
    engine.on_chat = lambda exchange: exchange.json(
        whole_reply(f"re: {exchange.request.json['messages'][-1]['content']}", usage_of(9, 2))
    )
    ask(gateway, f"/s/{session}", WINDOW[:2])
    ask(gateway, f"/s/{session}", WINDOW[:4])
    gateway.turns(session, 2)
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    return f"w-{session}"


@pytest.fixture
def thawed(gateway: Gateway, session: str, window: str) -> str:
    """A session thawed from it."""
    body = {"new_session_id": f"{session}-2"}
    assert gateway.http.post(f"/admin/windows/{window}/thaw", json=body).status_code == 200
    return f"{session}-2"


def ask(gateway: Gateway, base: str, messages: list[Message], **more: Any) -> httpx.Response:
    answer = gateway.http.post(f"{base}{CHAT}", json={"model": MODEL, "messages": messages}, **more)
    assert answer.status_code == 200, answer.text
    return answer


def sent(engine: FakeEngine) -> list[Message]:
    return list(engine.seen(CHAT)[-1].json["messages"])


def said_of(answer: httpx.Response) -> tuple[str | None, str | None]:
    return answer.headers.get("x-context-history"), answer.headers.get("x-context-added-messages")


def test_turns_that_bring_only_what_is_new_follow_each_other(engine: FakeEngine, gateway: Gateway, thawed: str) -> None:
    whole, told = [*WINDOW], []
    for number, text in enumerate(("three", "four", "five")):
        told.append(said_of(ask(gateway, f"/s/{thawed}", [user(text)])))
        assert sent(engine) == [*whole, user(text)], number
        whole += [user(text), assistant(f"re: {text}")]
    assert told == [("window", "4"), ("session", "6"), ("session", "8")]
    newest, *_ = gateway.turns(thawed, 3)
    assert newest["recognised_by"] == "base URL; follows what the session holds"
    assert gateway.freeze(thawed, f"{thawed}-w").status_code == 201
    kept = gateway.http.get(f"/admin/windows/{thawed}-w/messages").json()["messages"]
    assert [message["content"] for message in kept] == [message["content"] for message in whole]


def test_a_thawed_client_continues_with_new_messages_or_with_all_of_them(
    engine: FakeEngine, gateway: Gateway, thawed: str
) -> None:
    since: list[Message] = []
    for text in ("three", "four", "five"):
        ask(gateway, f"/s/{thawed}", [*since, user(text)])
        assert sent(engine) == [*WINDOW, *since, user(text)]
        since += [user(text), assistant(f"re: {text}")]
    answer = ask(gateway, f"/s/{thawed}", [*WINDOW, *since, user("six")])
    assert sent(engine) == [*WINDOW, *since, user("six")]
    assert said_of(answer) == (None, None)


def test_a_repeated_message_that_may_be_a_retry_is_marked_ambiguous(
    engine: FakeEngine, gateway: Gateway, thawed: str
) -> None:
    ask(gateway, f"/s/{thawed}", [user("go on")])
    answer = ask(gateway, f"/s/{thawed}", [user("go on")])
    assert sent(engine) == [*WINDOW, user("go on")]
    assert said_of(answer)[0] == "window; ambiguous"
    newest, *_ = gateway.turns(thawed, 2)
    assert newest["recognised_by"].endswith("follows what the window holds, the client may have meant otherwise")


def test_a_turn_that_failed_leaves_nothing_to_the_next(engine: FakeEngine, gateway: Gateway, thawed: str) -> None:
    ask(gateway, f"/s/{thawed}", [user("three")])
    ordinary, engine.on_chat = engine.on_chat, lambda exchange: exchange.json({"error": {"message": "no"}}, 400)
    gateway.http.post(f"/s/{thawed}{CHAT}", json={"model": MODEL, "messages": [user("four")]})
    engine.on_chat = ordinary
    ask(gateway, f"/s/{thawed}", [user("four")])
    assert sent(engine) == [*WINDOW, user("three"), assistant("re: three"), user("four")]


@pytest.mark.parametrize("base", ["/w/", "/s/"])
def test_a_history_without_its_oldest_turns_has_no_turn_twice(
    engine: FakeEngine, gateway: Gateway, window: str, thawed: str, base: str
) -> None:
    path = f"/w/{window}" if base == "/w/" else f"/s/{thawed}"
    first = ask(gateway, path, [SYSTEM, *WINDOW[3:], user("turn 3")])
    assert sent(engine) == [*WINDOW, user("turn 3")]
    assert said_of(first) == ("window", "2")
    gateway.turns(first.headers["x-session-id"])
    second = ask(gateway, path, [SYSTEM, user("turn 3"), assistant("re: turn 3"), user("turn 4")])
    assert sent(engine) == [*WINDOW, user("turn 3"), assistant("re: turn 3"), user("turn 4")]
    assert second.headers["x-session-id"] == first.headers["x-session-id"]
    later = [assistant("re: turn 3"), user("turn 4"), assistant("re: turn 4"), user("turn 5")]
    assert ask(gateway, path, [SYSTEM, *later]).headers["x-session-id"] == first.headers["x-session-id"]
    assert sent(engine) == [*WINDOW, user("turn 3"), *later]


def test_a_branch_of_trimmed_histories_is_found_again_by_its_whole_history(
    engine: FakeEngine, gateway: Gateway, window: str
) -> None:
    first = ask(gateway, f"/w/{window}", [SYSTEM, *WINDOW[3:], user("turn 3")]).headers["x-session-id"]
    whole = [*WINDOW, user("turn 3"), assistant("re: turn 3"), user("turn 4")]
    assert ask(gateway, f"/w/{window}", whole).headers["x-session-id"] == first


def test_texts_follow_each_other_too(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    def complete(name: str, prompt: str) -> httpx.Response:
        answer = gateway.http.post(f"/s/{name}/v1/completions", json={"model": MODEL, "prompt": prompt})
        assert answer.status_code == 200, answer.text
        return answer

    complete(session, "Once upon a time")
    gateway.turns(session)
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    told = [complete(thawed, text).headers.get("x-context-history") for text in (" there was", " a king", " and")]
    assert engine.seen("/v1/completions")[-1].json["prompt"] == "Once upon a timex there wasx a kingx and"
    assert told == ["window", "session", "session"]

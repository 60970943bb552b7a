"""A window as a base URL: each new conversation is a branch, whether sent as a whole or only its new messages."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import Gateway

CHAT = "/v1/chat/completions"
BEGINNING = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Remember the word."}]
REPLY = {"role": "assistant", "content": "Hello there!"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
def window(gateway: Gateway, session: str) -> str:
    """A window of one turn."""
    first = gateway.http.post(f"/s/{session}{CHAT}", json={"model": MODEL, "messages": BEGINNING})
    assert first.status_code == 200
    name = f"w-{session}"
    assert gateway.freeze(session, name).status_code == 201
    return name


def ask(gateway: Gateway, base: str, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
    return gateway.http.post(f"{base}{CHAT}", json={"model": MODEL, "messages": messages}, **more)


def sent(engine: FakeEngine) -> list[dict[str, Any]]:
    """The messages of the last turn that the engine saw."""
    return list(engine.seen(CHAT)[-1].json["messages"])


def test_new_messages_continue_the_window_in_a_branch(
    engine: FakeEngine, gateway: Gateway, session: str, window: str
) -> None:
    one = ask(gateway, f"/w/{window}", [user("first branch")]).headers["x-session-id"]
    assert sent(engine) == [*BEGINNING, REPLY, user("first branch")]
    two = ask(gateway, f"/w/{window}", [user("second branch")]).headers["x-session-id"]
    assert len({one, two, session}) == 3
    again = ask(gateway, f"/w/{window}", [user("first branch"), REPLY, user("on")])
    assert again.headers["x-session-id"] == one
    assert sent(engine) == [*BEGINNING, REPLY, user("first branch"), REPLY, user("on")]
    shown = gateway.http.get(f"/admin/sessions/{one}").json()
    assert (shown["lineage"], shown["window"], shown["recognised_by"]) == (session, window, "window")
    assert len({request.json["cache_salt"] for request in engine.seen(CHAT)}) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_two_clients_with_the_same_first_words_are_two_branches(
    engine: FakeEngine, gateway: Gateway, window: str, *, whole: bool
) -> None:
    said = [*BEGINNING, REPLY, user("same")] if whole else [user("same")]
    answers = [ask(gateway, f"/w/{window}", said) for _ in range(3)]
    branches = [answer.headers["x-session-id"] for answer in answers]
    assert len(set(branches)) == 3
    assert len({answer.headers["x-context-tokens"] for answer in answers}) == 1
    assert len({request.json["cache_salt"] for request in engine.seen(CHAT)}) == 1
    # Each goes on by its own reply; where that is the same, the branch that was active last continues.
    assert ask(gateway, f"/w/{window}", [*said, REPLY, user("on")]).headers["x-session-id"] in branches


def test_first_request_of_a_branch_that_failed_is_retried_there(
    engine: FakeEngine, gateway: Gateway, window: str
) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "out of memory"}}, 500)
    first = ask(gateway, f"/w/{window}", [user("retried")])
    engine.on_chat = engine.answer_chat
    second = ask(gateway, f"/w/{window}", [user("retried")])
    assert (first.status_code, second.status_code) == (500, 200)
    assert first.headers["x-session-id"] == second.headers["x-session-id"]


def test_full_history_is_taken_as_it_is(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    history = [*BEGINNING, REPLY, user("on")]
    one = ask(gateway, f"/w/{window}", history).headers["x-session-id"]
    assert sent(engine) == history
    assert ask(gateway, f"/w/{window}", [*history, REPLY, user("more")]).headers["x-session-id"] == one


def test_window_header_equals_the_base_url(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    one = ask(gateway, "", [user("by header")], headers={"x-window": window}).headers["x-session-id"]
    assert sent(engine) == [*BEGINNING, REPLY, user("by header")]
    assert engine.seen(CHAT)[-1].header("x-window") == []
    assert ask(gateway, f"/w/{window}", [user("by header"), REPLY, user("on")]).headers["x-session-id"] == one


def test_branch_can_have_its_own_session_id(engine: FakeEngine, gateway: Gateway, session: str, window: str) -> None:
    named = {"x-session-id": f"{session}-mine"}
    assert ask(gateway, f"/w/{window}", [user("a")], headers=named).headers["x-session-id"] == f"{session}-mine"
    ask(gateway, f"/w/{window}", [user("a"), REPLY, user("b")], headers=named)
    assert sent(engine) == [*BEGINNING, REPLY, user("a"), REPLY, user("b")]
    # From then on it is a session like any other.
    ask(gateway, "", [user("a"), REPLY, user("b"), REPLY, user("c")], headers=named)
    assert sent(engine) == [*BEGINNING, REPLY, user("a"), REPLY, user("b"), REPLY, user("c")]


def test_session_of_another_window_is_refused(engine: FakeEngine, gateway: Gateway, session: str, window: str) -> None:
    gateway.chat(f"{session}-other")
    gateway.turns(f"{session}-other")
    answer = ask(gateway, f"/w/{window}", [user("a")], headers={"x-session-id": f"{session}-other"})
    assert answer.status_code == 400
    assert window in answer.text


def test_agent_and_its_subconversation_under_a_window(gateway: Gateway, session: str, window: str) -> None:
    named = {"x-claude-code-session-id": f"{session}-cc"}
    assert ask(gateway, f"/w/{window}", [user("work")], headers=named).headers["x-session-id"] == f"{session}-cc"
    grown = [user("work"), REPLY, user("on")]
    assert ask(gateway, f"/w/{window}", grown, headers=named).headers["x-session-id"] == f"{session}-cc"
    side = ask(gateway, f"/w/{window}", [user("a title, please")], headers=named).headers["x-session-id"]
    assert side.startswith(f"{session}-cc:")


@pytest.mark.parametrize("header", ["x-session-id", "x-openwebui-chat-id"])
@pytest.mark.parametrize("texts", [["same"] * 5, ["the task", "a title", "tags", "a title", "the task"]])
def test_the_first_requests_of_a_client_may_come_at_once(
    gateway: Gateway, session: str, window: str, header: str, texts: list[str]
) -> None:
    branch, start = f"b-{session}", threading.Barrier(len(texts))

    def begin(text: str) -> httpx.Response:
        with httpx.Client(base_url=gateway.url, timeout=60, headers={header: branch}) as http:
            start.wait()
            return http.post(f"/w/{window}{CHAT}", json={"model": MODEL, "messages": [user(text)]})

    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(begin, texts))
    assert [answer.status_code for answer in answers] == [200] * len(texts), [answer.text for answer in answers]
    branches = {answer.headers["x-session-id"] for answer in answers}
    assert branch in branches
    assert len(branches) == (1 if header == "x-session-id" else len(set(texts)))


def test_agent_with_a_session_continues_in_a_branch(
    engine: FakeEngine, gateway: Gateway, session: str, window: str
) -> None:
    """Its id is that of its own session, as pi's `session_id` is, and it cannot leave it away."""
    named = {"session_id": f"{session}-pi"}
    before = ask(gateway, "", [user("before")], headers=named).headers["x-session-id"]
    gateway.turns(before)
    first = ask(gateway, f"/w/{window}", [user("work")], headers=named).headers["x-session-id"]
    assert sent(engine) == [*BEGINNING, REPLY, user("work")]
    gateway.turns(first)
    second = ask(gateway, f"/w/{window}", [user("work"), REPLY, user("on")], headers=named).headers["x-session-id"]
    assert (before, first.startswith(f"{session}-pi:"), first == second) == (f"{session}-pi", True, True)
    assert ask(gateway, "", [user("before"), REPLY, user("on")], headers=named).headers["x-session-id"] == before


def test_other_system_message_is_a_conflict_by_default(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    other = {"role": "system", "content": "Be verbose."}
    refused = ask(gateway, f"/w/{window}", [other, user("a")])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "window_system_conflict")
    ask(gateway, f"/w/{window}", [other, user("a")], headers={"x-window-system": "keep"})
    assert sent(engine) == [*BEGINNING, REPLY, user("a")]
    ask(gateway, f"/w/{window}", [other, user("b")], headers={"x-window-system": "replace"})
    assert sent(engine) == [other, *BEGINNING[1:], REPLY, user("b")]


def test_missing_window_is_not_found(engine: FakeEngine, gateway: Gateway) -> None:
    answer = ask(gateway, "/w/nobody-made-it", [user("a")])
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "window_not_found")
    assert engine.seen(CHAT) == []


def test_non_turns_pass_through_under_a_window(gateway: Gateway, window: str) -> None:
    assert gateway.http.get(f"/w/{window}/v1/models").status_code == 200


@pytest.mark.parametrize("copy", ["thaw", "thaw of a clone"])
def test_conversation_without_id_continues_after_a_thaw(
    engine: FakeEngine, gateway: Gateway, session: str, copy: str
) -> None:
    history = [user(session)]
    first = ask(gateway, "", history).headers["x-session-id"]
    name = f"w-{session}"
    assert gateway.freeze(first, name).status_code == 201
    if copy == "thaw of a clone":
        body = {"target_window": f"c-{session}"}
        assert gateway.http.post(f"/admin/windows/{name}/clone", json=body).status_code == 201
        name = f"c-{session}"
    thawed = gateway.http.post(f"/admin/windows/{name}/thaw", json={"new_session_id": f"{session}-thawed"})
    assert thawed.status_code == 200
    history += [REPLY, user("THIRD")]
    assert ask(gateway, "", history).headers["x-session-id"] == first
    gateway.turns(first, 2)
    history += [REPLY, user("FOURTH")]
    assert ask(gateway, "", history).headers["x-session-id"] == first
    gateway.turns(first, 3)
    assert gateway.freeze(first, f"later-{session}").status_code == 201
    kept = gateway.http.get(f"/admin/windows/later-{session}/messages").json()["messages"]
    assert [message["content"] for message in kept] == [m["content"] for m in [*history, REPLY]]


def test_thawed_session_is_found_by_its_history(gateway: Gateway, session: str) -> None:
    history = [user(session)]
    first = ask(gateway, "", history).headers["x-session-id"]
    assert gateway.freeze(first, f"w-{session}").status_code == 201
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"new_session_id": f"{session}-thawed"})
    assert thawed.status_code == 200
    assert gateway.http.delete(f"/admin/sessions/{first}").status_code == 200
    assert ask(gateway, "", [*history, REPLY, user("on")]).headers["x-session-id"] == f"{session}-thawed"

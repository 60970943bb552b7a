"""Conversations without ids, in front of a gateway: which are one session, and which must never be taken for one."""

import secrets
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.conversations import SYSTEM, assistant, user
from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of

pytestmark = pytest.mark.usefixtures("each_store")

CHAT = "/v1/chat/completions"


def ask(gateway: Gateway, messages: list[dict[str, Any]], headers: dict[str, str] | None = None, **more: Any) -> str:
    """Send a turn without any id of ours; return the session that it was put in."""
    answer = gateway.http.post(CHAT, json={"model": MODEL, "messages": messages, **more}, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-session-id"]


def shown(gateway: Gateway, session: str) -> dict[str, Any]:
    gateway.turns(session)
    return dict(gateway.http.get(f"/admin/sessions/{session}").json())


def test_a_conversation_without_ids_is_one_session(gateway: Gateway, session: str) -> None:
    messages = [SYSTEM, user(session)]
    first = ask(gateway, messages)
    for text in ("two", "three", "four"):
        messages += [assistant("Hello there!"), user(text)]
        assert ask(gateway, messages) == first
    turns = gateway.turns(first, 4)
    assert [turn["recognised_by"] for turn in turns] == ["prefix", "prefix", "prefix", "new"]
    assert shown(gateway, first)["recognised_by"] == "new"


def test_a_fork_is_a_new_session_with_the_same_lineage_and_salt(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    first = [SYSTEM, user(session)]
    origin = ask(gateway, first)
    answered = [*first, assistant("Hello there!")]
    assert ask(gateway, [*answered, user("two")]) == origin
    fork = ask(gateway, [*answered, user("otherwise")])
    assert fork != origin
    seen = shown(gateway, fork)
    assert (seen["lineage"], seen["forked_from"], seen["recognised_by"]) == (origin, origin, "fork")
    assert ask(gateway, [*answered, user("otherwise"), assistant("Hello there!"), user("on")]) == fork
    salts = {request.json["cache_salt"] for request in engine.seen(CHAT)}
    assert len(salts) == 1


def test_clients_with_the_same_system_prompt_and_question_are_two_sessions(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [SYSTEM, user(session)]
    one, two = ask(gateway, messages), ask(gateway, messages)
    assert one != two
    assert shown(gateway, one)["lineage"] != shown(gateway, two)["lineage"]
    assert len({request.json["cache_salt"] for request in engine.seen(CHAT)}) == 2


def test_a_retry_of_a_failed_first_request_is_the_same_session(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [SYSTEM, user(session)]
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "busy", "code": 503}}, 503)
    failed = gateway.http.post(CHAT, json={"model": MODEL, "messages": messages})
    assert failed.status_code == 503
    engine.on_chat = engine.answer_chat
    gateway.turns(failed.headers["x-session-id"])
    assert ask(gateway, messages) == failed.headers["x-session-id"]


def test_repeating_the_last_turn_keeps_the_session_and_its_new_reply(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [SYSTEM, user(session)]
    first = ask(gateway, messages)
    messages += [assistant("Hello there!"), user("two")]
    assert ask(gateway, messages) == first
    engine.on_chat = lambda exchange: exchange.json(whole_reply("Otherwise.", usage_of(5, 2)))
    assert ask(gateway, messages) == first
    assert ask(gateway, [*messages, assistant("Otherwise."), user("three")]) == first
    fork = ask(gateway, [*messages, assistant("Hello there!"), user("three")])
    assert shown(gateway, fork)["lineage"] == first


def test_an_agents_side_conversations_are_separate_sessions(gateway: Gateway, session: str) -> None:
    named = {"x-claude-code-session-id": session}
    assert ask(gateway, [SYSTEM, user("work")], named) == session
    title = ask(gateway, [{"role": "system", "content": "Make a title."}, user("title of work")], named)
    assert title.startswith(f"{session}:")
    changed = {"role": "system", "content": "You are terse. It is Tuesday."}
    assert ask(gateway, [changed, user("work"), assistant("Hello there!"), user("on")], named) == session
    agent = ask(gateway, [SYSTEM, user("work")], named | {"x-claude-code-agent-id": "a"})
    assert agent == f"{session}:a"
    # All of them are one client's: they share its salt, and what they have in common is computed once.
    assert {shown(gateway, one)["lineage"] for one in (title, agent)} == {session}
    assert {shown(gateway, one)["forked_from"] for one in (title, agent)} == {session}


def test_a_cache_key_names_its_first_conversation_and_keeps_others_apart(gateway: Gateway, session: str) -> None:
    first = ask(gateway, [user("hi")], prompt_cache_key=session)
    assert first == session
    assert ask(gateway, [user("hi"), assistant("Hello there!"), user("on")], prompt_cache_key=session) == session
    other = ask(gateway, [user("hi")], prompt_cache_key=session)
    assert other != session


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_users_of_one_application_are_kept_apart(gateway: Gateway, session: str, field: str) -> None:
    ada = ask(gateway, [user(session)], **{field: "ada"})
    history = [user(session), assistant("Hello there!"), user("on")]
    assert ask(gateway, history, **{field: "bob"}) != ada
    assert ask(gateway, history, **{field: "ada"}) == ada


def test_two_first_requests_at_once_are_two_conversations(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    both = threading.Barrier(2, timeout=WITHIN)

    def answer(exchange: Exchange) -> None:
        both.wait()
        engine.answer_chat(exchange)

    engine.on_chat = answer
    found: list[str] = []
    work = [threading.Thread(target=lambda: found.append(ask(gateway, [user(session)]))) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(set(found)) == 2


def test_two_clients_with_the_same_reply_continue_in_two_sessions(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    separate = {ask(gateway, [user(session)]) for _ in range(2)}
    both = threading.Barrier(2, timeout=WITHIN)

    def answer(exchange: Exchange) -> None:
        both.wait()
        engine.answer_chat(exchange)

    engine.on_chat = answer
    found: list[str] = []

    def continue_with(text: str) -> None:
        found.append(ask(gateway, [user(session), assistant("Hello there!"), user(text)]))

    work = [threading.Thread(target=continue_with, args=(text,)) for text in ("one", "two")]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert set(found) == separate


def test_a_request_that_failed_and_comes_again_at_once_is_a_retry(engine: FakeEngine, gateway: Gateway) -> None:
    for attempt in range(20):
        engine.on_chat = lambda exchange: exchange.json({"error": {"message": "overloaded"}}, 503)
        question = {"model": MODEL, "messages": [user(f"{attempt} {secrets.token_hex(8)}")]}
        failed = gateway.http.post(CHAT, json=question)
        engine.on_chat = engine.answer_chat
        assert gateway.http.post(CHAT, json=question).headers["x-session-id"] == failed.headers["x-session-id"]


def test_a_conversation_continues_while_one_of_its_requests_hangs(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    first = ask(gateway, [user(session)])
    gone, hangs = threading.Event(), threading.Event()

    def hang(exchange: Exchange) -> None:
        engine.on_chat = engine.answer_chat
        hangs.set()
        gone.wait(5)
        engine.answer_chat(exchange)

    engine.on_chat = hang
    second = [user(session), assistant("Hello there!"), user("two")]
    found: list[str] = []
    hung = threading.Thread(target=lambda: found.append(ask(gateway, second)))
    hung.start()
    assert hangs.wait(5)
    found.append(ask(gateway, second))
    found.append(ask(gateway, [*second, assistant("Hello there!"), user("three")]))
    gone.set()
    hung.join()
    assert found == [first] * 3


def test_a_conversation_whose_system_prompt_tells_the_time_is_one_session(gateway: Gateway, session: str) -> None:
    def at(minute: int, *rest: dict[str, Any]) -> str:
        return ask(gateway, [{"role": "system", "content": f"It is 12:0{minute}."}, user(session), *rest])

    first = at(1)
    assert at(2, assistant("Hello there!"), user("two")) == first
    whole = (assistant("Hello there!"), user("two"), assistant("Hello there!"), user("three"))
    assert at(3, *whole) == first
    gateway.turns(first, 3)
    assert at(4, *whole[:2]) != first  # a fork that shares nothing word for word
    (turn, *_) = gateway.turns(first, 3)
    assert turn["recognised_by"] == "last reply"


def test_a_conversation_whose_questions_come_back_shorter_is_one_session(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    # Only the replies tell it from others, and every other test has the same ones.
    reply = f"Hello, {session}!"
    engine.on_chat = lambda exchange: exchange.json(whole_reply(reply, usage_of(5, 5)))
    messages = [user(session)]
    found = {ask(gateway, messages)}
    for text in ("two", "three", "four"):
        messages += [assistant(reply), user(text)]
        found.add(ask(gateway, [*messages[:-1], user(f"Passages: ... Question: {text}")]))
    assert len(found) == 1


def test_a_last_reply_that_two_sessions_share_names_neither(gateway: Gateway, session: str) -> None:
    two = {ask(gateway, [{"role": "system", "content": who}, user(session)]) for who in ("Be Ada.", "Be Bob.")}
    third = [{"role": "system", "content": "Be Eve."}, user(session), assistant("Hello there!"), user("on")]
    for one in two:
        gateway.turns(one)
    assert len({*two, ask(gateway, third)}) == 3


def test_a_session_known_by_its_beginning_alone_is_deleted_whole(gateway: Gateway, session: str) -> None:
    messages = [SYSTEM, user(session)]
    first = ask(gateway, messages)
    gateway.turns(first)
    eventually(lambda: gateway.http.delete(f"/admin/sessions/{first}").status_code == 200, "the session is deleted")
    assert ask(gateway, [*messages, assistant("Hello there!"), user("two")]) != first


def test_session_headers_do_not_reach_the_engine(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    ask(gateway, [user("hi")], {"x-claude-code-session-id": session, "x-client-request-id": "r1"})
    (request,) = engine.seen(CHAT)
    assert request.header("x-claude-code-session-id") == []
    assert request.header("x-client-request-id") == ["r1"]


def test_where_only_ids_count_nothing_is_recognised_by_what_it_says(engine: FakeEngine, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a question that anybody can guess"}]
    again = [*asked, {"role": "assistant", "content": "Hello there!"}, {"role": "user", "content": "and then?"}]

    def sent(gateway: Gateway, messages: list[dict[str, str]]) -> str:
        answer = gateway.http.post(CHAT, json={"model": MODEL, "messages": messages})
        gateway.turns(answer.headers["x-session-id"])
        return answer.headers["x-session-id"]

    with gateway_in_front_of(engine.url, tmp_path, identify="by_id") as gateway:
        sessions = [sent(gateway, asked), sent(gateway, again), sent(gateway, again)]
        assert len(set(sessions)) == 3
        seen = [gateway.http.get(f"/admin/sessions/{one}").json() for one in sessions]
        assert [one["lineage"] for one in seen] == sessions
        named = [
            gateway.chat("mine", "one").headers["x-session-id"],
            gateway.chat("mine", "two").headers["x-session-id"],
        ]
        assert named == ["mine", "mine"]
    salts = [request.json["cache_salt"] for request in engine.seen(CHAT)]
    assert len(set(salts[:3])) == 3

"""A chat and the titles that are made for it share an id: the session of that id is the chat, whichever came first."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.support.conversations import SYSTEM, assistant, user
from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine
from tests.support.gateway_process import Gateway

pytestmark = pytest.mark.usefixtures("each_store")

CHAT = "/v1/chat/completions"
TITLE = [user("### Task: Generate a title for this chat: plant a tree")]
QUESTION = [user("plant a tree")]
REPLY = assistant("Hello there!")
NEXT = [*QUESTION, REPLY, user("and water it")]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]


def ask(gateway: Gateway, chat: str, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": messages, **more}
    answer = gateway.http.post(CHAT, json=body, headers={"x-openwebui-chat-id": chat})
    assert answer.status_code == 200, answer.text
    return answer


def recorded(gateway: Gateway, session: str) -> list[str]:
    """What a session holds, once nothing of it is in flight; empty if there is none."""
    if gateway.http.get(f"/admin/sessions/{session}").status_code == 404:
        return []
    window = f"{session.replace(':', '.')}-now"
    gateway.freeze(session, window).raise_for_status()
    messages = gateway.http.get(f"/admin/windows/{window}/messages").json()["messages"]
    gateway.http.delete(f"/admin/windows/{window}").raise_for_status()
    return [message["content"] for message in messages]


def beside(gateway: Gateway, chat: str) -> list[str]:
    """The ids of the other sessions of a chat."""
    sessions = gateway.http.get("/admin/sessions?limit=100").json()["sessions"]
    return [one["id"] for one in sessions if one["id"].startswith(f"{chat}:")]


@contextmanager
def title_in_flight(engine: FakeEngine, gateway: Gateway, chat: str) -> Iterator[threading.Event]:
    """The title has been asked for and waits for its reply, until the event is set or the block is over."""
    asked, release = threading.Event(), threading.Event()

    def answer(exchange: Exchange) -> None:
        if exchange.request.json["messages"] == TITLE:
            asked.set()
            assert release.wait(WITHIN)
        engine.answer_chat(exchange)

    engine.on_chat = answer
    thread = threading.Thread(target=ask, args=(gateway, chat, TITLE))
    thread.start()
    assert asked.wait(WITHIN)
    try:
        yield release
    finally:
        release.set()
        thread.join()


def contents(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages]


@pytest.mark.parametrize("title_ends", ["first", "last"])
def test_a_chat_with_tools_takes_its_id_from_a_title_in_flight(
    engine: FakeEngine, gateway: Gateway, session: str, title_ends: str
) -> None:
    with title_in_flight(engine, gateway, session) as release:
        if title_ends == "last":
            assert ask(gateway, session, QUESTION, tools=TOOLS).headers["x-session-id"] == session
            assert gateway.turns(session)[0]["miss"] == "first-turn"
        release.set()
    if title_ends == "first":
        assert ask(gateway, session, QUESTION, tools=TOOLS).headers["x-session-id"] == session
    assert recorded(gateway, session) == contents([*QUESTION, REPLY])
    (title,) = beside(gateway, session)
    assert recorded(gateway, title) == contents([*TITLE, REPLY])
    assert ask(gateway, session, NEXT, tools=TOOLS).headers["x-session-id"] == session
    # More of them, the first title once more among them, leave the chat where it is.
    for side in (TITLE, [user("### Task: Generate tags")], [user("### Task: Suggest questions")]):
        assert ask(gateway, session, side).headers["x-session-id"].startswith(f"{session}:")
    assert recorded(gateway, session) == contents([*NEXT, REPLY])


def test_a_chat_without_tools_takes_its_id_with_its_second_turn(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    with title_in_flight(engine, gateway, session):
        first = ask(gateway, session, [SYSTEM, *QUESTION]).headers["x-session-id"]
        assert first.startswith(f"{session}:")
    gateway.turns(session)
    assert ask(gateway, session, [SYSTEM, *NEXT]).headers["x-session-id"] == session
    assert recorded(gateway, session) == contents([SYSTEM, *NEXT, REPLY])
    assert recorded(gateway, first) == []
    turns = gateway.turns(session, 2)
    assert len(turns) == 2
    assert {turn["recognised_by"] for turn in turns} == {"header x-openwebui-chat-id"}
    (title,) = beside(gateway, session)
    shown = {one: gateway.http.get(f"/admin/sessions/{one}").json() for one in (session, title)}
    assert [shown[one]["lineage"] for one in (session, title)] == [session, session]
    assert [shown[one]["forked_from"] for one in (session, title)] == [None, session]
    assert len({request.json["cache_salt"] for request in engine.seen(CHAT)}) == 1


def test_a_chat_keeps_its_id_whatever_comes_beside_it(gateway: Gateway, session: str) -> None:
    assert ask(gateway, session, QUESTION).headers["x-session-id"] == session
    gateway.turns(session)
    assert ask(gateway, session, TITLE).headers["x-session-id"] != session
    titled = [{"role": "system", "content": "Make a title."}, *TITLE]
    assert ask(gateway, session, titled).headers["x-session-id"] != session
    assert ask(gateway, session, NEXT).headers["x-session-id"] == session
    gateway.turns(session, 2)
    # A conversation beside it that continues, too.
    other = [user("compacted"), REPLY, user("go on")]
    assert ask(gateway, session, other, tools=TOOLS).headers["x-session-id"].startswith(f"{session}:")
    assert ask(gateway, session, NEXT).headers["x-session-id"] == session


def test_an_agent_with_a_system_prompt_keeps_its_id_after_one_turn(gateway: Gateway, session: str) -> None:
    assert ask(gateway, session, [SYSTEM, *QUESTION]).headers["x-session-id"] == session
    gateway.turns(session)
    other = [user("a skill"), REPLY, user("go on")]
    assert ask(gateway, session, other, tools=TOOLS).headers["x-session-id"].startswith(f"{session}:")


def test_what_belongs_to_a_title_goes_with_it(gateway: Gateway, session: str) -> None:
    assert ask(gateway, session, TITLE).headers["x-session-id"] == session
    gateway.freeze(session, f"{session}-w").raise_for_status()
    ask(gateway, session, QUESTION, tools=TOOLS)
    gateway.turns(session)
    (title,) = beside(gateway, session)
    assert gateway.http.get(f"/admin/windows/{session}-w").json()["session_id"] == title
    assert len(gateway.turns(title)) == 1
    gateway.http.delete(f"/admin/sessions/{title}").raise_for_status()
    assert recorded(gateway, session) == contents([*QUESTION, REPLY])

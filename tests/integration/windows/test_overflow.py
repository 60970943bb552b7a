"""When the context is full: what the client and the engine get, and that nothing is lost."""

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.dialects.messages import MessagesDialect
from tests.support.conversations import without_turns
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, render
from tests.support.gateway_process import Gateway, gateway_in_front_of

CHAT = "/v1/chat/completions"
LIMIT = 4096  # tokens of the fake engine, which has one for each byte
SYSTEM = {"role": "system", "content": "be terse"}
REPLY = {"role": "assistant", "content": "Hello there!"}
REFUSAL = {
    "error": {
        "message": f"This model's maximum context length is {LIMIT} tokens. However, your prompt contains more.",
        "type": "BadRequestError",
        "param": "input_tokens",
        "code": 400,
    }
}


def bounded(engine: FakeEngine) -> None:
    """Refuse what does not fit, as vLLM does."""

    def answer(exchange: Exchange) -> None:
        body = exchange.request.json
        if len(render(body["messages"], generation_prompt=True)) + body.get("max_tokens", 0) > LIMIT:
            exchange.json(REFUSAL, 400)
        else:
            engine.answer_chat(exchange)

    engine.on_chat = answer


@pytest.fixture(scope="module")
def going_on(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_in_front_of(shared_engine.url, tmp_path_factory.mktemp("full"), on_full="successor") as gateway:
        yield gateway


@pytest.fixture
def full(engine: FakeEngine, going_on: Gateway) -> Gateway:
    """A gateway whose full sessions continue, in front of an engine with a context limit."""
    bounded(engine)
    return going_on


def u(number: int, size: int = 800, opening: str = "") -> dict[str, Any]:
    return {"role": "user", "content": f"{opening}question {number} ".ljust(size, ".")}


def ask(gateway: Gateway, messages: list[dict[str, Any]], session: str = "", **more: Any) -> httpx.Response:
    headers = {"x-session-id": session} if session else {}
    return gateway.http.post(CHAT, json={"model": MODEL, "messages": messages, **more}, headers=headers)


def until_full(gateway: Gateway, session: str, **more: Any) -> tuple[list[dict[str, Any]], httpx.Response]:
    """Talk until a session continues in another; return the whole history with the last reply, and the answer."""
    said: list[dict[str, Any]] = [SYSTEM]
    opening = f"this is {secrets.token_hex(6)}: "  # without an id, the same words would continue another test's session
    for number in range(20):
        said.append(u(number, opening=opening if number == 0 else ""))
        answer = ask(gateway, said, session, **more)
        assert answer.status_code == 200, answer.headers.get("x-context-hint", answer.text)
        said.append(REPLY)
        if "x-context-ancestor" in answer.headers:
            return said, answer
    raise AssertionError("its context was never full")


def seen(engine: FakeEngine) -> list[dict[str, Any]]:
    """The messages that the engine got last."""
    found: list[dict[str, Any]] = engine.seen(CHAT)[-1].json["messages"]
    return found


def test_full_session_is_frozen_and_gets_a_successor(engine: FakeEngine, full: Gateway, session: str) -> None:
    said, answer = until_full(full, session)
    assert answer.headers["x-session-id"] == f"{session}.2"
    dropped = int(answer.headers["x-context-dropped-messages"])
    assert seen(engine) == [SYSTEM, *said[1 + dropped : -1]]
    assert seen(engine)[1]["role"] == "user"
    assert 0 < dropped < len(said) - 3
    window = full.http.get(f"/admin/windows/{answer.headers['x-context-ancestor']}/messages").json()
    assert without_turns(window["messages"]) == said[:-2]
    shown = full.http.get(f"/admin/windows/{answer.headers['x-context-ancestor']}").json()
    assert sorted(shown["tags"]) == ["auto", "full"]
    assert "full" in shown["description"]
    assert full.http.get(f"/admin/sessions/{session}").json()["successor"] == f"{session}.2"
    successor = full.http.get(f"/admin/sessions/{session}.2").json()
    assert (successor["forked_from"], successor["recognised_by"]) == (session, "successor")
    lineage = full.http.get(f"/admin/sessions/{session}").json()["lineage"]
    assert successor["lineage"] == lineage
    nodes = {node["name"]: node for node in full.http.get("/admin/tree").json()["nodes"]}
    assert (nodes[f"{session}.2"]["relation"], nodes[f"{session}.2"]["parent"]["name"]) == ("went on from", session)


def test_the_current_session_is_the_last_successor_unless_a_history_branches(full: Gateway, session: str) -> None:
    def current() -> tuple[str | None, list[str]]:
        answer = full.http.get("/admin/current-session", headers={"x-session-id": session}).json()
        return answer["session_id"], [one["id"] for one in answer["sessions"]]

    said, _ = until_full(full, session)
    assert current() == (f"{session}.2", [f"{session}.2"])
    while (answer := ask(full, [*said, u(30)], session)).headers["x-session-id"] != f"{session}.3":
        said += [u(30), REPLY]
        assert answer.status_code == 200
    assert current() == (f"{session}.3", [f"{session}.3"])
    ask(full, [SYSTEM, u(0, opening="edited: ")], session)
    assert current() == (None, [session, f"{session}.3"])


@pytest.mark.parametrize("named", ["old id", "new id", "no id"])
def test_later_turns_drop_the_same_messages(engine: FakeEngine, full: Gateway, session: str, named: str) -> None:
    said, answer = until_full(full, session if named != "no id" else "")
    successor, first = answer.headers["x-session-id"], seen(engine)
    sent = {"old id": session, "new id": successor, "no id": ""}[named]
    following = ask(full, [*said, u(98)], sent)
    assert following.headers["x-session-id"] == successor
    assert following.headers["x-context-dropped-messages"] == answer.headers["x-context-dropped-messages"]
    assert seen(engine) == [*first, REPLY, u(98)]
    assert (
        following.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        >= len(render(first, generation_prompt=False)) // 16 * 16
    )
    assert full.turns(successor, 2)[0]["miss"] == "none"


def test_full_successor_gets_a_successor(engine: FakeEngine, full: Gateway, session: str) -> None:
    said, answer = until_full(full, session)
    while answer.headers["x-session-id"] == f"{session}.2":
        said.append(u(len(said)))
        answer = ask(full, said, session)
        assert answer.status_code == 200, answer.headers.get("x-context-hint", answer.text)
        said.append(REPLY)
    assert answer.headers["x-session-id"] == f"{session}.3"
    assert seen(engine) == [SYSTEM, *said[1 + int(answer.headers["x-context-dropped-messages"]) : -1]]
    # The window has what its session had: the first one, what it had left out.
    second = full.http.get(f"/admin/windows/{answer.headers['x-context-ancestor']}").json()
    assert second["session_id"] == f"{session}.2"
    assert ask(full, [*said, u(99, 20)], session).headers["x-session-id"] == f"{session}.3"


def test_streams_continue_without_the_refusal(full: Gateway, session: str) -> None:
    _, answer = until_full(full, session, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "maximum context length" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_tool_call_stays_with_its_result(engine: FakeEngine, full: Gateway, session: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    loop = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "x" * 700},
    ]
    said = [SYSTEM, u(0, 100), *loop * 2, REPLY, u(1, 100), *loop, REPLY, u(2, 100), *loop, REPLY]
    assert ask(full, [*said[:-1]], session).status_code == 200
    answer = ask(full, [*said, u(3, 900)], session)
    assert answer.status_code == 200
    assert seen(engine)[1] in (u(1, 100), u(2, 100))


def test_reply_limit_is_left_free(engine: FakeEngine, full: Gateway, session: str) -> None:
    _, answer = until_full(full, session, max_tokens=2500)
    assert len(render(seen(engine), generation_prompt=True)) + 2500 <= LIMIT
    assert answer.status_code == 200


def test_uncuttable_request_gets_the_engines_answer(full: Gateway, session: str) -> None:
    first = ask(full, [SYSTEM, u(0, 5000)], session)
    assert (first.status_code, first.json()) == (400, REFUSAL)
    assert "first turn" in first.headers["x-context-hint"]
    assert ask(full, [SYSTEM, u(0)], session).status_code == 200
    second = ask(full, [SYSTEM, u(0), REPLY, u(1, 5000)], session)
    assert (second.status_code, second.json()) == (400, REFUSAL)
    assert "last turn alone does not fit" in second.headers["x-context-hint"]
    assert full.http.get("/admin/windows", params={"session_id": session}).json()["total"] == 0
    assert full.http.get(f"/admin/sessions/{session}").json()["successor"] is None


def test_hint_gives_a_reason_where_the_engine_refuses_to_render(
    engine: FakeEngine, full: Gateway, session: str
) -> None:
    """vLLM renders no prompt that is too long: it refuses with the same words."""
    tokenize = engine.on_tokenize

    def refuse(exchange: Exchange) -> None:
        if len(render(exchange.request.json["messages"], generation_prompt=True)) > LIMIT:
            exchange.json(REFUSAL, 400)
        else:
            tokenize(exchange)

    engine.on_tokenize = refuse
    assert ask(full, [SYSTEM, u(0)], session).status_code == 200
    answer = ask(full, [SYSTEM, u(0), REPLY, u(1, 5000)], session)
    assert (answer.status_code, answer.json()) == (400, REFUSAL)
    assert "last turn alone does not fit" in answer.headers["x-context-hint"]


def test_unfreezable_session_gets_no_successor(engine: FakeEngine, full: Gateway, session: str) -> None:
    said = [SYSTEM]
    for number in range(4):
        said += [u(number), REPLY]
        assert ask(full, said[:-1], session).status_code == 200
    engine.on_completion = lambda exchange: exchange.json({"error": {"message": "broken", "code": 500}}, 500)
    engine.on_tokenize = lambda exchange: exchange.json({"error": {"message": "broken", "code": 500}}, 500)
    refused = ask(full, [*said, u(9)], session)
    assert (refused.status_code, refused.json()) == (400, REFUSAL)
    assert refused.headers["x-context-hint"]
    assert full.http.get(f"/admin/sessions/{session}").json()["successor"] is None
    engine.reset()
    bounded(engine)
    assert ask(full, [*said, u(9)], session).headers["x-session-id"] == f"{session}.2"


def test_edited_history_stays_in_its_session(engine: FakeEngine, full: Gateway, session: str) -> None:
    said, _ = until_full(full, session)
    compacted = [SYSTEM, {"role": "user", "content": "what happened so far: nothing"}, REPLY, u(1)]
    answer = ask(full, compacted, session)
    assert answer.headers["x-session-id"] == session
    assert seen(engine) == compacted
    assert ask(full, [*said, u(98)], session).headers["x-session-id"] == f"{session}.2"


@pytest.mark.parametrize("edited", [1, 3])
def test_unrecorded_messages_are_never_dropped(full: Gateway, session: str, edited: int) -> None:
    said: list[dict[str, Any]] = [SYSTEM]
    for number in range(3):
        said.append(u(number))
        assert ask(full, said, session).status_code == 200
        said.append(REPLY)
    said[edited] = u(99, 801)  # the client has changed what it said, and no turn has seen that
    answer = ask(full, [*said, u(3, 1700)], session)
    found = full.http.get("/admin/windows", params={"session_id": session}).json()["windows"]
    if edited == 1:
        assert (answer.status_code, answer.json(), found) == (400, REFUSAL, [])
        assert "recorded turn" in answer.headers["x-context-hint"]
        return
    assert answer.headers["x-context-dropped-messages"] == "2"  # of three turns that would have gone, the unchanged one
    window = full.http.get(f"/admin/windows/{answer.headers['x-context-ancestor']}/messages").json()
    assert without_turns(window["messages"])[:3] == said[:3]


def test_windows_of_a_conversation_are_ancestors(full: Gateway, session: str) -> None:
    said, answer = until_full(full, session)
    first = second = answer.headers["x-context-ancestor"]
    while second == first:
        said.append(u(len(said)))
        answer = ask(full, said, session)
        assert answer.status_code == 200, answer.headers
        said.append(REPLY)
        second = answer.headers["x-context-ancestor"]
    shown = full.http.get(f"/admin/windows/{second}", params={"include_lineage": "true"}).json()
    assert shown["lineage"]["ancestors"] == [first]
    assert shown["parent_window"] == first


@pytest.mark.parametrize("named", ["old id", "new id"])
def test_thawed_session_continues_with_new_messages(
    engine: FakeEngine, full: Gateway, session: str, named: str
) -> None:
    said: list[dict[str, Any]] = [SYSTEM]
    for number in range(3):
        assert ask(full, [*said, u(number)], session).status_code == 200
        said += [u(number), REPLY]
    assert full.freeze(session, f"w-{session}").status_code == 201
    thawed = full.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    new: list[dict[str, Any]] = []
    answer = ask(full, [u(3, 300)], thawed)
    while "x-context-ancestor" not in answer.headers:
        new += [u(3 + len(new), 300), REPLY]
        answer = ask(full, [*new, u(3 + len(new), 300)], thawed)
        assert answer.status_code == 200, answer.headers
    new += [u(3 + len(new), 300), REPLY]
    following = ask(full, [*new, u(99, 300)], thawed if named == "old id" else answer.headers["x-session-id"])
    dropped = int(answer.headers["x-context-dropped-messages"])
    assert following.headers["x-context-dropped-messages"] == str(dropped)
    assert following.headers["x-session-id"] == answer.headers["x-session-id"]
    assert seen(engine) == [SYSTEM, *[*said[1:], *new][dropped:], u(99, 300)]


def test_token_count_equals_the_engines_prompt(engine: FakeEngine, full: Gateway, session: str) -> None:
    said, answer = until_full(full, session)
    body = {"model": MODEL, "system": "be terse", "messages": [*said[1:], u(97)]}
    full.http.post(f"/s/{session}/v1/messages/count_tokens", json=body)
    (asked,) = engine.seen("/v1/messages/count_tokens")
    left = said[1 + int(answer.headers["x-context-dropped-messages"]) :]
    assert MessagesDialect().read(asked.json, b"").messages == [SYSTEM, *left, u(97)]


def test_concurrent_turns_find_one_successor(full: Gateway, session: str) -> None:
    said = [SYSTEM]
    for number in range(4):
        said += [u(number), REPLY]
        assert ask(full, said[:-1], session).status_code == 200
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda number: ask(full, [*said, u(number)], session), (8, 9)))
    assert {answer.headers["x-session-id"] for answer in answers if answer.status_code == 200} == {f"{session}.2"}
    assert any(answer.status_code == 200 for answer in answers)


def test_deleted_successor_is_replaced(full: Gateway, session: str) -> None:
    said, _ = until_full(full, session)
    assert full.http.delete(f"/admin/sessions/{session}.2").status_code == 200
    assert full.http.get(f"/admin/sessions/{session}").json()["successor"] is None
    again = ask(full, [*said, u(98)], session)
    assert again.headers["x-session-id"] == f"{session}.2"


def test_overflow_error_passes_with_a_hint_by_default(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    bounded(engine)
    answer = ask(gateway, [SYSTEM, u(0, 5000)], session)
    assert (answer.status_code, answer.json()) == (400, REFUSAL)
    assert "on_full=successor" in answer.headers["x-context-hint"]
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "another", "code": 400}}, 400)
    other = ask(gateway, [SYSTEM], session)
    assert other.json() == {"error": {"message": "another", "code": 400}}
    assert "x-context-hint" not in other.headers


def test_other_engine_errors_pass_unchanged(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    long = {"error": {"message": "x" * 1_000_000, "code": 400}}
    engine.on_chat = lambda exchange: exchange.json(long, 400)
    assert ask(gateway, [SYSTEM], session).json() == long


def test_successor_is_kept_over_a_restart(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    bounded(engine)
    with gateway_in_front_of(engine.url, tmp_path, on_full="successor") as gateway:
        said, answer = until_full(gateway, session)
        gateway.stop()
        gateway.start().wait()
        following = ask(gateway, [*said, u(98)], session)
        assert following.headers["x-session-id"] == f"{session}.2"
        assert following.headers["x-context-ancestor"] == answer.headers["x-context-ancestor"]


def test_new_messages_only_continue_in_the_successor(engine: FakeEngine, full: Gateway, session: str) -> None:
    assert ask(full, [SYSTEM, u(0)], session).status_code == 200
    assert full.freeze(session, f"w-{session}").status_code == 201
    thawed = full.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    number, answer = 1, ask(full, [u(1, 300)], thawed)
    while "x-context-ancestor" not in answer.headers:
        number += 1
        answer = ask(full, [u(number, 300)], thawed)
        assert answer.status_code == 200, answer.headers
    had = seen(engine)
    following = ask(full, [u(99)], thawed)
    assert following.headers["x-session-id"] == answer.headers["x-session-id"]
    assert seen(engine) == [*had, REPLY, u(99)]

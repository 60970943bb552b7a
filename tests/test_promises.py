"""Promises that several parts keep together, each where breaking it would cost a user something."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.engine import DONE, WITHIN, Exchange, FakeEngine, delta, usage_of, whole_reply
from tests.running import Gateway
from tests.test_admin import error_of
from tests.wire import Wire

CHAT = "/v1/chat/completions"


def test_a_session_whose_client_sends_a_salt_is_frozen_and_thawed_under_the_salt_of_its_turns(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    for own in ("alice", "bob"):
        gateway.chat(session, cache_salt=own)
    alice, bob = (request.json["cache_salt"] for request in engine.seen(CHAT))
    assert alice != bob
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"warm": "gpu"}).json()
    assert thawed["cache_salt"] == bob
    (warmed,) = engine.seen("/v1/completions")
    assert warmed.json["cache_salt"] == bob
    assert thawed["receipt"]["cached_tokens"] >= 16


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "", "http://127.0.0.1"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/admin/windows/{w}"),
        ("POST", "/admin/windows"),
        ("GET", "/admin/sessions"),
        ("POST", "/admin/doctor"),
    ],
)
def test_a_page_of_another_site_does_nothing_at_the_admin_door(
    gateway: Gateway, session: str, origin: str, method: str, path: str
) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    body = json.dumps({"session_id": session, "window_name": f"x-{session}"})
    response = gateway.http.request(
        method, path.format(w=f"w-{session}"), content=body if method == "POST" else None, headers={"origin": origin}
    )
    assert error_of(response) == (403, "forbidden")
    assert gateway.http.get(f"/admin/windows?session_id={session}").json()["total"] == 1


def test_a_page_of_the_gateways_own_site_is_served(gateway: Gateway) -> None:
    assert gateway.http.get("/admin/sessions", headers={"origin": gateway.url}).status_code == 200


@pytest.mark.parametrize(("name", "status"), [("w-nobody-made", 404), ("no such name", 400)])
def test_a_window_asked_for_by_header_that_cannot_be_had_is_an_error(
    engine: FakeEngine, gateway: Gateway, session: str, name: str, status: int
) -> None:
    response = gateway.chat(session, headers={"x-window": name})
    assert response.status_code == status
    assert engine.seen(CHAT) == []


def test_a_session_in_mid_stream_is_not_deleted_and_can_be_when_its_reply_is_whole(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    go_on = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="x"))
        go_on.wait(WITHIN)
        exchange.chunk(DONE)
        exchange.end()

    engine.on_chat = answer
    with Wire(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert error_of(gateway.http.delete(f"/admin/sessions/{session}")) == (409, "session_busy")
        go_on.set()
        assert wire.chunks()[-1] == DONE
    assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200
    assert error_of(gateway.http.get(f"/admin/sessions/{session}")) == (404, "session_not_found")


def test_tool_arguments_written_down_again_with_other_spaces_are_the_same_message(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def call(arguments: str) -> dict[str, Any]:
        return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    def answer(exchange: Exchange) -> None:
        reply = whole_reply("", usage_of(5, 5))
        reply["choices"][0]["message"]["tool_calls"] = [call('{"city":"Zürich","n":[1,2]}')]
        exchange.json(reply)

    engine.on_chat = answer
    gateway.chat(session, "weather?")
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]
    full = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call('{ "city": "Z\\u00fcrich",\n  "n": [1, 2] }')]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    gateway.chat(thawed, messages=full)
    assert engine.seen(CHAT)[-1].json["messages"] == full  # as the client has it, and not behind the window once more


def test_a_window_that_is_deleted_while_it_thaws_is_thawed_whole_or_not_at_all(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session, "remember me")
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200
    warming, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        warming.set()
        go_on.wait(WITHIN)

    engine.before_completion = wait
    with ThreadPoolExecutor(1) as pool:
        body = {"warm": "gpu", "new_session_id": f"t-{session}"}
        thawing = pool.submit(gateway.http.post, f"/admin/windows/w-{session}/thaw", json=body)
        assert warming.wait(WITHIN)
        deleting = threading.Thread(target=gateway.http.delete, args=[f"/admin/windows/w-{session}"])
        deleting.start()
        deleting.join(1)  # it may as well wait for the thaw
        go_on.set()
        answer = thawing.result(WITHIN)
        deleting.join(WITHIN)
    if answer.status_code != 200:
        assert error_of(answer) == (404, "window_not_found")
        assert gateway.http.get(f"/admin/sessions/t-{session}").status_code == 404
        return
    gateway.chat(f"t-{session}", "and now?")
    sent = engine.seen(CHAT)[-1].json["messages"]
    assert [m["content"] for m in sent] == ["remember me", "Hello there!", "and now?"]

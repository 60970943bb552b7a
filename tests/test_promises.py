"""Promises that several parts keep together, each where breaking it would cost a user something."""

import ast
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import load
from tests.fakes.engine import DONE, WITHIN, Exchange, FakeEngine, delta, usage_of, whole_reply
from tests.running import ROOT, Gateway, gateway_before
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


def test_ec001_two_freezes_of_one_session_at_once_are_two_whole_windows(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session, "freeze me twice")
    names = [f"{side}-{session}" for side in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: gateway.freeze(session, name), names))
    assert [answer.status_code for answer in answers] == [201, 201]
    said = [gateway.http.get(f"/admin/windows/{name}/messages").json()["messages"] for name in names]
    assert said[0] == said[1] != []
    assert gateway.http.get(f"/admin/sessions/{session}").json()["state"] == "frozen"


@pytest.mark.parametrize(
    ("tokens", "says"), [(3891, ""), (3892, "nearly full"), (4095, "nearly full"), (4096, "is full"), (5000, "is full")]
)
def test_w17_ec011_a_context_of_95_percent_warns_and_one_of_100_says_so(
    engine: FakeEngine, gateway: Gateway, session: str, tokens: int, says: str
) -> None:
    engine.on_chat = lambda exchange: exchange.json(whole_reply("ok", usage_of(tokens - 10, 10)))
    gateway.chat(session)
    status = gateway.http.get(f"/admin/sessions/{session}").json()
    assert (status["token_count"], status["context_limit"]) == (tokens, 4096)
    assert [says in warning for warning in status["warnings"]] == [True] * bool(says)


@pytest.mark.parametrize("tag", ["größe", "日本", "Größe"])
def test_x10_a_tag_of_any_script_is_found_by_itself_alone(gateway: Gateway, session: str, tag: str) -> None:
    gateway.chat(session)
    assert gateway.freeze(session, f"w-{session}", tags=[tag]).status_code == 201

    def found(asked: str) -> int:
        query = {"tags": asked, "session_id": session}
        return int(gateway.http.get("/admin/windows", params=query).json()["total"])

    assert (found(tag), found(tag.swapcase()), found("gr_sse")) == (1, int(tag == tag.swapcase()), 0)


@pytest.mark.parametrize("name", ["update-auth", "drop-table", "select", "script-work", "null", "index", "metadata"])
def test_s12_a_word_of_sql_or_of_storage_is_a_name_like_any_other(gateway: Gateway, session: str, name: str) -> None:
    gateway.chat(session)
    assert gateway.freeze(session, name).status_code == 201
    assert gateway.http.get(f"/admin/windows/{name}").json()["name"] == name
    assert gateway.http.delete(f"/admin/windows/{name}").status_code == 200


@pytest.mark.parametrize("name", ["a;b", "a|b", "a`b`", "$(a)", "../a", "a/../b", "\uff41", "a\u0430", "a'--"])
def test_s14_ec013_what_a_shell_a_path_or_an_eye_could_misread_is_no_name(
    gateway: Gateway, session: str, name: str
) -> None:
    gateway.chat(session)
    assert error_of(gateway.freeze(session, name)) == (400, "invalid_window_name")
    assert error_of(gateway.freeze(name, "w")) == (400, "invalid_session_id")


def test_s03_nothing_in_the_gateway_evaluates_or_unpickles() -> None:
    forbidden = {"eval", "exec", "pickle", "marshal", "shelve", "dill"}
    for file in (file for folder in ("gateway", "policies") for file in (ROOT / folder).rglob("*.py")):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        imports = {
            alias.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import)
            for alias in node.names
        }  # fmt: skip
        assert not (names | imports) & forbidden, file


def test_s07_what_the_gateway_writes_can_be_read_by_its_owner_alone(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_before(engine.url, tmp_path) as gateway:
        gateway.chat("private")
        assert gateway.freeze("private", "private").status_code == 201
        modes = {path: path.stat().st_mode for path in (gateway.data_dir, *gateway.data_dir.rglob("*"))}
    assert len(modes) > 3
    assert {path: oct(mode) for path, mode in modes.items() if path.is_dir() and mode & 0o077} == {}


def test_x24_no_file_beside_the_gateway_stops_its_start(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("OPENAI_API_KEY=k\nCWG_PORT=nonsense\n")
    monkeypatch.chdir(tmp_path)
    assert load(environment={}, overrides={}).port == 8700

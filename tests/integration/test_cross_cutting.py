"""Promises that several parts keep together, each where breaking it would cost a user something."""

import ast
import json
import os
import re
import sqlite3
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.settings import load
from gateway.stack import commands, local, smollm2
from gateway.windows.freeze import check_budget
from tests.support.admin_requests import error_of
from tests.support.fakes.engine import DONE, MODEL, WITHIN, Exchange, FakeEngine, delta, usage_of, whole_reply
from tests.support.gateway_process import ROOT, Gateway, gateway_in_front_of
from tests.support.harness import GatewayHarness, window
from tests.support.local_stack import plan_for
from tests.support.raw_http import RawHttpClient

CHAT = "/v1/chat/completions"
PROGRESS = {"accept": "application/x-ndjson"}


def test_a_session_with_a_client_salt_is_frozen_and_thawed_under_it(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    for own in ("alice", "bob"):
        gateway.chat(session, cache_salt=own)
    alice, bob = (request.json["cache_salt"] for request in engine.seen(CHAT))
    assert alice != bob
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"warm": "gpu"}).json()
    assert thawed["cache_salt"] == bob
    # Others are of the self-test.
    salts = [request.json.get("cache_salt") for request in engine.seen("/v1/completions")]
    assert (salts.count(bob), salts.count(alice)) == (1, 0)
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
def test_a_page_of_another_site_cannot_use_the_admin_api(
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


def test_a_session_is_not_deleted_until_its_reply_is_complete(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    release = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="x"))
        release.wait(WITHIN)
        exchange.chunk(DONE)
        exchange.end()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert error_of(gateway.http.delete(f"/admin/sessions/{session}")) == (409, "session_busy")
        release.set()
        assert wire.chunks()[-1] == DONE
    assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200
    assert error_of(gateway.http.get(f"/admin/sessions/{session}")) == (404, "session_not_found")


def test_tool_arguments_with_other_spacing_are_the_same_message(
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


def test_a_window_deleted_while_it_thaws_is_thawed_whole_or_not_at_all(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session, "remember me")
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    assert gateway.http.delete(f"/admin/sessions/{session}").status_code == 200
    warming, release = threading.Event(), threading.Event()

    def wait() -> None:
        warming.set()
        release.wait(WITHIN)

    engine.before_completion = wait
    with ThreadPoolExecutor(1) as pool:
        body = {"warm": "gpu", "new_session_id": f"t-{session}"}
        thawing = pool.submit(gateway.http.post, f"/admin/windows/w-{session}/thaw", json=body)
        assert warming.wait(WITHIN)
        deleting = threading.Thread(target=gateway.http.delete, args=[f"/admin/windows/w-{session}"])
        deleting.start()
        deleting.join(1)  # it may as well wait for the thaw
        release.set()
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
    (turn,) = gateway.turns(session)
    both = threading.Barrier(2)
    tokenize = engine.on_tokenize

    def together(exchange: Exchange) -> None:
        both.wait(WITHIN)  # each waits until the other has begun as well
        tokenize(exchange)

    engine.on_tokenize = together
    names = [f"{side}-{session}" for side in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: gateway.freeze(session, name), names))
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json()["token_count"] == answers[1].json()["token_count"] > turn["prompt_tokens"]
    said = [gateway.http.get(f"/admin/windows/{name}/messages").json()["messages"] for name in names]
    assert said[0] == said[1] != []
    assert gateway.turns(session) == [turn]
    assert gateway.chat(session, "and on it goes").status_code == 200


@pytest.mark.anyio
async def test_ec020b_objects_are_kept_up_to_the_last_byte_of_the_budget(harness: GatewayHarness) -> None:
    kept = await window(harness.services)
    objects = (await harness.services.store.manifest(kept)).objects
    held = await harness.services.store.held_bytes("default", objects)
    assert held > 0
    for budget, fits in ((held, True), (held - 1, False)):
        parts = replace(harness.services, settings=harness.settings.model_copy(update={"tenant_budget_bytes": budget}))
        if fits:
            await check_budget(parts, "default", objects)
        else:
            with pytest.raises(GatewayError, match="1 more than they may"):
                await check_budget(parts, "default", objects)


def test_ec040a_an_engine_that_dies_during_a_freeze_leaves_the_session_usable(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session, "remember me")
    engine.on_tokenize = Exchange.cut
    refused = gateway.freeze(session, f"w-{session}")
    assert error_of(refused) == (502, "engine_unreachable")
    assert refused.json()["error"]["retryable"] is True
    assert engine.seen("/tokenize")
    assert error_of(gateway.http.get(f"/admin/windows/w-{session}")) == (404, "window_not_found")
    engine.reset()
    assert gateway.chat(session, "go on").status_code == 200
    assert gateway.freeze(session, f"w-{session}").status_code == 201


def test_ec041_a_thaw_that_times_out_is_a_clean_error_and_is_not_retried(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, engine_timeout_s=1.0) as gateway:
        gateway.chat("kept", "remember me")
        assert gateway.freeze("kept", "kept").status_code == 201
        asked = len(engine.seen("/v1/completions"))  # by the self-test
        release = threading.Event()
        engine.before_completion = lambda: release.wait(WITHIN)
        body = {"warm": "gpu", "new_session_id": "late"}
        late = gateway.http.post("/admin/windows/kept/thaw", json=body)
        assert error_of(late) == (504, "engine_timeout")
        assert len(engine.seen("/v1/completions")) == asked + 1
        assert error_of(gateway.http.get("/admin/sessions/late")) == (404, "session_not_found")
        release.set()
        assert gateway.http.post("/admin/windows/kept/thaw", json=body).status_code == 200


@pytest.mark.sqlite
def test_ec042_a_clock_set_back_never_makes_an_idle_time_negative(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.turns(session)
    with closing(sqlite3.connect(gateway.data_dir / "gateway.db")) as db, db:
        later = (
            "UPDATE sessions SET created_at = created_at + 3600, last_active_at = last_active_at + 3600 WHERE id = ?"
        )
        db.execute(later, (session,))
    assert gateway.http.post("/admin/policies/check", json={"session_id": session}).json()["idle_seconds"] >= 0
    assert gateway.chat(session, "and again").status_code == 200
    assert gateway.freeze(session, f"w-{session}").status_code == 201


@pytest.mark.parametrize(
    ("tokens", "says"), [(3891, ""), (3892, "nearly full"), (4095, "nearly full"), (4096, "is full"), (5000, "is full")]
)
def test_w17_ec011_a_context_warns_at_95_percent_and_at_100(
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
def test_s14_ec013_names_a_shell_or_a_path_could_misread_are_refused(gateway: Gateway, session: str, name: str) -> None:
    gateway.chat(session)
    assert error_of(gateway.freeze(session, name)) == (400, "invalid_window_name")
    assert error_of(gateway.freeze(name, "w")) == (400, "invalid_session_id")


_UNSAFE_MODULES = {"builtins", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
_UNSAFE_CALLS = {"__builtins__", "__import__", "compile", "eval", "exec"}


def unsafe(source: str) -> set[str]:
    """What in a module could run or unpickle data: names of builtins, however used, and imports, however spelt."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name):
                found |= {name} & _UNSAFE_CALLS
            case ast.Import(names=names):
                found |= {alias.name.partition(".")[0] for alias in names} & _UNSAFE_MODULES
            case ast.ImportFrom(module=str(module)):
                found |= {module.partition(".")[0]} & _UNSAFE_MODULES
            case ast.Call(args=[ast.Constant(value=str(text)), *_]):
                found |= {text.partition(".")[0]} & _UNSAFE_MODULES
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "run = exec", "compile('1', '', 'eval')", "import pickle", "import pickle as p", "import pickle.x",
        "from pickle import loads", "def f():\n from marshal import loads", "import builtins; builtins.eval('1')",
        "from builtins import eval as e", "__import__('os')", "importlib.import_module('pickle')",
        "__builtins__['eval']('1')",
    ],
)  # fmt: skip
def test_what_evaluates_or_unpickles_is_found_however_it_is_spelt(source: str) -> None:
    assert unsafe(source)


def test_s03_nothing_in_the_gateway_evaluates_or_unpickles() -> None:
    assert {str(file): found for file in source_files() if (found := unsafe(file.read_text()))} == {}


def test_s05_the_linter_has_the_security_rules_on_for_the_whole_gateway() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"S", "BLE"} <= set(lint["select"])
    assert [rule for rule in lint["ignore"] if re.match("S[0-9]|BLE", rule)] == ["S603"]
    ignored = {path: rules for path, rules in lint["per-file-ignores"].items() if path.startswith("gateway")}
    assert ignored == {"gateway/store/{*rows,postgres/*}.py": ["S608"]}


def test_s06_no_secret_is_in_the_code() -> None:
    looks = re.compile(r"(sk-|ghp_|AKIA|xox[bp]-|-----BEGIN)\w*|(?=(\D*\d){4})(?=\d*[A-Za-z])[A-Za-z0-9+/=_-]{20,}")
    assert looks.fullmatch("9f86d081884c7d659a2feaa0") and looks.fullmatch("sk-live1")  # noqa: PT018 - it can find
    public = {smollm2.NAME, smollm2.SHA256}
    assert [text for text in literals() if looks.fullmatch(text) and text not in public] == []


def test_s43_the_code_holds_no_foreign_address_and_reports_no_usage() -> None:
    hosts = {host for text in literals() for host in re.findall(r"https?://([\w.-]+)", text)}
    # RFC 2606: names under .example are reserved. What begins with "s3." is where the user's own bucket is.
    assert {host for host in hosts if not host.endswith(".example")} <= {"127.0.0.1", "localhost", "s3."}
    assert "127.0.0.1" in hosts
    plan = plan_for(local.LocalStack(data_dir=Path("data")))
    for command in (commands.cache_launch(plan), commands.engine_launch(plan)):
        assert command.env["VLLM_NO_USAGE_STATS"] == command.env["DO_NOT_TRACK"] == "1"
        assert command.env["LMCACHE_TRACK_USAGE"] == "false"


@pytest.mark.sqlite
def test_s71_a_failure_of_the_gateway_shows_a_client_nothing_of_itself(engine: FakeEngine, tmp_path: Path) -> None:
    rpc = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "window_list", "arguments": {}}}
    accept = {"accept": "application/json, text/event-stream"}
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        with closing(sqlite3.connect(gateway.data_dir / "gateway.db")) as db, db:
            db.execute("ALTER TABLE windows RENAME TO gone")  # behind its back, as no client could
            db.execute("ALTER TABLE sessions RENAME TO gone_too")
        answers = [
            gateway.http.get("/admin/windows"),
            gateway.http.post("/admin/windows", json={"session_id": "s", "window_name": "w"}, headers=PROGRESS),
            gateway.chat("s"),
            gateway.http.post("/mcp", json=rpc, headers=accept),
        ]
        log = gateway.log
    for answer in answers:
        assert "internal error; see the gateway's log" in answer.text, answer.text
        assert not re.search(r"Traceback|sqlite|no such table|\.py\b", answer.text), answer.text
    assert [answer.status_code for answer in answers] == [500, 200, 500, 200]
    assert log.count("no such table") >= len(answers)


def source_files() -> list[Path]:
    """Every module of ours."""
    return [file for folder in ("gateway", "policies") for file in (ROOT / folder).rglob("*.py")]


def literals() -> list[str]:
    """Every string in our code, comments and docstrings left out."""
    nodes = [node for file in source_files() for node in ast.walk(ast.parse(file.read_text()))]
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    strings = (node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docs)
    return [node.value for node in strings if isinstance(node.value, str)]


def test_s27_generated_ids_cannot_be_guessed(gateway: Gateway) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    ids = [gateway.http.post(CHAT, json=body).headers["x-session-id"] for _ in range(20)]
    assert all(re.fullmatch(r"s-[0-9a-f]{24}", one) for one in ids)
    # Of 20 draws of 16 bits, 17 differ but once in more runs than there will ever be; counting would share them all.
    assert len({one[2:6] for one in ids}) >= 17
    assert len({one[-4:] for one in ids}) >= 17


@pytest.mark.sqlite
def test_s07_what_the_gateway_writes_can_be_read_by_its_owner_alone(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    before = os.umask(0)  # a shell in which every file is open to everybody unless its maker says otherwise
    try:
        with gateway_in_front_of(engine.url, tmp_path, workers=2, kv_dir=tmp_path / "kv") as gateway:
            os.umask(before)
            gateway.chat("private")
            assert gateway.freeze("private", "private").status_code == 201
            modes = {path: path.stat().st_mode for path in (gateway.data_dir, *gateway.data_dir.rglob("*"))}
    finally:
        os.umask(before)
    assert {path.name for path in modes} >= {"gateway.db", "gateway.db-wal"}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_x24_a_file_in_the_working_directory_does_not_stop_the_start(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("OPENAI_API_KEY=k\nCWG_PORT=nonsense\n")
    monkeypatch.chdir(tmp_path)
    assert load(environment={}, overrides={}).port == 8700

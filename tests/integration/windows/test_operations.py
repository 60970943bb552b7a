"""What one does with a window that is there: each parameter checked, each error named, at the admin API and the CLI."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api.admin.test_admin import error_of, freeze
from tests.integration.cli.test_cli import assert_failed, cwg
from tests.support.fakes.engine import FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway, gateway_in_front_of


@pytest.fixture
def window(gateway: Gateway, session: str) -> str:
    """A window of two messages, without KV."""
    freeze(gateway, session, f"w-{session}", description="first", tags=["a", "b"], ttl_seconds=60)
    return f"w-{session}"


def assert_refused(response: Any, code: str, *says: str) -> None:
    """It was refused in the admin API's shape, and the words are there."""
    status, got = error_of(response)
    assert (status, got) == (400, code), response.text
    for words in says:
        assert words in response.text


# --- PATCH


def test_a_patch_changes_what_it_names_and_nothing_else(gateway: Gateway, window: str) -> None:
    before = gateway.http.get(f"/admin/windows/{window}").json()
    answer = gateway.http.patch(f"/admin/windows/{window}", json={"tags": ["c"]})
    assert answer.status_code == 200
    changed = gateway.http.get(f"/admin/windows/{window}").json()
    assert changed == {**before, "tags": ["c"]}
    assert [w["name"] for w in gateway.http.get(f"/admin/windows?tags=c&search={window}").json()["windows"]] == [window]
    assert gateway.http.get(f"/admin/windows?tags=a&search={window}").json()["total"] == 0


def test_null_clears_and_a_new_ttl_counts_from_now(gateway: Gateway, window: str) -> None:
    cleared = gateway.http.patch(
        f"/admin/windows/{window}", json={"description": None, "tags": None, "ttl_seconds": None}
    ).json()
    assert (cleared["description"], cleared["tags"], cleared["expires_at"]) == ("", [], None)
    again = gateway.http.patch(f"/admin/windows/{window}", json={"ttl_seconds": 3600}).json()
    assert again["expires_at"] > again["created_at"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "nothing to change"),
        ({"description": "x" * 2001}, "description"),
        ({"tags": "a"}, "tags"),
        ({"tags": ["bad tag!"]}, "tags"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
    ],
)
def test_a_patch_that_is_wrong_names_the_field(gateway: Gateway, window: str, body: dict[str, Any], says: str) -> None:
    assert_refused(gateway.http.patch(f"/admin/windows/{window}", json=body), "invalid_request", says)


def test_a_patch_cannot_change_what_a_window_holds(gateway: Gateway, window: str) -> None:
    for field in ("token_count", "name", "desription"):
        assert_refused(gateway.http.patch(f"/admin/windows/{window}", json={field: "x"}), "unknown_parameter", field)
    missing = gateway.http.patch("/admin/windows/nobody", json={"description": "d"})
    assert error_of(missing) == (404, "window_not_found")


def test_the_cli_describes(gateway: Gateway, window: str) -> None:
    done = cwg("describe", window, "--description", "new", "--tag", "x", "--no-ttl", "--json", url=gateway.url)
    answer = json.loads(done.stdout)
    assert (answer["description"], answer["tags"], answer["expires_at"]) == ("new", ["x"], None)
    assert cwg("describe", window, "--tag", "x", "--no-tags", url=gateway.url).returncode == 2
    assert_failed(cwg("describe", window, url=gateway.url), "nothing to change")


# --- verify


def test_a_window_without_kv_has_nothing_that_could_be_damaged(gateway: Gateway, window: str) -> None:
    verdict = gateway.http.post(f"/admin/windows/{window}/verify").json()
    assert (verdict["ok"], verdict["kv"], verdict["tiers"], verdict["damaged"]) == (True, "absent", {}, [])
    assert "0 of 0 chunks" in verdict["warnings"][0]
    done = cwg("verify", window, url=gateway.url)
    assert (done.returncode, "chunks usable" in done.stdout) == (0, True)


def test_without_kv_there_is_nothing_to_go_on_from(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    verdict = gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": True}).json()
    assert (verdict["ok"], verdict["deep"]) == (True, [])
    assert any("nothing to continue from" in warning for warning in verdict["warnings"])
    assert gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": False}).json()["deep"] is None
    assert engine.seen("/v1/completions") == []


def test_a_verification_takes_only_deep_and_needs_a_window(gateway: Gateway, window: str) -> None:
    for wrong in ("yes", 1, "true"):
        answer = gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": wrong})
        assert_refused(answer, "invalid_request", "deep")
    assert_refused(
        gateway.http.post(f"/admin/windows/{window}/verify", json={"depth": 1}), "unknown_parameter", "depth"
    )
    assert error_of(gateway.http.post("/admin/windows/nobody/verify")) == (404, "window_not_found")
    assert_failed(cwg("verify", "nobody", url=gateway.url), "nobody")


# --- ask


def test_a_question_is_answered_under_the_windows_salt_and_leaves_nothing_behind(
    engine: FakeEngine, gateway: Gateway, window: str
) -> None:
    before = gateway.http.get(f"/admin/windows/{window}").json()
    sessions = gateway.http.get("/admin/sessions").json()["total"]
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "What was said?", "max_tokens": 7})
    assert answer.status_code == 200, answer.text
    said = answer.json()
    turn, asked = (request.json for request in engine.seen("/v1/chat/completions"))
    assert asked["cache_salt"] == turn["cache_salt"]
    assert [m["content"] for m in asked["messages"]] == ["hi", "Hello there!", "What was said?"]
    assert (asked["max_tokens"], asked["temperature"]) == (7, 0)
    assert asked["kv_transfer_params"] == {"lmcache.max_offload_tokens": 0}
    receipt = said["receipt"]
    assert (said["answer"], said["finish_reason"], said["window_name"]) == ("Hello there!", "stop", window)
    assert receipt["prompt_tokens"] > receipt["cached_tokens"] >= 16
    assert receipt["computed_tokens"] == receipt["prompt_tokens"] - receipt["cached_tokens"]
    assert "no KV" in said["warnings"][0]
    assert gateway.http.get(f"/admin/windows/{window}").json() == before
    assert gateway.http.get("/admin/sessions").json()["total"] == sessions


def test_tools_stay_in_the_prompt_and_are_not_called(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    gateway.chat(session, tools=tools)
    gateway.freeze(session, f"w-{session}")
    assert gateway.http.post(f"/admin/windows/w-{session}/ask", json={"question": "q"}).status_code == 200
    asked = engine.seen("/v1/chat/completions")[-1].json
    assert (asked["tools"], asked["tool_choice"]) == (tools, "none")


def test_an_agent_that_froze_itself_by_a_tool_call_can_be_asked(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    reply = whole_reply("", usage_of(10, 1))
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "freeze", "arguments": "{}"}} for n in (1, 2)]
    reply["choices"][0]["message"]["tool_calls"] = calls
    engine.on_chat = lambda exchange: exchange.json(reply)
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    assert gateway.http.post(f"/admin/windows/w-{session}/ask", json={"question": "q"}).status_code == 200
    *_, said, first, second, question = engine.seen("/v1/chat/completions")[-1].json["messages"]
    assert said["tool_calls"] == calls
    assert [(result["role"], result["tool_call_id"]) for result in (first, second)] == [("tool", "c1"), ("tool", "c2")]
    assert "frozen before" in first["content"]
    assert question == {"role": "user", "content": "q"}
    kept = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"]
    assert kept[-1]["tool_calls"] == calls


def test_a_text_cannot_be_asked(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    headers = {"x-session-id": session}
    gateway.http.post("/v1/completions", json={"model": "demo", "prompt": "Once upon a time"}, headers=headers)
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    answer = gateway.http.post(f"/admin/windows/w-{session}/ask", json={"question": "q"})
    assert_refused(answer, "invalid_request", "/v1/completions")
    assert engine.seen("/v1/chat/completions") == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "question is missing"),
        ({"question": None}, "question is missing"),
        ({"question": ""}, "question"),
        ({"question": " \n"}, "question"),
        ({"question": ["q"]}, "question"),
        ({"question": "q" * 10_001}, "question"),
        ({"question": "q\0"}, "question"),
        ({"question": "q", "max_tokens": 0}, "max_tokens"),
        ({"question": "q", "max_tokens": 4097}, "max_tokens"),
        ({"question": "q", "max_tokens": "7"}, "max_tokens"),
        ({"question": "q", "max_tokens": 1.5}, "max_tokens"),
        ({"question": "q", "max_tokens": True}, "max_tokens"),
        ({"question": "q", "max_tokens": 4090}, "max_tokens"),  # the window and so many are more than the model takes
    ],
)
def test_a_question_that_is_wrong_names_the_field_and_asks_nobody(
    engine: FakeEngine, gateway: Gateway, window: str, body: dict[str, Any], says: str
) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json=body)
    assert_refused(answer, "invalid_request", says)
    assert len(engine.seen("/v1/chat/completions")) == 1


def test_asking_nobody_or_with_more_than_is_known_is_refused(gateway: Gateway, window: str) -> None:
    wrong = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "q", "maxtokens": 1})
    assert_refused(wrong, "unknown_parameter", "max_tokens")
    assert error_of(gateway.http.post("/admin/windows/nobody/ask", json={"question": "q"})) == (404, "window_not_found")


def test_what_the_engine_says_of_a_question_is_told(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "too long for me"}}, 400)
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "q"})
    assert_refused(answer, "invalid_request", "too long for me")
    engine.on_chat = lambda exchange: exchange.cut()
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "q"})
    assert error_of(answer) == (502, "engine_unreachable")


def test_the_cli_asks(gateway: Gateway, window: str) -> None:
    done = cwg("ask", window, "What was said?", url=gateway.url)
    assert (done.returncode, done.stdout) == (0, "Hello there!\n")
    assert "from the cache" in done.stderr
    answer = json.loads(cwg("ask", window, "What?", "--max-tokens", "5", "--json", url=gateway.url).stdout)
    assert answer["receipt"]["completion_tokens"] == 3
    assert_failed(cwg("ask", "nobody", "What?", url=gateway.url), "nobody")
    assert cwg("ask", window, url=gateway.url).returncode == 2


# --- prefetch


def test_a_prefetch_without_a_cache_is_refused_with_the_remedy(gateway: Gateway, window: str) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/prefetch", json={})
    assert error_of(answer) == (503, "cache_unavailable")
    assert "cache_url" in answer.text
    assert_failed(cwg("prefetch", window, url=gateway.url), "cache_url")
    answer = gateway.http.post(f"/admin/windows/{window}/prefetch", json={"tier": "l1"})
    assert_refused(answer, "unknown_parameter", "tier")
    assert error_of(gateway.http.post("/admin/windows/nobody/prefetch")) == (404, "window_not_found")


# --- evict


def test_an_eviction_without_a_cache_is_refused_with_the_remedy(gateway: Gateway, window: str) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/evict", json={})
    assert error_of(answer) == (503, "cache_unavailable")
    assert "cache_url" in answer.text
    answer = gateway.http.post(f"/admin/windows/{window}/evict", json={"tier": "l1"})
    assert_refused(answer, "unknown_parameter", "tier")
    assert error_of(gateway.http.post("/admin/windows/nobody/evict")) == (404, "window_not_found")


def test_the_cli_evicts_and_verifies_deep(gateway: Gateway, window: str) -> None:
    assert_failed(cwg("evict", window, url=gateway.url), "cache_url")
    done = cwg("verify", window, "--deep", "--json", url=gateway.url)
    assert (done.returncode, json.loads(done.stdout)["deep"]) == (0, [])


# --- thaw and go on


def test_the_cli_goes_on_at_once(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    done = cwg("thaw", window, "--warm", "none", "--continue", "And then?", "--max-tokens", "9", url=gateway.url)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Hello there!")
    assert engine.seen("/v1/chat/completions")[-1].json["max_tokens"] == 9
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "too long for me"}}, 400)
    done = cwg("thaw", window, "--continue", "And then?", url=gateway.url)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "error: thawed, but not gone on: too long for me")


def test_a_thaw_with_a_prompt_goes_on_as_a_turn_of_the_new_session(
    engine: FakeEngine, gateway: Gateway, window: str, session: str
) -> None:
    body = {"new_session_id": f"t-{session}", "continuation_prompt": "And then?", "max_tokens": 9}
    thawed = gateway.http.post(f"/admin/windows/{window}/thaw", json=body).json()
    said = thawed["continuation"]
    assert (said["message"]["content"], said["finish_reason"], said["error"]) == ("Hello there!", "stop", None)
    assert said["cached_tokens"] == said["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    asked = engine.seen("/v1/chat/completions")[-1].json
    assert [m["content"] for m in asked["messages"]] == ["hi", "Hello there!", "And then?"]
    assert (asked["cache_salt"], asked["max_tokens"]) == (thawed["cache_salt"], 9)
    kept = gateway.http.get(f"/admin/sessions/t-{session}").json()
    assert (kept["state"], kept["turn_count"], kept["window"]) == ("active", 1, window)
    gateway.freeze(f"t-{session}", f"on-{window}")
    told = gateway.http.get(f"/admin/windows/on-{window}/messages").json()["messages"]
    assert [m["content"] for m in told] == ["hi", "Hello there!", "And then?", "Hello there!"]
    plain = gateway.http.post(f"/admin/windows/{window}/thaw", json={}).json()
    assert plain["continuation"] is None


def test_a_continuation_that_fails_does_not_undo_the_thaw(
    engine: FakeEngine, gateway: Gateway, window: str, session: str
) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "too long for me"}}, 400)
    body = {"new_session_id": f"t-{session}", "continuation_prompt": "And then?"}
    answer = gateway.http.post(f"/admin/windows/{window}/thaw", json=body)
    assert answer.status_code == 200
    said = answer.json()["continuation"]
    assert (said["message"], said["usage"], said["error"]["message"]) == (None, None, "too long for me")
    engine.on_chat = lambda exchange: exchange.cut()
    answer = gateway.http.post(f"/admin/windows/{window}/thaw", json={"continuation_prompt": "And then?"})
    assert answer.json()["continuation"]["error"]["code"] == "engine_unreachable"
    kept = gateway.http.get(f"/admin/sessions/t-{session}").json()
    assert (kept["window"], kept["turn_count"]) == (window, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"continuation_prompt": ""}, "continuation_prompt"),
        ({"continuation_prompt": " "}, "continuation_prompt"),
        ({"continuation_prompt": 1}, "continuation_prompt"),
        ({"continuation_prompt": "q" * 10_001}, "continuation_prompt"),
        ({"continuation_prompt": "q", "max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5}, "continuation_prompt"),
    ],
)
def test_a_continuation_that_is_wrong_is_refused_before_anything_is_thawed(
    gateway: Gateway, window: str, session: str, body: dict[str, Any], says: str
) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/thaw", json={"new_session_id": f"t-{session}", **body})
    assert_refused(answer, "invalid_request", says)
    assert gateway.http.get(f"/admin/sessions/t-{session}").status_code == 404


def test_a_text_has_nobody_who_could_go_on(gateway: Gateway, session: str) -> None:
    headers = {"x-session-id": session}
    gateway.http.post("/v1/completions", json={"model": "demo", "prompt": "Once upon a time"}, headers=headers)
    gateway.freeze(session, f"w-{session}")
    body = {"new_session_id": f"t-{session}", "continuation_prompt": "And then?"}
    answer = gateway.http.post(f"/admin/windows/w-{session}/thaw", json=body)
    assert_refused(answer, "invalid_request", "/v1/completions")
    assert gateway.http.get(f"/admin/sessions/t-{session}").status_code == 404


def test_a_continuation_is_let_in_by_the_callers_own_key(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="k" * 20) as gateway:
        freeze(gateway, "s", "w")
        body = {"new_session_id": "t", "continuation_prompt": "And then?"}
        said = gateway.http.post("/admin/windows/w/thaw", json=body).json()["continuation"]
        assert said["message"]["content"] == "Hello there!"


# --- fanout


def test_a_fanout_makes_sessions_of_their_own_that_share_the_windows_salt(
    engine: FakeEngine, gateway: Gateway, window: str, session: str
) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/fanout", json={"count": 3, "prefix": f"b-{session}"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["sessions"] == [f"b-{session}-{n}" for n in (1, 2, 3)]
    for number in (1, 2, 3):
        assert gateway.chat(f"b-{session}-{number}", f"go {number}").status_code == 200
    first, *branches = (request.json for request in engine.seen("/v1/chat/completions"))
    assert {b["cache_salt"] for b in branches} == {first["cache_salt"]}
    for number, branch in enumerate(branches, 1):
        assert [m["content"] for m in branch["messages"]] == ["hi", "Hello there!", f"go {number}"]
        kept = gateway.http.get(f"/admin/sessions/b-{session}-{number}").json()
        assert (kept["window"], kept["turn_count"]) == (window, 1)


def test_a_fanout_without_a_prefix_names_them_after_the_window(gateway: Gateway, window: str) -> None:
    one, two = (gateway.http.post(f"/admin/windows/{window}/fanout", json={"count": 2}).json() for _ in range(2))
    assert len({*one["sessions"], *two["sessions"]}) == 4
    assert all(name.startswith(window) for name in one["sessions"])


def test_a_fanout_that_meets_a_session_makes_none(gateway: Gateway, window: str, session: str) -> None:
    gateway.chat(f"b-{session}-2")
    gateway.turns(f"b-{session}-2")
    answer = gateway.http.post(f"/admin/windows/{window}/fanout", json={"count": 3, "prefix": f"b-{session}"})
    assert error_of(answer) == (409, "session_already_exists")
    assert f"b-{session}-2" in answer.text
    for number in (1, 3):
        assert gateway.http.get(f"/admin/sessions/b-{session}-{number}").status_code == 404


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ({}, "invalid_request", "count is missing"),
        ({"count": 0}, "invalid_request", "count"),
        ({"count": 101}, "invalid_request", "count"),
        ({"count": "3"}, "invalid_request", "count"),
        ({"count": True}, "invalid_request", "count"),
        ({"count": 2, "prefix": "a b"}, "invalid_session_id", "prefix"),
        ({"count": 2, "prefix": "p" * 128}, "invalid_session_id", "prefix"),
        ({"count": 2, "prefx": "p"}, "unknown_parameter", "prefix"),
    ],
)
def test_a_fanout_that_is_wrong_names_the_field(
    gateway: Gateway, window: str, body: dict[str, Any], code: str, says: str
) -> None:
    assert_refused(gateway.http.post(f"/admin/windows/{window}/fanout", json=body), code, says)


def test_the_cli_fans_out(gateway: Gateway, window: str, session: str) -> None:
    done = cwg("fanout", window, "2", "--prefix", f"c-{session}", url=gateway.url)
    assert (done.returncode, done.stdout) == (0, f"c-{session}-1\nc-{session}-2\n")
    assert_failed(cwg("fanout", window, "2", "--prefix", f"c-{session}", url=gateway.url), "already")
    assert_failed(cwg("fanout", "nobody", "2", url=gateway.url), "nobody")


# --- clone, isolated


def test_an_isolated_clone_goes_on_under_another_salt(
    engine: FakeEngine, gateway: Gateway, window: str, session: str
) -> None:
    salts = set()
    for name in ("one", "two"):
        body = {"target_window": f"{name}-{session}", "isolate": True, "tags": ["i"]}
        answer = gateway.http.post(f"/admin/windows/{window}/clone", json=body)
        assert answer.status_code == 201, answer.text
        clone = answer.json()
        assert (clone["isolated"], clone["shared_blocks"], clone["parent_window"]) == (True, 0, window)
        assert (clone["description"], clone["tags"], clone["expires_at"]) == ("first", ["i"], None)
        thawed = gateway.http.post(f"/admin/windows/{name}-{session}/thaw", json={}).json()
        gateway.chat(thawed["session_id"], "go on")
        asked = engine.seen("/v1/chat/completions")[-1].json
        assert [m["content"] for m in asked["messages"]] == ["hi", "Hello there!", "go on"]
        assert asked["cache_salt"] == thawed["cache_salt"]
        salts.add(asked["cache_salt"])
    salts.add(engine.seen("/v1/chat/completions")[0].json["cache_salt"])
    assert len(salts) == 3
    assert gateway.http.delete(f"/admin/windows/{window}").status_code == 200
    left = gateway.http.get(f"/admin/windows/one-{session}/messages").json()["messages"]
    assert [m["content"] for m in left] == ["hi", "Hello there!"]


def test_an_isolated_clone_that_is_wrong_is_refused(gateway: Gateway, window: str) -> None:
    for wrong in ("yes", 1, "true"):
        body = {"target_window": "x", "isolate": wrong}
        assert_refused(gateway.http.post(f"/admin/windows/{window}/clone", json=body), "invalid_request", "isolate")
    taken = gateway.http.post(f"/admin/windows/{window}/clone", json={"target_window": window, "isolate": True})
    assert error_of(taken) == (409, "window_already_exists")
    missing = gateway.http.post("/admin/windows/nobody/clone", json={"target_window": "x", "isolate": True})
    assert error_of(missing) == (404, "window_not_found")


def test_the_cli_clones_isolated(gateway: Gateway, window: str) -> None:
    done = cwg("clone", window, f"i-{window}", "--isolate", "--json", url=gateway.url)
    assert (done.returncode, json.loads(done.stdout)["isolated"]) == (0, True)


def test_an_isolated_clone_is_apart_even_where_a_tenant_shares_one_salt(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, isolation="tenant") as gateway:
        freeze(gateway, "s", "w")
        gateway.http.post("/admin/windows/w/clone", json={"target_window": "i", "isolate": True})
        for name, session in (("w", "shared"), ("i", "apart")):
            gateway.http.post(f"/admin/windows/{name}/thaw", json={"new_session_id": session})
            assert gateway.chat(session, "go on").status_code == 200
        first, shared, apart = (request.json["cache_salt"] for request in engine.seen("/v1/chat/completions"))
        assert first == shared != apart


# --- tree


def test_the_tree_tells_what_came_from_what(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        assert gateway.http.get("/admin/tree").json()["nodes"] == []
        freeze(gateway, "root", "first")
        gateway.http.post("/admin/windows/first/thaw", json={"new_session_id": "branch"})
        gateway.http.post("/admin/windows/first/clone", json={"target_window": "copy"})
        freeze(gateway, "branch", "second")
        gateway.http.post("/admin/windows/second/clone", json={"target_window": "apart", "isolate": True})
        answer = gateway.http.get("/admin/tree").json()
        came = {n["name"]: (n["parent"] and n["parent"]["name"], n["relation"]) for n in answer["nodes"]}
        assert came == {
            "root": (None, None),
            "first": ("root", "frozen from"),
            "branch": ("first", "thawed from"),
            "copy": ("first", "cloned from"),
            "second": ("branch", "frozen from"),
            "apart": ("second", "cloned from"),
        }
        assert (answer["windows"], answer["sessions"], answer["truncated"]) == (4, 2, False)
        drawn = cwg("tree", url=gateway.url)
        assert drawn.returncode == 0
        names = ("root", "first", "branch", "copy", "second", "apart")
        lines = drawn.stdout.splitlines()
        depth = {name: next(line.index(name) for line in lines if f"{name}  " in line) for name in names}
        assert depth["root"] < depth["first"] < depth["branch"] == depth["copy"] < depth["second"] < depth["apart"]
        assert json.loads(cwg("tree", "--json", url=gateway.url).stdout) == answer
        # Where what was between has gone, the nearest that is left stands for it.
        gateway.http.delete("/admin/sessions/branch")
        left = {n["name"]: (n["parent"], n["relation"]) for n in gateway.http.get("/admin/tree").json()["nodes"]}
        assert left["second"] == ({"kind": "window", "name": "first"}, "went on from")
        gateway.http.delete("/admin/windows/first")
        left = {n["name"]: (n["parent"], n["relation"]) for n in gateway.http.get("/admin/tree").json()["nodes"]}
        assert left["copy"] == ({"kind": "session", "name": "root"}, "frozen from")
        assert left["second"] == (None, None)
        few = gateway.http.get("/admin/tree?limit=1").json()
        assert (len(few["nodes"]), few["truncated"]) == (2, True)
        assert cwg("tree", "--limit", "1", url=gateway.url).returncode == 0


def test_a_session_that_takes_the_id_of_its_own_ancestor_makes_no_circle(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        freeze(gateway, "s", "w")
        gateway.http.delete("/admin/sessions/s")
        gateway.http.post("/admin/windows/w/thaw", json={"new_session_id": "s"})
        came = {n["name"]: n["parent"] for n in gateway.http.get("/admin/tree").json()["nodes"]}
        assert came == {"w": None, "s": {"kind": "window", "name": "w"}}
        assert cwg("tree", url=gateway.url).stdout.index("w  window") < cwg("tree", url=gateway.url).stdout.index(
            "s  s"
        )


@pytest.mark.parametrize(("query", "code", "says"), [
    ("limit=0", "invalid_request", "limit"), ("limit=10001", "invalid_request", "limit"),
    ("limits=3", "unknown_parameter", "limit"),
])  # fmt: skip
def test_a_tree_that_is_wrong_names_the_field(gateway: Gateway, query: str, code: str, says: str) -> None:
    assert_refused(gateway.http.get(f"/admin/tree?{query}"), code, says)


# --- the same at the same moment


@pytest.mark.parametrize(
    ("method", "path", "body", "outcomes"),
    [
        ("POST", "/{w}/thaw", {"new_session_id": "t-{s}"}, [200, 409]),
        ("POST", "/{w}/clone", {"target_window": "c-{s}"}, [201, 409]),
        ("POST", "/{w}/clone", {"target_window": "c-{s}", "isolate": True}, [201, 409]),
        ("POST", "/{w}/fanout", {"count": 3, "prefix": "t-{s}"}, [201, 409]),
        ("DELETE", "/{w}", None, [200, 404]),
    ],
)
def test_of_two_that_do_the_same_at_once_one_does_it(
    gateway: Gateway, window: str, session: str, method: str, path: str, body: dict[str, Any] | None,
    outcomes: list[int],
) -> None:  # fmt: skip
    url = f"/admin/windows{path.format(w=window)}"
    said = json.loads(json.dumps(body).replace("{s}", session))
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: gateway.http.request(method, url, json=said), range(2)))
    assert sorted(answer.status_code for answer in answers) == outcomes
    sessions = gateway.http.get("/admin/sessions?limit=100").json()["sessions"]
    made = [one["id"] for one in sessions if one["id"].startswith(f"t-{session}")]
    assert len(made) == {"/{w}/thaw": 1, "/{w}/fanout": 3}.get(path, 0)
    for one in made:
        assert gateway.chat(one, "go on").status_code == 200


def test_a_thaw_and_a_deletion_at_once_leave_a_whole_session_or_none(
    engine: FakeEngine, gateway: Gateway, window: str, session: str
) -> None:
    url = f"/admin/windows/{window}"
    with ThreadPoolExecutor(2) as pool:
        thaw = pool.submit(gateway.http.post, f"{url}/thaw", json={"new_session_id": f"t-{session}"})
        assert pool.submit(gateway.http.delete, url).result().status_code == 200
        assert thaw.result().status_code in (200, 404)
    if thaw.result().status_code == 404:
        assert gateway.http.get(f"/admin/sessions/t-{session}").status_code == 404
        return
    assert gateway.chat(f"t-{session}", "go on").status_code == 200
    asked = engine.seen("/v1/chat/completions")[-1].json
    assert [m["content"] for m in asked["messages"]] == ["hi", "Hello there!", "go on"]

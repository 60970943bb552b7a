"""Operations on a window: describe, verify, ask, prefetch, evict; at the admin API and the CLI."""

import json
from typing import Any

import pytest

from tests.support.admin_requests import error_of
from tests.support.cli import assert_failed, cwg
from tests.support.fakes.engine import FakeEngine, usage_of, whole_reply
from tests.support.gateway_process import Gateway
from tests.support.refusals import assert_refused

pytestmark = pytest.mark.usefixtures("each_store")


def test_patch_changes_only_given_fields(gateway: Gateway, window: str) -> None:
    before = gateway.http.get(f"/admin/windows/{window}").json()
    answer = gateway.http.patch(f"/admin/windows/{window}", json={"tags": ["c"]})
    assert answer.status_code == 200
    changed = gateway.http.get(f"/admin/windows/{window}").json()
    assert changed == {**before, "tags": ["c"]}
    assert [w["name"] for w in gateway.http.get(f"/admin/windows?tags=c&search={window}").json()["windows"]] == [window]
    assert gateway.http.get(f"/admin/windows?tags=a&search={window}").json()["total"] == 0


def test_null_clears_and_new_ttl_counts_from_now(gateway: Gateway, window: str) -> None:
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
def test_invalid_patch_names_the_field(gateway: Gateway, window: str, body: dict[str, Any], says: str) -> None:
    assert_refused(gateway.http.patch(f"/admin/windows/{window}", json=body), "invalid_request", says)


def test_patch_cannot_change_window_content(gateway: Gateway, window: str) -> None:
    for field in ("token_count", "name", "desription"):
        assert_refused(gateway.http.patch(f"/admin/windows/{window}", json={field: "x"}), "unknown_parameter", field)
    missing = gateway.http.patch("/admin/windows/nobody", json={"description": "d"})
    assert error_of(missing) == (404, "window_not_found")


def test_cli_describe(gateway: Gateway, window: str) -> None:
    done = cwg("describe", window, "--description", "new", "--tag", "x", "--no-ttl", "--json", url=gateway.url)
    answer = json.loads(done.stdout)
    assert (answer["description"], answer["tags"], answer["expires_at"]) == ("new", ["x"], None)
    assert cwg("describe", window, "--tag", "x", "--no-tags", url=gateway.url).returncode == 2
    assert_failed(cwg("describe", window, url=gateway.url), "nothing to change")


def test_window_without_kv_is_not_ok(gateway: Gateway, window: str) -> None:
    verdict = gateway.http.post(f"/admin/windows/{window}/verify").json()
    assert (verdict["ok"], verdict["kv"], verdict["tiers"], verdict["damaged"]) == (False, "absent", {}, [])
    assert "holds no KV" in verdict["warnings"][0]
    done = cwg("verify", window, url=gateway.url)
    assert (done.returncode, "usable" in done.stdout) == (1, True)


def test_window_without_kv_has_nothing_to_replay(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    verdict = gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": True}).json()
    assert (verdict["ok"], verdict["deep"]) == (False, [])
    assert any("nothing to continue from" in warning for warning in verdict["warnings"])
    assert gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": False}).json()["deep"] is None
    assert engine.seen("/v1/completions") == []


def test_verify_takes_only_deep_and_needs_a_window(gateway: Gateway, window: str) -> None:
    for wrong in ("yes", 1, "true"):
        answer = gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": wrong})
        assert_refused(answer, "invalid_request", "deep")
    assert_refused(
        gateway.http.post(f"/admin/windows/{window}/verify", json={"depth": 1}), "unknown_parameter", "depth"
    )
    assert error_of(gateway.http.post("/admin/windows/nobody/verify")) == (404, "window_not_found")
    assert_failed(cwg("verify", "nobody", url=gateway.url), "nobody")


def test_ask_uses_the_salt_and_stores_nothing(engine: FakeEngine, gateway: Gateway, window: str) -> None:
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
    after = gateway.http.get(f"/admin/windows/{window}").json()
    assert receipt["saved"]["tokens"] == after["saved"]["tokens"] == receipt["cached_tokens"]
    assert {**after, "saved": None} == {**before, "saved": None}
    assert gateway.http.get("/admin/sessions").json()["total"] == sessions


def test_ask_keeps_tools_in_prompt_but_calls_none(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    gateway.chat(session, tools=tools)
    gateway.freeze(session, f"w-{session}")
    assert gateway.http.post(f"/admin/windows/w-{session}/ask", json={"question": "q"}).status_code == 200
    asked = engine.seen("/v1/chat/completions")[-1].json
    assert (asked["tools"], asked["tool_choice"]) == (tools, "none")


def test_ask_after_an_unanswered_tool_call(engine: FakeEngine, gateway: Gateway, session: str) -> None:
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


def test_ask_refuses_a_plain_text(engine: FakeEngine, gateway: Gateway, session: str) -> None:
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
def test_invalid_question_names_the_field(
    engine: FakeEngine, gateway: Gateway, window: str, body: dict[str, Any], says: str
) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json=body)
    assert_refused(answer, "invalid_request", says)
    assert len(engine.seen("/v1/chat/completions")) == 1


def test_ask_refuses_missing_window_and_unknown_fields(gateway: Gateway, window: str) -> None:
    wrong = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "q", "maxtokens": 1})
    assert_refused(wrong, "unknown_parameter", "max_tokens")
    assert error_of(gateway.http.post("/admin/windows/nobody/ask", json={"question": "q"})) == (404, "window_not_found")


def test_ask_reports_the_engines_error(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "too long for me"}}, 400)
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "q"})
    assert_refused(answer, "invalid_request", "too long for me")
    engine.on_chat = lambda exchange: exchange.cut()
    answer = gateway.http.post(f"/admin/windows/{window}/ask", json={"question": "q"})
    assert error_of(answer) == (502, "engine_unreachable")


def test_cli_ask(gateway: Gateway, window: str) -> None:
    done = cwg("ask", window, "What was said?", url=gateway.url)
    assert (done.returncode, done.stdout) == (0, "Hello there!\n")
    assert "from the cache" in done.stderr
    answer = json.loads(cwg("ask", window, "What?", "--max-tokens", "5", "--json", url=gateway.url).stdout)
    assert answer["receipt"]["completion_tokens"] == 3
    assert_failed(cwg("ask", "nobody", "What?", url=gateway.url), "nobody")
    assert cwg("ask", window, url=gateway.url).returncode == 2


def test_prefetch_without_cache_is_refused(gateway: Gateway, window: str) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/prefetch", json={})
    assert error_of(answer) == (503, "cache_unavailable")
    assert "cache_url" in answer.text
    assert answer.json()["error"]["retryable"] is False, "a retry never helps"
    assert_failed(cwg("prefetch", window, url=gateway.url), "cache_url")
    answer = gateway.http.post(f"/admin/windows/{window}/prefetch", json={"tier": "l1"})
    assert_refused(answer, "unknown_parameter", "tier")
    assert error_of(gateway.http.post("/admin/windows/nobody/prefetch")) == (404, "window_not_found")


def test_evict_without_cache_is_refused(gateway: Gateway, window: str) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/evict", json={})
    assert error_of(answer) == (503, "cache_unavailable")
    assert "cache_url" in answer.text
    answer = gateway.http.post(f"/admin/windows/{window}/evict", json={"tier": "l1"})
    assert_refused(answer, "unknown_parameter", "tier")
    assert error_of(gateway.http.post("/admin/windows/nobody/evict")) == (404, "window_not_found")


def test_cli_evict_and_deep_verify(gateway: Gateway, window: str) -> None:
    assert_failed(cwg("evict", window, url=gateway.url), "cache_url")
    done = cwg("verify", window, "--deep", "--json", url=gateway.url)
    assert (done.returncode, json.loads(done.stdout)["deep"]) == (1, [])

"""Operations that make sessions or windows from a window: thaw with a prompt, fanout, clone; and the tree."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.admin_requests import error_of, freeze
from tests.support.cli import assert_failed, cwg
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.refusals import assert_refused


def test_cli_thaw_with_prompt(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    done = cwg("thaw", window, "--warm", "none", "--continue", "And then?", "--max-tokens", "9", url=gateway.url)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Hello there!")
    assert engine.seen("/v1/chat/completions")[-1].json["max_tokens"] == 9
    done = cwg("thaw", window, "--as-text", url=gateway.url)
    assert (done.returncode, "only the text was thawed" in done.stderr) == (0, True)
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "too long for me"}}, 400)
    done = cwg("thaw", window, "--continue", "And then?", url=gateway.url)
    said = "error: thawed, but the continuation failed: too long for me"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


def test_cli_thaw_as_text(engine: FakeEngine, gateway: Gateway, window: str) -> None:
    before = len(engine.seen("/v1/completions"))
    done = cwg("thaw", window, "--as-text", "--warm", "none", "--json", url=gateway.url)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["receipt"]["as_text"], answer["receipt"]["partial"]) == (0, True, True)
    assert "only the text was thawed" in answer["warnings"][0]
    assert len(engine.seen("/v1/completions")) == before
    assert gateway.chat(answer["session_id"], "go on").status_code == 200


def test_thaw_with_prompt_is_a_turn_of_the_session(
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
    messages = gateway.http.get(f"/admin/windows/on-{window}/messages").json()["messages"]
    assert [m["content"] for m in messages] == ["hi", "Hello there!", "And then?", "Hello there!"]
    plain = gateway.http.post(f"/admin/windows/{window}/thaw", json={}).json()
    assert plain["continuation"] is None


def test_failed_continuation_keeps_the_thaw(engine: FakeEngine, gateway: Gateway, window: str, session: str) -> None:
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
def test_invalid_continuation_is_refused_before_thaw(
    gateway: Gateway, window: str, session: str, body: dict[str, Any], says: str
) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/thaw", json={"new_session_id": f"t-{session}", **body})
    assert_refused(answer, "invalid_request", says)
    assert gateway.http.get(f"/admin/sessions/t-{session}").status_code == 404


def test_plain_text_has_no_continuation(gateway: Gateway, session: str) -> None:
    headers = {"x-session-id": session}
    gateway.http.post("/v1/completions", json={"model": "demo", "prompt": "Once upon a time"}, headers=headers)
    gateway.freeze(session, f"w-{session}")
    body = {"new_session_id": f"t-{session}", "continuation_prompt": "And then?"}
    answer = gateway.http.post(f"/admin/windows/w-{session}/thaw", json=body)
    assert_refused(answer, "invalid_request", "/v1/completions")
    assert gateway.http.get(f"/admin/sessions/t-{session}").status_code == 404


def test_continuation_uses_the_callers_key(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="k" * 20) as gateway:
        freeze(gateway, "s", "w")
        body = {"new_session_id": "t", "continuation_prompt": "And then?"}
        said = gateway.http.post("/admin/windows/w/thaw", json=body).json()["continuation"]
        assert said["message"]["content"] == "Hello there!"


def test_fanout_sessions_share_the_windows_salt(
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


def test_fanout_without_prefix_is_named_after_the_window(gateway: Gateway, window: str) -> None:
    one, two = (gateway.http.post(f"/admin/windows/{window}/fanout", json={"count": 2}).json() for _ in range(2))
    assert len({*one["sessions"], *two["sessions"]}) == 4
    assert all(name.startswith(window) for name in one["sessions"])


def test_fanout_with_taken_id_makes_no_session(gateway: Gateway, window: str, session: str) -> None:
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
def test_invalid_fanout_names_the_field(
    gateway: Gateway, window: str, body: dict[str, Any], code: str, says: str
) -> None:
    assert_refused(gateway.http.post(f"/admin/windows/{window}/fanout", json=body), code, says)


def test_cli_fanout(gateway: Gateway, window: str, session: str) -> None:
    done = cwg("fanout", window, "2", "--prefix", f"c-{session}", url=gateway.url)
    made = [line.split() for line in done.stdout.splitlines()[1:]]
    assert made == [[f"c-{session}-{n}", f"{gateway.url}/s/c-{session}-{n}/v1"] for n in (1, 2)]
    taken = cwg("fanout", window, "2", "--prefix", f"c-{session}", url=gateway.url)
    assert_failed(taken, "already", "choose another --prefix")
    assert_failed(cwg("fanout", "nobody", "2", url=gateway.url), "nobody")


def test_isolated_clone_continues_under_another_salt(
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


def test_invalid_isolated_clone_is_refused(gateway: Gateway, window: str) -> None:
    for wrong in ("yes", 1, "true"):
        body = {"target_window": "x", "isolate": wrong}
        assert_refused(gateway.http.post(f"/admin/windows/{window}/clone", json=body), "invalid_request", "isolate")
    taken = gateway.http.post(f"/admin/windows/{window}/clone", json={"target_window": window, "isolate": True})
    assert error_of(taken) == (409, "window_already_exists")
    missing = gateway.http.post("/admin/windows/nobody/clone", json={"target_window": "x", "isolate": True})
    assert error_of(missing) == (404, "window_not_found")


def test_cli_clone_isolated(gateway: Gateway, window: str) -> None:
    done = cwg("clone", window, f"i-{window}", "--isolate", "--json", url=gateway.url)
    assert (done.returncode, json.loads(done.stdout)["isolated"]) == (0, True)


def test_isolated_clone_ignores_the_tenant_wide_salt(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, isolation="tenant") as gateway:
        freeze(gateway, "s", "w")
        gateway.http.post("/admin/windows/w/clone", json={"target_window": "i", "isolate": True})
        for name, session in (("w", "shared"), ("i", "apart")):
            gateway.http.post(f"/admin/windows/{name}/thaw", json={"new_session_id": session})
            assert gateway.chat(session, "go on").status_code == 200
        first, shared, apart = (request.json["cache_salt"] for request in engine.seen("/v1/chat/completions"))
        assert first == shared != apart


def test_tree_shows_origins(engine: FakeEngine, tmp_path: Path) -> None:
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


def test_reused_id_makes_no_cycle_in_the_tree(engine: FakeEngine, tmp_path: Path) -> None:
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
def test_invalid_tree_query_names_the_field(gateway: Gateway, query: str, code: str, says: str) -> None:
    assert_refused(gateway.http.get(f"/admin/tree?{query}"), code, says)


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
def test_concurrent_duplicates_succeed_once(
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


def test_concurrent_thaw_and_delete_is_all_or_nothing(
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

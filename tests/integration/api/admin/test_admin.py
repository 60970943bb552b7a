"""The admin door without a cache: the verbs, and every kind of wrong request, in one shape."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes.engine import WITHIN, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient


def error_of(response: Any) -> tuple[int, str]:
    """Status and code; the shape has to be whole."""
    error = response.json()["error"]
    assert set(error) == {"code", "message", "hint", "retryable", "details"}
    assert error["message"]
    assert isinstance(error["retryable"], bool)
    assert response.headers["content-type"] == "application/json"
    return response.status_code, error["code"]


def freeze(gateway: Gateway, session: str, name: str, **more: Any) -> dict[str, Any]:
    """One turn, then a window of it."""
    gateway.chat(session)
    response = gateway.freeze(session, name, **more)
    assert response.status_code == 201, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


# --- verbs


def test_a_window_without_a_cache_keeps_text_and_says_so(gateway: Gateway, session: str) -> None:
    window = freeze(gateway, session, f"w-{session}", description="d", tags=["a", "b", "a"], ttl_seconds=60)
    assert (window["kv"], window["block_count"], window["size_bytes"], window["parent_window"]) == (
        "absent",
        0,
        0,
        None,
    )
    assert (window["description"], window["tags"], window["session_id"]) == ("d", ["a", "b"], session)
    assert window["token_count"] == window["receipt"]["tokens"] > 0
    assert window["receipt"]["tiers"] == {}
    assert "no cache" in window["warnings"][0]
    messages = gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"]
    assert messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there!"}]
    assert gateway.http.get(f"/admin/sessions/{session}").json()["state"] == "frozen"


def test_a_session_that_goes_on_can_be_frozen_again_and_the_first_window_stays(gateway: Gateway, session: str) -> None:
    first = freeze(gateway, session, f"{session}-1")
    again = gateway.chat(session, "more").status_code
    second = gateway.freeze(session, f"{session}-2").json()
    assert again == 200
    assert gateway.http.get(f"/admin/windows/{session}-1").json()["token_count"] == first["token_count"]
    assert second["session_id"] == session
    assert gateway.http.get(f"/admin/windows?session_id={session}").json()["total"] == 2


def test_a_thawed_session_puts_the_window_in_front_and_keeps_its_salt(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    freeze(gateway, session, f"w-{session}")
    for _ in range(2):
        thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()
        assert thawed["session_id"] != session
        assert thawed["receipt"]["chunks_expected"] == 0
        gateway.chat(thawed["session_id"], "go on")
        request = engine.seen("/v1/chat/completions")[-1].json
        assert [m["content"] for m in request["messages"]] == ["hi", "Hello there!", "go on"]
        assert (
            request["cache_salt"] == thawed["cache_salt"] == engine.seen("/v1/chat/completions")[0].json["cache_salt"]
        )
        state = gateway.http.get(f"/admin/sessions/{thawed['session_id']}").json()
        assert state["window"] == f"w-{session}"


def test_a_thaw_through_the_engine_tells_what_the_engine_found(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}")
    receipt = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"warm": "gpu"}).json()["receipt"]
    assert receipt["prompt_tokens"] > receipt["cached_tokens"] >= 16


def test_a_thaw_into_a_session_that_exists_is_refused_and_changes_nothing(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}")
    for taken in (session, gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}).json()["session_id"]):
        before = gateway.http.get(f"/admin/sessions/{taken}").json()
        response = gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"new_session_id": taken})
        assert error_of(response) == (409, "session_already_exists")
        assert gateway.http.get(f"/admin/sessions/{taken}").json() == before


def test_thaws_at_once_make_sessions_of_their_own(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: gateway.http.post(f"/admin/windows/w-{session}/thaw", json={}), range(16)))
    assert len({a.json()["session_id"] for a in answers}) == 16
    with ThreadPoolExecutor(8) as pool:
        body = {"new_session_id": f"{session}-x"}
        same = list(pool.map(lambda _: gateway.http.post(f"/admin/windows/w-{session}/thaw", json=body), range(8)))
    assert sorted(a.status_code for a in same) == [200] + [409] * 7


@pytest.mark.parametrize("length", [44, 63, 64, 100, 127, 128])
def test_a_long_name_works_with_every_verb(gateway: Gateway, session: str, length: int) -> None:
    name = (f"{session}-" + "n" * 128)[:length]
    freeze(gateway, session, name)
    thawed = gateway.http.post(f"/admin/windows/{name}/thaw", json={})
    assert thawed.status_code == 200
    assert len(thawed.json()["session_id"]) <= 128
    assert gateway.chat(thawed.json()["session_id"]).status_code == 200
    target = "c" + name[1:]
    assert gateway.http.post(f"/admin/windows/{name}/clone", json={"target_window": target}).status_code == 201
    assert gateway.http.get(f"/admin/windows/{name}").json()["name"] == name
    assert [gateway.http.delete(f"/admin/windows/{n}").status_code for n in (name, target)] == [200, 200]


def test_two_freezes_of_one_name_at_once_make_one_window(gateway: Gateway, session: str) -> None:
    for number in range(2):
        gateway.chat(f"{session}-{number}")
    for attempt in range(5):
        start = threading.Barrier(2)

        def one(number: int, attempt: int = attempt, start: threading.Barrier = start) -> int:
            start.wait()
            return gateway.freeze(f"{session}-{number}", f"w{attempt}-{session}").status_code

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(one, range(2))) == [201, 409]


def test_a_clone_has_a_life_of_its_own(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}", description="first", tags=["t"], ttl_seconds=60)
    answer = gateway.http.post(f"/admin/windows/w-{session}/clone", json={"target_window": f"c-{session}"})
    assert answer.status_code == 201
    clone = answer.json()
    assert (clone["source_window"], clone["target_window"], clone["parent_window"]) == (
        f"w-{session}",
        f"c-{session}",
        f"w-{session}",
    )
    assert (clone["description"], clone["tags"], clone["expires_at"]) == ("first", ["t"], None)
    lineage = gateway.http.get(f"/admin/windows/c-{session}?include_lineage=true").json()["lineage"]
    assert lineage == {"parent": f"w-{session}", "ancestors": [f"w-{session}"], "clones": []}
    again = gateway.http.post(f"/admin/windows/w-{session}/clone", json={"target_window": f"c-{session}"})
    assert error_of(again) == (409, "window_already_exists")
    itself = gateway.http.post(f"/admin/windows/w-{session}/clone", json={"target_window": f"w-{session}"})
    assert error_of(itself) == (409, "window_already_exists")
    assert gateway.http.delete(f"/admin/windows/w-{session}").status_code == 200
    orphan = gateway.http.get(f"/admin/windows/c-{session}?include_lineage=true").json()
    assert orphan["lineage"] == {"parent": None, "ancestors": [], "clones": []}
    assert gateway.http.get(f"/admin/windows/c-{session}/messages").json()["messages"][0]["content"] == "hi"


def test_a_window_frozen_under_the_name_of_its_deleted_parent_is_not_its_own_ancestor(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        freeze(gateway, "s", "w")
        thawed = gateway.http.post("/admin/windows/w/thaw", json={}).json()["session_id"]
        gateway.http.delete("/admin/windows/w")
        freeze(gateway, thawed, "w")
        # A window that is its own ancestor would keep the store busy for ever.
        answer = gateway.http.get("/admin/windows/w?include_lineage=true", timeout=WITHIN).json()
        assert answer["lineage"] == {"parent": None, "ancestors": [], "clones": []}


def test_a_new_window_under_an_old_name_inherits_nothing(gateway: Gateway, session: str) -> None:
    name = f"w-{session}"
    freeze(gateway, session, name, description="old", tags=["old"])
    thawed = gateway.http.post(f"/admin/windows/{name}/thaw", json={}).json()["session_id"]
    gateway.http.delete(f"/admin/windows/{name}")
    freeze(gateway, f"{session}-other", name)
    later = freeze(gateway, thawed, f"later-{session}")
    assert later["parent_window"] is None  # the window that it came from is gone; the one of that name is a stranger
    assert gateway.http.get(f"/admin/windows/{name}?include_lineage=true").json()["lineage"]["clones"] == []


def test_a_deleted_window_is_gone_from_every_verb(gateway: Gateway, session: str) -> None:
    name = f"w-{session}"
    freeze(gateway, session, name)
    assert gateway.http.delete(f"/admin/windows/{name}").json()["window_name"] == name
    base = f"/admin/windows/{name}"
    gone = [
        gateway.http.get(base),
        gateway.http.delete(base),
        gateway.http.get(f"{base}/messages"),
        gateway.http.post(f"{base}/thaw"),
        gateway.http.post(f"{base}/clone", json={"target_window": "c"}),
    ]
    assert {error_of(response) for response in gone} == {(404, "window_not_found")}
    assert gateway.http.get(f"/admin/windows?session_id={session}").json()["total"] == 0


def test_a_deleted_session_is_gone_and_its_windows_stay(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}")
    assert gateway.http.delete(f"/admin/sessions/{session}").json() == {
        "session_id": session, "deleted": True, "blocks_deleted": 0, "space_freed_bytes": 0, "warnings": [],
    }  # fmt: skip
    assert error_of(gateway.http.get(f"/admin/sessions/{session}")) == (404, "session_not_found")
    assert error_of(gateway.http.delete(f"/admin/sessions/{session}")) == (404, "session_not_found")
    assert gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"][0]["content"] == "hi"


def test_a_freeze_that_cannot_be_says_why_and_leaves_nothing(gateway: Gateway, session: str) -> None:
    before = gateway.http.get("/admin/sessions?limit=1").json()["total"]
    assert error_of(gateway.freeze(session, f"w-{session}")) == (404, "session_not_found")
    assert gateway.http.get("/admin/sessions?limit=1").json()["total"] == before
    assert error_of(gateway.http.get(f"/admin/windows/w-{session}")) == (404, "window_not_found")


def test_a_session_without_a_finished_turn_cannot_be_frozen(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "no"}}, 500)
    gateway.chat(session)
    gateway.turns(session)
    assert error_of(gateway.freeze(session, f"w-{session}")) == (400, "invalid_request")


def test_a_session_in_mid_stream_is_busy_until_its_reply_is_whole(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    go_on = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="x"))
        go_on.wait(WITHIN)
        exchange.chunk(b"data: [DONE]\n\n")
        exchange.end()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        busy = gateway.freeze(session, f"w-{session}")
        assert error_of(busy) == (409, "session_busy")
        assert busy.json()["error"]["retryable"] is True
        go_on.set()
        wire.chunks()
        assert gateway.freeze(session, f"w-{session}").status_code == 201


def test_a_window_of_other_weights_is_not_thawed_but_can_be_read(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    with gateway_in_front_of(engine.url, tmp_path, model_fingerprint="one") as gateway:
        freeze(gateway, session, "w")
        gateway.stop()
    with gateway_in_front_of(engine.url, tmp_path, model_fingerprint="two") as gateway:
        assert error_of(gateway.http.post("/admin/windows/w/thaw")) == (409, "model_mismatch")
        assert gateway.http.get("/admin/windows/w/messages").json()["messages"][0]["content"] == "hi"
        assert gateway.http.get("/admin/sessions").json()["total"] == 1


def test_a_freeze_and_a_thaw_while_the_engine_is_down_can_be_tried_again(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    freeze(gateway, session, f"w-{session}")
    engine.stop()
    try:
        for response in (
            gateway.freeze(session, f"x-{session}"),
            gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"new_session_id": f"t-{session}"}),
        ):
            assert error_of(response) == (502, "engine_unreachable")
            assert response.json()["error"]["retryable"] is True
    finally:
        engine.start()
    assert gateway.freeze(session, f"x-{session}").status_code == 201
    assert (
        gateway.http.post(f"/admin/windows/w-{session}/thaw", json={"new_session_id": f"t-{session}"}).status_code
        == 200
    )


def test_progress_comes_line_by_line_and_the_result_last(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    body = {"session_id": session, "window_name": f"w-{session}"}
    ndjson = {"accept": "application/x-ndjson"}
    response = gateway.http.post("/admin/windows", json=body, headers=ndjson)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    *steps, last = [json.loads(line) for line in response.text.splitlines()]
    assert [step["progress"]["stage"] for step in steps] == ["snapshot", "render", "commit"]
    assert (last["status"], last["result"]["name"]) == (201, f"w-{session}")
    again = json.loads(gateway.http.post("/admin/windows", json=body, headers=ndjson).text.splitlines()[-1])
    assert (again["status"], again["error"]["code"]) == (409, "window_already_exists")


def test_a_watcher_that_leaves_does_not_undo_the_work(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    body = json.dumps({"session_id": session, "window_name": f"w-{session}"}).encode()
    with RawHttpClient(gateway.url) as wire:
        wire.post("/admin/windows", body, "accept: application/x-ndjson")
        wire.head()
    gateway.http.post("/admin/windows", content=body)
    assert gateway.http.get(f"/admin/windows/w-{session}").status_code == 200


# --- lists


def test_lists_page_sort_filter_and_search(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for number, tags in enumerate((["x"], ["x", "y"], ["y", "été"], [])):
            gateway.chat(f"s{number}", "hi" * (10 - number))
            gateway.freeze(f"s{number}", f"w{number}", tags=tags, description=f'100%_{number} \\ "quoted"')

        def names(query: str) -> list[str]:
            answer = gateway.http.get(f"/admin/windows?{query}").json()
            assert answer["total"] == len(answer["windows"])
            return [window["name"] for window in answer["windows"]]

        assert names("") == ["w3", "w2", "w1", "w0"]
        assert names("sort_by=name&sort_order=asc") == ["w0", "w1", "w2", "w3"]
        assert names("sort_by=token_count") == ["w0", "w1", "w2", "w3"]
        assert names("tags=x") == ["w1", "w0"]
        assert names("tags=x,y") == names("tags=x&tags=y") == ["w1"]
        assert names("tags=%C3%A9t%C3%A9") == ["w2"]
        assert names("tags=X") == names("tags=none") == []
        assert names("session_id=s2") == ["w2"]
        assert names("model=demo") == ["w3", "w2", "w1", "w0"]
        assert names("model=dem") == []
        assert names("search=%25_2") == ["w2"]
        assert names("search=%5C") == names("search=%22QUOTED%22") == ["w3", "w2", "w1", "w0"]
        assert names("search=_") == ["w3", "w2", "w1", "w0"]
        assert names("search=0%25_") == ["w3", "w2", "w1", "w0"]
        assert names("search=0__") == []
        assert names("search=W3") == ["w3"]
        made = gateway.http.get("/admin/windows/w1").json()["created_at"]
        quoted = made.replace("+", "%2B")
        assert set(names(f"created_after={quoted}")) >= {"w3", "w2"}
        assert names("created_before=2020-01-01") == names("created_after=2099-01-01") == []
        page = gateway.http.get("/admin/windows?limit=3").json()
        assert (len(page["windows"]), page["total"], page["has_more"], page["limit"], page["offset"]) == (
            3,
            4,
            True,
            3,
            0,
        )
        page = gateway.http.get("/admin/windows?limit=3&offset=3").json()
        assert (len(page["windows"]), page["has_more"]) == (1, False)
        assert gateway.http.get("/admin/windows?offset=99").json()["windows"] == []
        line = gateway.http.get("/admin/windows?limit=1").json()["windows"][0]
        assert not {"blocks", "receipt", "token_ids", "messages"} & line.keys()


def test_sessions_are_listed_by_state_and_activity(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for name in ("a", "b"):
            freeze(gateway, name, f"w{name}")
        gateway.chat("b", "again")
        gateway.turns("b", 2)
        gateway.http.post("/admin/windows/wa/thaw", json={"new_session_id": "t"})

        def ids(query: str) -> list[str]:
            return [s["id"] for s in gateway.http.get(f"/admin/sessions?{query}").json()["sessions"]]

        assert ids("") == ["t", "b", "a"]
        assert (ids("state=frozen"), ids("state=active"), ids("state=thawed"), ids("state=expired")) == (
            ["a"],
            ["b"],
            ["t"],
            [],
        )
        assert ids("model=demo&limit=1&offset=1") == ["b"]
        assert "salt" not in gateway.http.get("/admin/sessions").text


# --- wrong requests

LISTS = ["/admin/windows", "/admin/sessions"]


@pytest.mark.parametrize(
    ("path", "named", "near"),
    [
        ("/admin/windows?create_after=2026-01-01", "create_after", "created_after"),
        ("/admin/windows?serach=x", "serach", "search"),
        ("/admin/windows?Limit=1", "Limit", "limit"),
        ("/admin/windows?limit =1", "limit ", "limit"),
        ("/admin/windows?state=active", "state", ""),
        ("/admin/windows/w?include_block=true", "include_block", "include_blocks"),
        ("/admin/sessions?tags=a", "tags", ""),
        ("/admin/sessions/s?limit=1", "limit", ""),
        ("/admin/health?components=engine", "components", "component"),
        ("/admin/windows?" + "x" * 500 + "=1", "x", ""),
        ("/admin/windows?%ff=1", "\ufffd", ""),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(
    gateway: Gateway, path: str, named: str, near: str
) -> None:
    response = gateway.http.get(path)
    assert error_of(response) == (400, "unknown_parameter")
    error = response.json()["error"]
    assert error["details"]["field"].startswith(named)
    assert len(error["message"]) < 200
    if near:
        assert repr(near) in error["hint"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=-1",
        "limit=1.5",
        "limit=",
        "limit=ten",
        "limit=%D9%A3",
        "limit=1e1",
        "limit=+1",
        "limit=99999999999999999999",
        "offset=-1",
        "offset=99999999999",
        "limit=5&limit=5",
        "offset=0&limit=1&offset=0",
    ],
)
@pytest.mark.parametrize("path", LISTS)
def test_paging_out_of_bounds_is_refused_not_clamped(gateway: Gateway, path: str, query: str) -> None:
    assert error_of(gateway.http.get(f"{path}?{query}")) == (400, "invalid_request")


@pytest.mark.parametrize(
    "query",
    [
        "created_after=yesterday",
        "created_before=2026-13-01",
        "created_after=2026-02-30",
        "created_after=",
        "created_after=1767225600",
        "sort_by=size_bytes",
        "sort_by=",
        "sort_by=name;drop table windows",
        "sort_order=up",
        "sort_order=DESC",
        "tags=",
        "tags=a,",
        "tags=bad%20tag",
        "tags=a%0a",
        f"tags={'t' * 65}",
        "tags=" + ",".join(f"t{n}" for n in range(21)),
        f"search={'x' * 201}",
        "search=%00",
        f"model={'m' * 501}",
        "created_after=2026-01-01&created_after=2026-01-01",
    ],
)
def test_a_filter_that_means_nothing_is_refused(gateway: Gateway, query: str) -> None:
    assert error_of(gateway.http.get(f"/admin/windows?{query}")) == (400, "invalid_request")


@pytest.mark.parametrize("query", ["state=deleted", "state=Active", "state=", f"model={'m' * 501}"])
def test_a_state_that_no_session_has_is_refused(gateway: Gateway, query: str) -> None:
    assert error_of(gateway.http.get(f"/admin/sessions?{query}")) == (400, "invalid_request")


@pytest.mark.parametrize("query", ["include_blocks=yes", "include_blocks=1", "include_lineage=", "include_blocks=True"])
def test_a_flag_is_true_or_false(gateway: Gateway, query: str) -> None:
    assert error_of(gateway.http.get(f"/admin/windows/w?{query}")) == (400, "invalid_request")


BAD_NAMES = [
    "",
    " ",
    "a b",
    "a/b",
    "-a",
    ".a",
    "_a",
    "a" * 129,
    "é",
    "a\n",
    "\na",
    "a@b",
    "..",
    "a:b",
    "\u0430",
    "🎉",
    "a\0",
    "a%00",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 7, True, [], {}])
def test_a_bad_window_name_is_refused_by_every_verb(gateway: Gateway, session: str, name: Any) -> None:
    code = "invalid_request" if name is None else "invalid_window_name"
    assert error_of(gateway.freeze(session, name)) == (400, code)
    clone = gateway.http.post("/admin/windows/w/clone", json={"target_window": name})
    assert error_of(clone) == (400, code)
    if isinstance(name, str) and "/" not in name and name not in ("", ".."):
        for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/thaw"), ("POST", "/clone"), ("GET", "/messages")):
            body = {"target_window": "c"} if rest == "/clone" else None
            quoted = "".join(f"%{byte:02x}" for byte in name.encode())
            response = gateway.http.request(method, f"/admin/windows/{quoted}{rest}", json=body)
            assert error_of(response) == (400, "invalid_window_name")


@pytest.mark.parametrize("name", [*(n for n in BAD_NAMES if n != "a:b"), 7, True, [], {}])
def test_a_bad_session_id_is_refused_by_every_verb(gateway: Gateway, name: Any) -> None:
    assert error_of(gateway.freeze(name, "w")) == (400, "invalid_session_id")
    thaw = gateway.http.post("/admin/windows/w/thaw", json={"new_session_id": name})
    assert error_of(thaw) == (400, "invalid_session_id")
    if isinstance(name, str) and "/" not in name and name not in ("", ".."):
        quoted = "".join(f"%{byte:02x}" for byte in name.encode())
        for method in ("GET", "DELETE"):
            assert error_of(gateway.http.request(method, f"/admin/sessions/{quoted}")) == (400, "invalid_session_id")
        assert error_of(gateway.http.get(f"/admin/windows?session_id={quoted}")) == (400, "invalid_session_id")


@pytest.mark.parametrize(
    "more",
    [
        {"description": "x" * 2001},
        {"description": "x" * 200_000},
        {"description": 7},
        {"description": ["x"]},
        {"description": "\0"},
        {"tags": "a"},
        {"tags": {"a": 1}},
        {"tags": [""]},
        {"tags": ["a b"]},
        {"tags": ["a\n"]},
        {"tags": [None]},
        {"tags": [["a"]]},
        {"tags": ["t" * 65]},
        {"tags": [f"t{n}" for n in range(21)]},
        {"tags": [f"t{n}" for n in range(500)]},
        {"tags": ["a,b"]},
        {"ttl_seconds": 0},
        {"ttl_seconds": -1},
        {"ttl_seconds": "60"},
        {"ttl_seconds": True},
        {"ttl_seconds": [60]},
        {"ttl_seconds": 1e300},
        {"ttl_seconds": 10**30},
        {"ttl_seconds": 1e10},
    ],
)
def test_a_field_that_does_not_fit_is_refused_and_no_window_is_made(
    gateway: Gateway, session: str, more: dict[str, Any]
) -> None:
    gateway.chat(session)
    gateway.turns(session)
    response = gateway.freeze(session, f"w-{session}", **more)
    assert error_of(response) == (400, "invalid_request")
    assert response.json()["error"]["details"]["field"] == next(iter(more))
    assert len(response.text) < 1000
    assert gateway.http.get(f"/admin/windows/w-{session}").status_code == 404
    assert gateway.http.get(f"/admin/sessions/{session}").json()["state"] == "active"


def test_the_largest_fields_that_fit_are_taken(gateway: Gateway, session: str) -> None:
    tags = [f"{n:02}" + "ü" * 62 for n in range(20)]
    window = freeze(gateway, session, f"w-{session}", description="🎉" * 2000, tags=tags, ttl_seconds=1e9)
    assert (window["description"], window["tags"]) == ("🎉" * 2000, tags)
    assert gateway.http.get("/admin/windows", params={"tags": tags[:3]}).json()["total"] == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_request"),
        (b"{", "invalid_request"),
        (b"[]", "invalid_request"),
        (b"null", "invalid_request"),
        (b'"x"', "invalid_request"),
        (b"\xff", "invalid_request"),
        (b"[" * 100_000, "invalid_request"),
        (b'{"session_id":"a"}', "invalid_request"),
        (b'{"session_id":"a","window_name":"b","tag":["x"]}', "unknown_parameter"),
        (b'{"session_id":"a","window_name":"b","":1}', "unknown_parameter"),
        (b'{"session_id":"a","window_name":"b","\\ud83d":1}', "invalid_request"),
    ],
)
def test_a_body_that_is_not_what_the_verb_takes_is_refused(gateway: Gateway, body: bytes, code: str) -> None:
    assert error_of(gateway.http.post("/admin/windows", content=body)) == (400, code)


def test_a_query_where_a_body_belongs_is_refused_not_ignored(gateway: Gateway) -> None:
    for path in (
        "/admin/windows?session_id=a",
        "/admin/windows/w/thaw?warm=gpu",
        "/admin/windows/w/clone?x=1",
        "/admin/doctor?x=1",
    ):
        assert error_of(gateway.http.post(path, json={})) == (400, "unknown_parameter")


@pytest.mark.parametrize("warm", ["GPU", "", "disk", 1, True, ["gpu"]])
def test_warm_is_one_of_three_words(gateway: Gateway, warm: Any) -> None:
    assert error_of(gateway.http.post("/admin/windows/w/thaw", json={"warm": warm})) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/admin/windows", {"GET", "HEAD", "POST"}),
        ("DELETE", "/admin/windows", {"GET", "HEAD", "POST"}),
        ("POST", "/admin/windows/w", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("GET", "/admin/windows/w/thaw", {"POST"}),
        ("POST", "/admin/sessions", {"GET", "HEAD"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("PATCH", "/admin/doctor", {"POST"}),
    ],
)
def test_a_method_that_a_path_does_not_have_is_a_405_that_names_the_others(
    gateway: Gateway, method: str, path: str, allowed: set[str]
) -> None:
    response = gateway.http.request(method, path)
    assert error_of(response) == (405, "method_not_allowed")
    assert {name.strip() for name in response.headers["allow"].split(",")} == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/admin",
        "/admin/",
        "/admin/window",
        "/admin/windows/",
        "/admin/windows/a/b",
        "/admin/windows/a/thaw/",
        "/favicon.ico",
        "/admin/sessions/a/b",
    ],
)
def test_a_path_that_nobody_has_is_a_404_in_the_same_shape(gateway: Gateway, path: str) -> None:
    assert error_of(gateway.http.get(path, follow_redirects=False)) == (404, "not_found")


def test_head_is_get_without_a_body(gateway: Gateway) -> None:
    response = gateway.http.head("/admin/sessions")
    assert (response.status_code, response.content) == (200, b"")


def test_health_tells_each_component_and_refuses_unknown_ones(gateway: Gateway) -> None:
    summary = gateway.http.get("/admin/health").json()
    assert summary["status"] == "degraded"  # no cache
    assert {name: c["status"] for name, c in summary["components"].items()} == {
        "engine": "healthy",
        "cache": "degraded",
        "tiers": "degraded",
        "store": "healthy",
        "isolation": "healthy",
    }
    one = gateway.http.get("/admin/health?component=engine").json()
    assert (one["status"], list(one["components"])) == ("healthy", ["engine"])
    assert error_of(gateway.http.get("/admin/health?component=database")) == (400, "invalid_request")


def test_the_doctor_proves_isolation_and_names_a_leak(engine: FakeEngine, gateway: Gateway) -> None:
    fine = gateway.http.post("/admin/doctor").json()
    assert fine["ok"] is True
    assert {check["name"]: check["status"] for check in fine["checks"]} == {
        "engine": "ok",
        "cache": "warning",
        "cached_tokens": "ok",
        "isolation": "ok",
        "store": "ok",
        "windows": "ok",
    }
    engine.leaks_salts = True
    leaking = gateway.http.post("/admin/doctor").json()
    assert leaking["ok"] is False
    assert next(c for c in leaking["checks"] if c["name"] == "isolation")["status"] == "failed"
    assert (gateway.http.get("/readyz").status_code, gateway.http.get("/admin/health").json()["status"]) == (
        503,
        "unhealthy",
    )
    engine.leaks_salts = False
    assert gateway.http.post("/admin/doctor").json()["ok"] is True
    assert gateway.http.get("/readyz").status_code == 200

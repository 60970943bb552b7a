"""The admin API: freezing, thawing, cloning and deleting windows."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.admin_requests import error_of, freeze
from tests.support.conversations import without_turns
from tests.support.fakes.engine import WITHIN, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient


def test_freeze_without_a_cache_keeps_the_text_and_warns(gateway: Gateway, session: str) -> None:
    window = freeze(gateway, session, f"w-{session}", description="d", tags=["a", "b", "a"], ttl_seconds=3600)
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
    messages = without_turns(gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"])
    assert messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there!"}]
    assert gateway.http.get(f"/admin/sessions/{session}").json()["state"] == "frozen"


def test_a_continued_session_is_frozen_again_and_its_first_window_stays(gateway: Gateway, session: str) -> None:
    first = freeze(gateway, session, f"{session}-1")
    again = gateway.chat(session, "more").status_code
    second = gateway.freeze(session, f"{session}-2").json()
    assert again == 200
    assert gateway.http.get(f"/admin/windows/{session}-1").json()["token_count"] == first["token_count"]
    assert second["session_id"] == session
    assert gateway.http.get(f"/admin/windows?session_id={session}").json()["total"] == 2


def test_a_thawed_session_prepends_the_window_and_keeps_its_salt(
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
def test_a_long_name_works_with_every_operation(gateway: Gateway, session: str, length: int) -> None:
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
    freeze(gateway, session, f"w-{session}", description="first", tags=["t"], ttl_seconds=3600)
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


def test_a_window_that_reuses_its_deleted_parents_name_is_not_its_own_ancestor(
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
    assert later["parent_window"] is None  # its window is gone; the one that has the name now is unrelated
    assert gateway.http.get(f"/admin/windows/{name}?include_lineage=true").json()["lineage"]["clones"] == []


def test_a_deleted_window_is_gone_from_every_operation(gateway: Gateway, session: str) -> None:
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
    release = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="x"))
        release.wait(WITHIN)
        exchange.chunk(b"data: [DONE]\n\n")
        exchange.end()

    engine.on_chat = answer
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        busy = gateway.freeze(session, f"w-{session}")
        assert error_of(busy) == (409, "session_busy")
        assert busy.json()["error"]["retryable"] is True
        release.set()
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

"""The admin API: lists, their pages and filters."""

from pathlib import Path

import pytest

from tests.support.admin_requests import error_of, freeze
from tests.support.cli import cwg
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of


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
        f"search={'x' * 10_001}",
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


def test_sessions_and_windows_have_a_title_everywhere(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat("s", "What is\tthis? " + "x" * 100)
        title = "What is this? " + "x" * 65 + "…"
        assert gateway.freeze("s", "w").json()["title"] == title
        for path in ("sessions/s", "windows/w"):
            assert gateway.http.get(f"/admin/{path}").json()["title"] == title
        for path, rows in (("sessions", "sessions"), ("windows", "windows"), ("tree", "nodes")):
            assert {row["title"] for row in gateway.http.get(f"/admin/{path}").json()[rows]} == {title}
        gateway.http.post("/admin/windows/w/thaw", json={"new_session_id": "thawed"})
        assert gateway.http.get("/admin/sessions/thawed").json()["title"] == title
        cloned = gateway.http.post("/admin/windows/w/clone", json={"target_window": "copy", "isolate": True})
        assert cloned.json()["title"] == title


def test_text_of_a_session_can_be_read(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat("s:1", "hello")
        gateway.freeze("s:1", "w")
        answer = gateway.http.get("/admin/sessions/s:1/messages").json()
        assert answer.pop("session_id") == "s:1"
        assert answer["messages"][0]["content"] == "hello"
        of_window = gateway.http.get("/admin/windows/w/messages").json()
        assert answer == {name: of_window[name] for name in ("messages", "turns", "frame")}
        missing = gateway.http.get("/admin/sessions/none/messages")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "session_not_found")
        shown = cwg("session", "messages", "s:1", url=gateway.url).stdout
        assert shown.startswith("--- turn 1\nuser: hello\nassistant: ")

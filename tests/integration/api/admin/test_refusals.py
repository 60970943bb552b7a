"""The admin API: what it refuses and how; health and the doctor."""

from typing import Any

import pytest

from tests.support.admin_requests import error_of, freeze
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway

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
def test_a_bad_window_name_is_refused_by_every_operation(gateway: Gateway, session: str, name: Any) -> None:
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
def test_a_bad_session_id_is_refused_by_every_operation(gateway: Gateway, name: Any) -> None:
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
def test_a_body_that_the_operation_does_not_take_is_refused(gateway: Gateway, body: bytes, code: str) -> None:
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
        "/ui/",
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
def test_an_unknown_path_is_a_404_in_the_same_shape(gateway: Gateway, path: str) -> None:
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
    assert (fine["ok"], fine["keeps_kv"]) == (False, False)  # nothing failed, but there is no cache
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
    left = gateway.http.post("/admin/doctor").json()["checks"]
    assert [check for check in left if check["status"] == "failed"] == []
    assert gateway.http.get("/readyz").status_code == 200

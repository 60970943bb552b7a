"""One key for every API: required, compared whole, and never forwarded."""

import hmac
import inspect
from collections.abc import Iterator

import pytest

from gateway.api import auth
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of

KEY = "correct-horse-battery"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def guarded(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a key, in front of an engine with another."""
    with gateway_in_front_of(
        shared_engine.url, tmp_path_factory.mktemp("guarded"), api_key=KEY, engine_api_key="engine-key"
    ) as gateway:
        del gateway.http.headers["x-api-key"]
        yield gateway


DOORS = [
    ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"), ("POST", "/s/a/v1/messages"),
    ("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/demo"),
    ("GET", "/v1/anything"),
    ("POST", f"/s/a{CHAT}"), ("GET", "/s/a/v1/models/demo"), ("GET", "/admin/sessions"), ("GET", "/admin/sessions/a"),
    ("DELETE", "/admin/sessions/a"), ("GET", "/admin/windows"), ("POST", "/admin/windows"), ("GET", "/admin/windows/a"),
    ("DELETE", "/admin/windows/a"), ("POST", "/admin/windows/a/thaw"), ("POST", "/admin/windows/a/clone"),
    ("GET", "/admin/windows/a/messages"), ("GET", "/admin/health"), ("POST", "/admin/doctor"),
    ("POST", "/mcp"), ("GET", "/mcp"),
]  # fmt: skip

WRONG = [
    {}, {"authorization": KEY[:-1]}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"},
    {"x-api-key": ""}, {"x-api-key": KEY.upper()}, {"api-key": KEY}, {"authorization": f"Bearer{KEY}"}, {"cookie": KEY},
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), DOORS)
def test_every_api_refuses_a_request_without_the_right_key(
    engine: FakeEngine, guarded: Gateway, method: str, path: str
) -> None:
    for headers in WRONG:
        response = guarded.http.request(method, path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
        assert KEY not in response.text
    assert [request.target for request in engine.asked] == []


@pytest.mark.parametrize(("method", "path"), DOORS)
def test_without_a_key_a_host_name_that_may_have_an_owner_is_refused(
    engine: FakeEngine, gateway: Gateway, method: str, path: str
) -> None:
    for host in ("evil.example", "Evil.example.:8700", "127.0.0.1.evil.example", "box.internal.evil.example", "[::1"):
        response = gateway.http.request(method, path, headers={"host": host, "origin": f"http://{host}"})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
        assert "CWG_API_KEY" in response.text
    assert [request.target for request in engine.asked] == []


def test_ownerless_host_names_need_no_key_and_others_do(gateway: Gateway, guarded: Gateway) -> None:
    for host in (
        "127.0.0.1:8700",
        "[::1]:8700",
        "192.0.2.7",
        "localhost",
        "LocalHost.:8700",
        "box",
        "box.local",
        "host.docker.internal",
    ):
        assert gateway.http.get("/admin/sessions", headers={"host": host}).status_code == 200, host
    headers = {"host": "gateway.example", "x-api-key": KEY}
    assert guarded.http.get("/admin/sessions", headers=headers).status_code == 200


def test_a_key_in_the_query_or_the_body_does_not_count(guarded: Gateway) -> None:
    assert guarded.http.get(f"/admin/sessions?api_key={KEY}").status_code == 401
    assert guarded.http.post(CHAT, json={"api_key": KEY}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY}"},
        {"x-api-key": KEY},
        {"authorization": KEY},
    ],
)
def test_every_api_accepts_the_right_key_in_each_spelling(guarded: Gateway, headers: dict[str, str]) -> None:
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200
    assert guarded.http.get("/admin/sessions", headers=headers).status_code == 200


def test_the_engine_sees_its_own_key_and_never_the_clients(engine: FakeEngine, guarded: Gateway, session: str) -> None:
    guarded.chat(session, headers={"authorization": f"Bearer {KEY}"})
    guarded.http.get("/v1/models/some", headers={"x-api-key": KEY, "authorization": "Bearer other"})
    guarded.http.post("/admin/windows", json={"session_id": session, "window_name": "w"}, headers={"x-api-key": KEY})
    for request in engine.requests:
        assert request.header("authorization") == ["Bearer engine-key"]
        assert KEY not in repr(request)


def test_the_key_is_in_no_log_and_in_no_file(guarded: Gateway, session: str) -> None:
    guarded.chat(session, headers={"authorization": f"Bearer {KEY}"})
    guarded.http.get("/admin/sessions/none", headers={"x-api-key": KEY})
    guarded.http.get("/admin/sessions", headers={"x-api-key": f"{KEY}-wrong"})
    assert KEY not in guarded.log
    for path in guarded.data_dir.rglob("*"):
        assert KEY.encode() not in path.read_bytes()


def test_liveness_and_readiness_need_no_key(guarded: Gateway) -> None:
    assert guarded.http.get("/healthz").json() == {"status": "ok"}
    assert guarded.http.get("/readyz").json() == {"status": "ready"}


def test_without_a_key_of_its_own_the_gateway_hands_on_the_clients(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session, headers={"authorization": "Bearer engines-own"})
    assert engine.seen(CHAT)[0].header("authorization") == ["Bearer engines-own"]


def test_keys_are_compared_in_constant_time() -> None:
    """No test can time it."""
    lines = inspect.getsource(auth.tenant).splitlines()
    (comparison,) = [line for line in lines if "wanted" in line and "wanted =" not in line]
    assert "hmac.compare_digest(_bare(value), wanted)" in comparison
    assert auth.hmac is hmac

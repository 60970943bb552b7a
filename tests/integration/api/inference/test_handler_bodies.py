"""The inference API: bodies that are odd, and settings that change the salt."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_requests import BODY, CHAT, salts
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of

TYPE = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model":"\xff"}', "not JSON"),
        (b'{"temperature":NaN}', "not JSON"),
        (b'{"temperature":Infinity}', "not JSON"),
        (b"[]", "not an object"),
        (b'"x"', "not an object"),
        (b"1", "not an object"),
        (b"null", "not an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"{}{}", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_a_body_other_than_a_json_object_is_an_openai_error(
    engine: FakeEngine, gateway: Gateway, body: bytes, says: str
) -> None:
    response = gateway.http.post(CHAT, content=body, headers=TYPE)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, "invalid_request", "invalid_request_error")
    assert says in error["message"]
    assert engine.seen(CHAT) == []


@pytest.mark.parametrize("depth", [100, 250, 300, 1000])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_deeply_nested_body_is_refused_and_never_a_failure(
    engine: FakeEngine, gateway: Gateway, session: str, path: str, depth: int
) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    body = b'{"model":"demo","messages":[{"role":"user","content":"hi"}],"prompt":[1],"metadata":%s}' % deep
    response = gateway.http.post(path, content=body, headers={"x-session-id": session, **TYPE})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_complex"


def test_a_duplicate_field_means_the_same_to_engine_and_gateway(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    body = (
        b'{"model":"demo","cache_salt":"a","messages":[],"messages":[{"role":"user","content":"hi"}],"cache_salt":"b"}'
    )
    gateway.http.post(CHAT, content=body, headers={"x-session-id": session, **TYPE})
    (request,) = engine.seen(CHAT)
    assert request.body.count(b'"cache_salt"') == request.body.count(b'"messages"') == 1
    gateway.chat(session, cache_salt="b")
    assert len(set(salts(engine))) == 1


@pytest.mark.parametrize("number", ["18446744073709551616", "123456789012345678901234567890", "-9223372036854775809"])
def test_a_number_too_large_for_64_bits_is_not_changed_on_its_way(
    engine: FakeEngine, gateway: Gateway, session: str, number: str
) -> None:
    body = b'{"model":"demo","messages":[{"role":"user","content":"hi"}],"tools":[{"maximum":%s}]}' % number.encode()
    response = gateway.http.post(CHAT, content=body, headers={"x-session-id": session, **TYPE})
    assert response.status_code == 400 or f'"maximum":{number}'.encode() in engine.seen(CHAT)[0].body


def test_a_body_the_engine_would_refuse_is_left_to_the_engine(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    refusal = {"error": {"message": "bad messages", "code": 400}}
    engine.on_chat = lambda exchange: exchange.json(refusal, 400)
    for messages in (None, [], "x", [1], [None], {"role": "user"}):
        response = gateway.http.post(
            CHAT, json={"model": MODEL, "messages": messages}, headers={"x-session-id": session}
        )
        assert (response.status_code, response.json()) == (400, refusal)
    for model in (None, 7, "unknown", ["x"]):
        assert gateway.http.post(CHAT, json={**BODY, "model": model}).status_code == 400


def test_a_body_that_is_not_json_passes_through_untouched(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_other = lambda exchange: exchange.json({"size": len(exchange.request.body)})
    form = b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n\x00\xff{"cache_salt":1}\r\n--x--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert gateway.http.post("/v1/audio/transcriptions", content=form, headers=headers).json() == {"size": len(form)}
    (request,) = engine.seen("/v1/audio/transcriptions")
    assert request.body == form
    assert request.header("content-type") == ["multipart/form-data; boundary=x"]


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 5, "completion_tokens": "many"},
        {"prompt_tokens": 5, "completion_tokens": {}},
        {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": [1]}},
        {"prompt_tokens": 2**63, "completion_tokens": 1},
        {"prompt_tokens": 5, "prompt_tokens_details": "none"},
        [1],
        "x",
        {"prompt_tokens": True},
    ],
)
def test_an_odd_usage_costs_no_turn(engine: FakeEngine, gateway: Gateway, session: str, usage: Any) -> None:
    engine.on_chat = lambda exchange: exchange.json({"choices": [{"message": {"content": "x"}}], "usage": usage})
    assert gateway.chat(session).status_code == 200
    assert len(gateway.turns(session)) == 1


def test_models_and_other_endpoints_pass_through_with_query(engine: FakeEngine, gateway: Gateway) -> None:
    assert gateway.http.get("/v1/models").json()["data"][0]["id"] == MODEL
    engine.on_other = lambda exchange: exchange.json(
        {"target": exchange.request.target, "method": exchange.request.method}
    )
    answer = gateway.http.get("/v1/models/some%20thing?a=%2F&b").json()
    assert answer == {"target": "/v1/models/some%20thing?a=%2F&b", "method": "GET"}


def test_a_salt_is_another_one_under_another_secret(
    engine: FakeEngine, gateway: Gateway, tmp_path: Path, session: str
) -> None:
    gateway.chat(session)
    with gateway_in_front_of(engine.url, tmp_path) as other:
        other.chat(session)
    one, two = salts(engine)
    assert one != two


def test_a_salt_is_another_one_for_other_weights(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    for weights in ("one", "two", "one"):
        with gateway_in_front_of(engine.url, tmp_path, model_fingerprint=weights) as gateway:
            gateway.chat(session)
    one, two, again = salts(engine)
    assert one == again != two


def test_isolation_by_tenant_gives_all_sessions_one_salt(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, isolation="tenant") as gateway:
        for name in ("a", "b"):
            gateway.chat(name)
    one, two = salts(engine)
    assert one == two


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_a_models_name_that_is_too_long_is_refused_before_the_engine_is_asked(
    engine: FakeEngine, gateway: Gateway, session: str, path: str
) -> None:
    for length, status in ((500, 200), (501, 400), (100_000, 400)):
        engine.on_other = lambda exchange: exchange.json({"data": []})
        body = {**BODY, "prompt": "x", "input": "x", "model": "m" * length}
        answer = gateway.http.post(path, json=body, headers={"x-session-id": session})
        assert (answer.status_code == 400) == (status == 400)
        assert status == 200 or f"model has {length} characters; the name of a model has at most 500" in answer.text
    assert len(engine.seen(path)) == 1


def refusing(exchange: Exchange) -> None:
    """As vLLM answers where it does not serve the model."""
    message = f"The model `{exchange.request.json['model']}` does not exist." * 100
    exchange.json({"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}}, 404)


def test_a_session_whose_only_request_was_refused_is_not_listed(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_chat = refusing
    gateway.chat(session, model="[/x]\x1b[2J")
    (turn,) = gateway.turns(session)
    assert (turn["outcome"], turn["status"]) == ("engine_error", 404)
    seen = gateway.http.get(f"/admin/sessions/{session}").json()
    assert (seen["model"], turn["model"], seen["turn_count"]) == ("", "", 0)
    assert len(turn["detail"]) <= 1000
    listed = [one["id"] for one in gateway.http.get("/admin/sessions?limit=100").json()["sessions"]]
    assert session not in listed
    engine.reset()
    gateway.chat(session)
    gateway.turns(session, 2)
    sessions = gateway.http.get("/admin/sessions?limit=100").json()["sessions"]
    (listed_now,) = (one for one in sessions if one["id"] == session)
    assert (listed_now["model"], listed_now["turn_count"]) == (MODEL, 1)


def test_a_session_that_is_refused_later_keeps_its_model(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    engine.on_chat = refusing
    gateway.chat(session, model="other")
    gateway.turns(session, 2)
    assert gateway.http.get(f"/admin/sessions/{session}").json()["model"] == MODEL


def test_a_first_turn_that_the_client_left_is_in_the_list(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    def hang(exchange: Exchange) -> None:
        exchange.begin()
        exchange.gone()

    engine.on_chat = hang
    with gateway.http.stream("POST", CHAT, json={**BODY, "stream": True}, headers={"x-session-id": session}):
        engine.wait_seen(CHAT)
    assert gateway.turns(session)[0]["outcome"] == "client_gone"
    assert session in [one["id"] for one in gateway.http.get("/admin/sessions?limit=100").json()["sessions"]]

"""The inference door: sessions by header and URL, salts, what a client may not send, and paths that try to get past."""

import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.fakes.engine import MODEL, Exchange, FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

CHAT = "/v1/chat/completions"
TYPE = {"content-type": "application/json"}
JSON = b"content-type: application/json\r\n"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": HI}


def salts(engine: FakeEngine, path: str = CHAT) -> list[Any]:
    """The salt of every request that the engine saw on a path."""
    return [request.json.get("cache_salt") for request in engine.seen(path)]


# --- sessions


def test_turns_of_a_session_share_a_salt_and_another_session_has_another(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    for name in (session, session, f"{session}-b"):
        gateway.chat(name)
    mine, again, theirs = salts(engine)
    assert mine == again != theirs
    assert len(mine) == len(theirs) == 32
    assert set(mine + theirs) <= set("0123456789abcdef")


def test_a_session_in_the_url_is_the_one_in_the_header_and_needs_no_header(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    response = gateway.http.post(f"/s/{session}{CHAT}", json=BODY, headers={"x-session-id": "ignored"})
    assert response.headers["x-session-id"] == session
    one, other = engine.seen(CHAT)
    assert one.json["cache_salt"] == other.json["cache_salt"]
    assert other.target == CHAT


def test_a_request_without_a_session_gets_one_of_its_own(engine: FakeEngine, gateway: Gateway) -> None:
    ids = [gateway.http.post(CHAT, json=BODY).headers["x-session-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert len(set(salts(engine))) == 2
    assert [len(gateway.turns(name)) for name in ids] == [1, 1]


BAD_IDS = ["", " ", "a b", "a/b", "-a", ".a", "a" * 129, "é", "a\tb", "a@b", "..", "a%0ab", "\u0430", "a\u200b", "🎉"]


@pytest.mark.parametrize("name", BAD_IDS)
def test_a_bad_session_id_is_refused_in_header_and_url_and_never_reaches_the_engine(
    engine: FakeEngine, gateway: Gateway, name: str
) -> None:
    body = json.dumps(BODY).encode()
    in_header = b"POST %s HTTP/1.1\r\nx-session-id: %s" % (CHAT.encode(), name.encode())
    in_url = b"POST /s/%s%s HTTP/1.1" % (quote(name, safe="").encode(), CHAT.encode())
    for start in (in_header, in_url):
        with RawHttpClient(gateway.url) as wire:
            wire.send(b"%s\r\nhost: x\r\n%scontent-length: %d\r\n\r\n%s" % (start, JSON, len(body), body))
            assert (wire.head(), wire.json()["error"]["code"]) == (400, "invalid_session_id")
    assert engine.seen(CHAT) == []


@pytest.mark.parametrize("name", ["a", "A" * 128, "a.b_c:d-e", "0"])
def test_a_good_session_id_is_answered_back(gateway: Gateway, name: str) -> None:
    assert gateway.chat(name).headers["x-session-id"] == name


def test_context_tokens_tell_what_was_known_before_the_turn(gateway: Gateway, session: str) -> None:
    first = gateway.chat(session)
    assert (first.headers["x-context-tokens"], first.headers["x-context-limit"]) == ("0", "4096")
    usage = first.json()["usage"]
    gateway.turns(session)
    second = gateway.chat(session)
    assert int(second.headers["x-context-tokens"]) == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_reply_without_usage_does_not_make_the_known_tokens_forgotten(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    gateway.turns(session)
    known = gateway.http.get(f"/admin/sessions/{session}").json()["token_count"]
    assert known > 0
    engine.on_chat = lambda exchange: exchange.json({"choices": [{"index": 0, "message": {"content": "x"}}]})
    gateway.chat(session)
    gateway.turns(session, 2)
    assert gateway.http.get(f"/admin/sessions/{session}").json()["token_count"] >= known


def test_the_first_requests_of_a_session_agree_on_the_salt_while_the_model_is_still_asked_for(
    tmp_path: Path, session: str
) -> None:
    engine = FakeEngine().start()
    asked, go_on = threading.Event(), threading.Event()

    def slow_models(exchange: Exchange) -> None:
        asked.set()
        go_on.wait(10)
        engine._models(exchange)

    engine.on_models = slow_models
    gateway = Gateway(tmp_path, engine.url)
    try:
        gateway.start().wait("/healthz")
        with RawHttpClient(gateway.url) as one, RawHttpClient(gateway.url) as other:
            one.chat(session)
            assert asked.wait(5)
            other.chat(session)
            # The second may not go ahead without knowing the model; give it the time to do so wrongly.
            threading.Event().wait(0.3)
            go_on.set()
            assert one.head() == other.head() == 200
        first, second = salts(engine)
        gateway.chat(session)
        assert [first, second] == [salts(engine)[2]] * 2
    finally:
        go_on.set()
        gateway.close()
        engine.stop()


# --- what a client may not send

PRIVATE: dict[str, Any] = {
    "cache_salt": "mine",
    "kv_transfer_params": {"prompt_token_ids": [1]},
    "priority": -1000,
    "session_id": "other",
    "vllm_xargs": {"kv_transfer_params": {"a": 1}, "cache_salt": "x", "priority": 1, "kept": 1},
}


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/chat/completions/batch",
        "/v1/rerank",
    ],
)
def test_private_fields_never_reach_the_engine_and_everything_else_does(
    engine: FakeEngine, gateway: Gateway, session: str, path: str
) -> None:
    body = {**BODY, "prompt": "x", "input": "x", **PRIVATE, "unknown": {"deep": [1, {"cache_salt": "a value"}]}}
    gateway.http.post(path, json=body, headers={"x-session-id": session, "x-vllm-priority": "-5"})
    (request,) = engine.seen(path)
    sent = request.json
    assert sent.get("cache_salt") != "mine"
    assert sent["vllm_xargs"] == {"kept": 1}
    assert not {"kv_transfer_params", "priority", "session_id"} & sent.keys()
    assert request.header("x-vllm-priority") == []
    assert sent["unknown"] == {"deep": [1, {"cache_salt": "a value"}]}


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/chat/completions/batch",
        "/v1/rerank",
        "/v1/score",
        "/v1/systemone",
    ],
)
def test_every_endpoint_that_leaves_kv_behind_is_salted_by_session(
    engine: FakeEngine, gateway: Gateway, session: str, path: str
) -> None:
    body = {**BODY, "prompt": "x", "input": "x"}
    for name in (session, session, f"{session}-b"):
        gateway.http.post(path, json=body, headers={"x-session-id": name})
    gateway.http.post(path, json={**body, "cache_salt": "alice"}, headers={"x-session-id": session})
    mine, again, theirs, alice = salts(engine, path)
    assert mine
    assert mine == again
    assert len({mine, theirs, alice}) == 3


def test_a_clients_own_salt_still_separates_but_is_not_sent(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    for own in (None, "alice", "bob", "alice", "", 7, ["x"], {"a": 1}):
        gateway.chat(session, cache_salt=own)
    none, alice, bob, again, empty, *odd = salts(engine)
    assert alice == again
    assert len({none, alice, bob, *odd}) == 6
    assert empty in (none, salts(engine)[4])
    assert all(isinstance(salt, str) and len(salt) == 32 for salt in salts(engine))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat%2Fcompletions",
        "/v1/%63hat/completions",
        "/v1/chat/completion%73",
        "/v1%2Fchat/completions",
        "/%76%31/chat/completions",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/v1/./chat/completions",
        "/v1/x/../chat/completions",
        "/v1/x/%2e%2e/chat/completions",
        "/v1/../v1/chat/completions",
        "//v1/chat/completions",
        "/v1/chat/completions;x=1",
        "/v1/chat/completions%3f",
        "/v1\\chat\\completions",
    ],
)
def test_no_spelling_of_the_path_brings_a_completion_past_the_salt(
    engine: FakeEngine, gateway: Gateway, session: str, path: str
) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.post(path, json.dumps(BODY).encode(), f"x-session-id: {session}", "content-type: application/json")
        wire.head()
    routed = {CHAT, CHAT + "/"}  # Starlette answers the second with a redirect to its own address
    assert [
        request.target for request in engine.requests if request.path in routed and not request.json.get("cache_salt")
    ] == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/../admin/windows", "not_found"),
        ("/v1/%2e%2e/metrics", "not_found"),
        ("/v1/..%2fmetrics", "not_found"),
        ("/v1/x/%2E./y", "not_found"),
        ("/s/a/metrics", "not_found"),
        ("/s/a/v2/x", "not_found"),
        ("/s/a", "not_found"),
        ("/s/a/", "not_found"),
        ("/s/a/v1", "not_found"),
        ("/s//v1/models", "invalid_session_id"),
        ("/s/a%2Fb/v1/models", "invalid_session_id"),
        ("/s/%2e%2e/v1/models", "invalid_session_id"),
        ("/s/a/../v1/models", "not_found"),
        ("/s/a/s/b/v1/models", "not_found"),
        ("/v1", "not_found"),
        ("/metricsx", "not_found"),
        ("/healthx", "not_found"),
        ("/tokenizex", "not_found"),
        ("/tokenize/x", "not_found"),
        ("/s/a/tokenizex", "not_found"),
    ],
)
def test_a_path_outside_the_api_never_reaches_the_engine(
    engine: FakeEngine, gateway: Gateway, path: str, code: str
) -> None:
    engine.on_other = lambda exchange: exchange.json({"reached": exchange.request.target})
    with RawHttpClient(gateway.url) as wire:
        wire.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        status, body = wire.head(), wire.json()
    assert status in (400, 404)
    assert body["error"]["code"] == code


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/load"])
def test_what_load_generators_ask_before_they_start_is_answered_by_the_engine(
    engine: FakeEngine, gateway: Gateway, path: str
) -> None:
    engine.on_health = engine.on_other = lambda exchange: exchange.json({"reached": exchange.request.target})
    assert gateway.http.get(path).json() == {"reached": path}


@pytest.mark.parametrize(
    ("evil", "status"),
    [(b"a\r\n b", 400), (b"a\nx-injected: 1", 400), (b"a\rx-injected: 1", 400), (b"a\0b", 400), (b"a\tb", 200)],
)
def test_a_header_cannot_carry_another_header(engine: FakeEngine, gateway: Gateway, evil: bytes, status: int) -> None:
    body = json.dumps(BODY).encode()
    with RawHttpClient(gateway.url) as wire:
        wire.send(
            b"POST %s HTTP/1.1\r\nhost: x\r\n%sx-evil: %s\r\ncontent-length: %d\r\n\r\n%s"
            % (CHAT.encode(), JSON, evil, len(body), body)
        )
        assert wire.head() == status
    assert [request.header("x-evil") for request in engine.seen(CHAT)] == [["a\tb"]] * (status == 200)
    assert [name for request in engine.requests for name, _ in request.headers if name == "x-injected"] == []


def test_two_lengths_are_refused_and_never_smuggled(engine: FakeEngine, gateway: Gateway) -> None:
    inner = b"GET /v1/models/evil HTTP/1.1\r\nhost: x\r\n\r\n"
    for headers in (
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"content-length: 5\r\ncontent-length: 50",
        b"content-length: +5",
        b"transfer-encoding: identity, chunked\r\ncontent-length: 5",
        b"transfer-encoding : chunked",
    ):
        with RawHttpClient(gateway.url) as wire:
            wire.send(b"POST /v1/audio/translations HTTP/1.1\r\nhost: x\r\n%s\r\n\r\n0\r\n\r\n%s" % (headers, inner))
            assert wire.head() == 400
            wire.rest()
    assert engine.seen("/v1/models/evil") == []
    assert engine.seen("/v1/audio/translations") == []


# --- bodies


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
def test_a_body_that_is_no_json_object_is_refused_in_the_shape_of_openai(
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


def test_a_name_that_comes_twice_means_to_the_engine_what_it_means_to_the_gateway(
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


# --- the rest of the door


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


# --- names of models


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


def test_a_session_whose_only_request_was_refused_is_in_no_list_and_keeps_nothing_of_what_was_sent(
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
    first = gateway.http.get("/admin/sessions?limit=1").json()["sessions"][0]
    assert (first["id"], first["model"], first["turn_count"]) == (session, MODEL, 1)


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

"""The inference API: sessions, salts, and paths."""

import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.chat_requests import BODY, CHAT, salts
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.gateway_process import Gateway
from tests.support.raw_http import RawHttpClient

JSON = b"content-type: application/json\r\n"


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
def test_a_bad_session_id_is_refused_in_header_and_url(engine: FakeEngine, gateway: Gateway, name: str) -> None:
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


def test_first_requests_of_a_session_share_a_salt_while_the_model_is_fetched(tmp_path: Path, session: str) -> None:
    engine = FakeEngine().start()
    asked, release = threading.Event(), threading.Event()

    def slow_models(exchange: Exchange) -> None:
        asked.set()
        release.wait(10)
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
            release.set()
            assert one.head() == other.head() == 200
        first, second = salts(engine)
        gateway.chat(session)
        assert [first, second] == [salts(engine)[2]] * 2
    finally:
        release.set()
        gateway.close()
        engine.stop()


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

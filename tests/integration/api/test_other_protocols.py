"""Other protocols than HTTP/1.1, and requests that are only passed through."""

import http.client
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.chat_apis import APIS, TYPE, Api, apis
from tests.support.fakes import engine as fake
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

UPGRADE = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"


@pytest.mark.parametrize(
    "start",
    [
        f"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n",
        f"GET /v1/models/demo HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n",
        f"GET /admin/windows HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n",
        f"GET /s/a/v1/responses HTTP/1.1\r\nHost: x\r\n{UPGRADE.replace('websocket', 'h2c, WebSocket')}\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{UPGRADE}Content-Length: 2\r\n\r\n{{}}",
        "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
    ],
)
def test_a_websocket_or_a_tunnel_is_refused_in_words_and_reaches_no_engine(
    engine: FakeEngine, gateway: Gateway, start: str
) -> None:
    for pieces in ([start.encode()], [start.encode()[:20], start.encode()[20:]]):
        with RawHttpClient(gateway.url) as wire:
            for piece in pieces:
                wire.send(piece)
            assert wire.head() == 400
            assert wire.headers["connection"] == "close"
            error = wire.json()["error"]
            assert wire.rest() == b""
        assert error["code"] == "invalid_request"
        assert "HTTP/1.1 only" in error["message"]
        assert "stream" in error["hint"]
    assert engine.asked == []


@pytest.mark.parametrize(
    "start",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40,
        b"hello\r\n\r\n",
    ],
)
def test_other_http_versions_are_refused_by_name(engine: FakeEngine, gateway: Gateway, start: bytes) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.send(start)
        assert wire.head() == 400
        error = wire.json()["error"]
        assert wire.rest() == b""
    assert error["code"] == "invalid_request"
    assert "HTTP/1.1" in error["message"]


def test_garbage_sent_during_a_stream_closes_it_without_an_answer(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_chat = lambda exchange: (exchange.begin(), exchange.chunk(delta(content="Hel")), exchange.gone())[0]
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert wire.chunk() == delta(content="Hel")
        wire.send(b"nonsense\r\n\r\n")
        assert wire.rest() == b""
    assert [turn["outcome"] for turn in gateway.turns(session)] == ["client_gone"]


H2C = [
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    TYPE,
    "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
]


@apis
@pytest.mark.parametrize("cut", [0, 1, 10, 200])
def test_a_wish_for_h2c_is_ignored_and_the_request_is_what_it_is(
    engine: FakeEngine, gateway: Gateway, session: str, api: Api, cut: int
) -> None:
    body = json.dumps({"model": MODEL, **api.body}).encode()
    head = [f"POST {api.path} HTTP/1.1", "Host: x", f"X-Session-ID: {session}", *H2C, f"Content-Length: {len(body)}"]
    whole = "\r\n".join([*head, "", ""]).encode() + body
    with RawHttpClient(gateway.url) as wire:
        for _ in range(2):  # the second is on the same connection
            for piece in (whole[:-cut], whole[-cut:]) if cut else (whole,):
                wire.send(piece)
                threading.Event().wait(0.02)
            assert wire.head() == 200
            assert wire.json()["choices"]
        wire.send(whole + whole)
        for _ in range(2):
            assert wire.head() == 200
            wire.json()
    seen = engine.seen(api.path)
    assert [{**r.json, "cache_salt": ""} for r in seen] == [{"model": MODEL, **api.body, "cache_salt": ""}] * 4
    assert {name for r in seen for name, _ in r.headers} & {"upgrade", "http2-settings", "connection"} == set()
    assert len(gateway.turns(session, 4)) == 4


def test_a_wish_for_h2c_in_a_chunked_body_is_ignored(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    address = urlsplit(gateway.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=fake.WITHIN)
    headers = {"connection": "upgrade", "upgrade": "h2c", "x-session-id": session, "content-type": "application/json"}
    body = json.dumps({"model": MODEL, **APIS[0].body}).encode()
    connection.request("POST", APIS[0].path, iter([body[:9], body[9:]]), headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["choices"]
    connection.close()


def test_an_upgrade_header_without_connection_upgrade_is_ignored(gateway: Gateway) -> None:
    assert gateway.http.get("/v1/models", headers={"upgrade": "websocket"}).status_code == 200
    assert gateway.http.get("/v1/models", headers={"connection": "upgrade"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"),
        ("POST", "/v1/score"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/s/a/v1/embeddings"),
        ("GET", "/v1/models/org%2Fdemo"),
        ("GET", "/v1/models/org%2Fdemo?limit=2"),
    ],
)
def test_what_else_the_engine_has_for_clients_passes_through(
    engine: FakeEngine, gateway: Gateway, method: str, path: str
) -> None:
    def echo(exchange: Exchange) -> None:
        exchange.json({"target": exchange.request.target, "body": exchange.request.body.decode()}, 203, ["x-odd: 1"])

    engine.on_other = engine.on_tokenize = echo
    body = b'{ "input" : "x", "prompt":"Once", "temperature": 0.10 }'
    sent: dict[str, Any] = (
        {"content": body, "headers": {"content-type": "application/json"}} if method == "POST" else {}
    )
    answer = gateway.http.request(method, path, **sent)
    assert (answer.status_code, answer.headers["x-odd"]) == (203, "1")
    assert answer.json()["target"] == path.removeprefix("/s/a")
    if method == "POST":
        assert answer.json()["body"].startswith(body[:-1].decode())


def test_models_and_tokenize_answer_as_the_engine_does(gateway: Gateway) -> None:
    assert gateway.http.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert gateway.http.post("/tokenize", json={"prompt": "abc"}).json()["tokens"] == list(b"abc")


def test_a_key_is_asked_for_at_tokenize_too(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="secret") as gateway:
        assert gateway.http.post("/tokenize", json={"prompt": "abc"}).status_code == 200
        answer = httpx.post(f"{gateway.url}/tokenize", json={"prompt": "abc"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")

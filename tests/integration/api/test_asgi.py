"""What a client may do with the body of a request: how much, how slowly, and in how many pieces."""

import json
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def strict(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with small limits."""
    folder = tmp_path_factory.mktemp("strict")
    with gateway_in_front_of(shared_engine.url, folder, max_body_bytes=1000, client_timeout_s=1) as gateway:
        yield gateway


def test_a_body_declared_too_large_is_refused_before_it_comes(engine: FakeEngine, strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.send(HEAD + b"content-length: 1001\r\n\r\n")
        assert (wire.head(), wire.json()["error"]["code"]) == (413, "payload_too_large")
    assert engine.seen(CHAT) == []


@pytest.mark.parametrize("size", [1001, 10_000, 60_000, 1_000_000])
@pytest.mark.parametrize("pieces", [1, 10])
def test_a_body_without_a_length_that_turns_out_too_large_is_refused(
    engine: FakeEngine, strict: Gateway, size: int, pieces: int
) -> None:
    body = BODY + b" " * (size - len(BODY))
    step = -(-len(body) // pieces)
    cut = [body[i : i + step] for i in range(0, len(body), step)]
    with RawHttpClient(strict.url) as wire:
        wire.send(CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in cut) + b"0\r\n\r\n")
        assert (wire.head(), wire.json()["error"]["code"]) == (413, "payload_too_large")
    assert engine.seen(CHAT) == []


def test_a_body_without_a_length_is_refused_before_it_ends(engine: FakeEngine, strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.send(CHUNKED + b"7d0\r\n" + b" " * 2000)
        assert (wire.head(), wire.json()["error"]["code"]) == (413, "payload_too_large")


def test_a_body_of_exactly_the_limit_is_taken(engine: FakeEngine, strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.post(CHAT, BODY + b" " * (1000 - len(BODY)))
        assert wire.head() == 200


def test_a_body_in_many_small_pieces_arrives_whole(engine: FakeEngine, strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.send(CHUNKED)
        for byte in BODY:
            wire.send(b"1\r\n%c\r\n" % byte)
        wire.send(b"0\r\n\r\n")
        assert wire.head() == 200
    assert engine.seen(CHAT)[0].json["messages"][0]["content"] == "hi"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/admin/windows"])
def test_a_body_that_does_not_come_is_given_up_in_time(strict: Gateway, path: str) -> None:
    with RawHttpClient(strict.url) as wire:
        clock = time.monotonic()
        wire.send(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
            % path.encode()
        )
        assert (wire.head(), wire.json()["error"]["code"]) == (408, "request_timeout")
        assert 0.9 < time.monotonic() - clock < 8


def test_a_client_that_leaves_within_its_body_reaches_no_engine(engine: FakeEngine, strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.send(HEAD + b"content-length: 500\r\n\r\n" + BODY)
    assert strict.chat("after").status_code == 200
    assert len(engine.seen(CHAT)) == 1
    assert "Traceback" not in strict.log


def test_the_admin_api_has_the_same_body_limit(strict: Gateway) -> None:
    response = strict.http.post("/admin/windows", content=b" " * 1001)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")


def test_headers_that_do_not_come_are_given_up_in_time(strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        clock = time.monotonic()
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        wire.rest()
        assert 0.9 < time.monotonic() - clock < 8


def test_headers_that_drip_are_given_up_in_time(strict: Gateway) -> None:
    drip = threading.Event()  # never set: the pace of a client that keeps a connection busy for ever
    with RawHttpClient(strict.url) as wire:
        clock = time.monotonic()
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")

        def proceed() -> None:
            while time.monotonic() - clock < 4:
                wire.send(b"x: y\r\n")
                drip.wait(0.1)

        with pytest.raises(OSError, match=r"reset|pipe"):
            proceed()


def test_headers_of_a_second_request_that_do_not_come_are_given_up_in_time(strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.head() == 200
        wire.body()
        clock = time.monotonic()
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        wire.rest()
        assert 0.9 < time.monotonic() - clock < 8


def test_headers_without_end_are_refused_before_they_fill_the_memory(gateway: Gateway) -> None:
    before = gateway.memory
    with RawHttpClient(gateway.url) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):
            wire.send(b"".join(b"x-%d: %s\r\n" % (number, b"y" * 32_768) for number in range(1000)))
    assert gateway.memory - before < 16 * 2**20


def test_a_client_that_expects_to_be_asked_for_its_body_is_asked(engine: FakeEngine, strict: Gateway) -> None:
    with RawHttpClient(strict.url) as wire:
        wire.send(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        assert wire.head() == 100
        wire.send(BODY)
        assert wire.head() == 200
    assert engine.seen(CHAT)[0].header("expect") == []


def test_requests_in_a_row_on_one_connection_are_answered_in_order(engine: FakeEngine, gateway: Gateway) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.head() == 200
        assert wire.json()["object"] == "list"
        assert wire.head() == 200
        assert wire.json() == {"status": "ok"}

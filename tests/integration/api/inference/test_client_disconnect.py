"""Clients that disconnect at odd moments: while the engine still sends, or at the last event of a stream."""

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from loadtests import scripted_replies as replies
from tests.support.conversations import without_turns
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.raw_http import RawHttpClient, reset_on_close

Events = Callable[[replies.Reply, Mapping[str, Any]], Iterator[bytes]]
_CLIENTS, _AT_ONCE = 60, 8

TYPE = "content-type: application/json\r\n"


def test_a_reset_in_mid_stream_is_a_client_that_left_and_no_error(engine: FakeEngine, tmp_path: Path) -> None:
    engine.on_chat = _send_without_end
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda number: _reset_in_mid_stream(gateway.url, f"reset-{number}"), range(_CLIENTS)))
        outcomes = {gateway.turns(f"reset-{number}")[0]["outcome"] for number in range(_CLIENTS)}
        log = gateway.log
    assert "ERROR" not in log, log
    assert outcomes == {"client_gone"}


_REPLY = replies.Reply("Hello there!", (), prompt_tokens=10, results=0)
_ASKED = [{"role": "user", "content": "hi"}]
_APIS = {
    "/v1/chat/completions": (replies.chat_events, {"messages": _ASKED}, b"data: [DONE]"),
    "/v1/responses": (replies.responses_events, {"input": "hi"}, b"response.completed"),
    "/v1/messages": (replies.messages_events, {"messages": _ASKED, "max_tokens": 9}, b"message_stop"),
}


@pytest.mark.parametrize("path", _APIS)
def test_a_client_that_leaves_at_the_last_event_has_had_its_answer(
    engine: FakeEngine, gateway: Gateway, session: str, path: str
) -> None:
    events, asked, last = _APIS[path]
    engine.on_chat = engine.on_other = lambda exchange: _stream_without_end(exchange, events)
    body = json.dumps({"model": MODEL, "stream": True, **asked}).encode()
    with RawHttpClient(gateway.url) as wire:
        wire.post(path, body, f"x-session-id: {session}")
        assert wire.head() == 200
        while last not in wire.chunk():
            pass
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "completed"
    engine.reset()
    frozen = gateway.freeze(session, f"w-{session}")
    assert frozen.status_code == 201, frozen.text
    messages = without_turns(gateway.http.get(f"/admin/windows/w-{session}/messages").json()["messages"])
    assert messages[-1] == {"role": "assistant", "content": "Hello there!"}


@pytest.mark.parametrize("path", _APIS)
def test_a_client_that_leaves_before_the_last_event_has_not(
    engine: FakeEngine, gateway: Gateway, session: str, path: str
) -> None:
    events, asked, _ = _APIS[path]
    engine.on_chat = engine.on_other = lambda exchange: _stream_without_end(exchange, events, leave_out=1)
    body = json.dumps({"model": MODEL, "stream": True, **asked}).encode()
    with RawHttpClient(gateway.url) as wire:
        wire.post(path, body, f"x-session-id: {session}")
        assert wire.head() == 200
        assert wire.chunk()
    (turn,) = gateway.turns(session)
    assert turn["outcome"] == "client_gone"


def _stream_without_end(exchange: Exchange, events: Events, leave_out: int = 0) -> None:
    """Send the events of a stream, but neither the last of them nor the end of the body."""
    exchange.begin()
    stream = list(events(_REPLY, exchange.request.json))
    for event in stream[: len(stream) - leave_out]:
        exchange.chunk(event)
    assert exchange.gone()


def _send_without_end(exchange: Exchange) -> None:
    exchange.over = True
    exchange.begin()
    with suppress(OSError):  # until the other end closes
        while True:
            exchange.chunk(delta(content="x"))


def _reset_in_mid_stream(url: str, session: str) -> None:
    address = urlsplit(url)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /s/{session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\n{TYPE}content-length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        sock.sendall(head.encode() + body)
        seen = b""
        while b"data: " not in seen:
            seen += sock.recv(4096)
        reset_on_close(sock)

"""Clients whose connection is reset while the engine goes on sending: nothing breaks, and nobody else is blamed."""

import json
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from tests.fakes.engine import MODEL, Exchange, FakeEngine, delta
from tests.running import gateway_before

_CLIENTS, _AT_ONCE = 60, 8
_AT_ONCE_CLOSED = struct.pack("ii", 1, 0)


def test_a_reset_in_mid_stream_is_a_client_that_left_and_no_error(engine: FakeEngine, tmp_path: Path) -> None:
    engine.on_chat = _send_without_end
    with gateway_before(engine.url, tmp_path) as gateway:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda number: _reset_in_mid_stream(gateway.url, f"reset-{number}"), range(_CLIENTS)))
        outcomes = {gateway.turns(f"reset-{number}")[0]["outcome"] for number in range(_CLIENTS)}
        log = gateway.log
    assert "ERROR" not in log, log
    assert outcomes == {"client_gone"}


def _send_without_end(exchange: Exchange) -> None:
    exchange.over = True
    exchange.begin()
    with suppress(OSError):  # until nobody listens
        while True:
            exchange.chunk(delta(content="x"))


def _reset_in_mid_stream(url: str, session: str) -> None:
    address = urlsplit(url)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /s/{session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        sock.sendall(head.encode() + body)
        seen = b""
        while b"data: " not in seen:
            seen += sock.recv(4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE_CLOSED)

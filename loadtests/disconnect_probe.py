"""Clients that disconnect before their response is complete, and the time until the engine stops working for them.

The engine's activity is read from its own metrics, not through the gateway.
"""

import itertools
import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.support.raw_http import reset_on_close

_GAUGES = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_BEGINS_WITHIN_S = 30.0
_STOPS_WITHIN_S = 30.0
# Words of a prompt that takes the engine a while, and of one that does not. vLLM aborts a request between two steps,
# and one step may compute a whole prompt: a much longer prompt would measure the duration of a step.
_LONG, _SHORT = 250, 1
REPLY_TOKENS = 1500  # of a complete reply: many seconds of work
_TRIES = 5
_CHUNKS_READ = 5
_DECODING_S = 0.2  # after which the engine has computed a short prompt and is generating


@dataclass(frozen=True, slots=True)
class Way:
    """How a client disconnects: the kind of request, the moment, and whether the connection is reset or closed."""

    streamed: bool
    early: bool  # while the prompt is computed; otherwise while the reply is generated
    reset: bool

    def __str__(self) -> str:
        kind = "stream" if self.streamed else "whole reply"
        when = "before the first token" if self.early else "during generation"
        return f"{kind}, {when}, {'reset' if self.reset else 'closed'}"


WAYS = tuple(Way(*each) for each in itertools.product((True, False), (True, False), (False, True)))


class TooLate(Exception):
    """The engine finished before the client could disconnect: nothing was measured."""


class Gauge:
    """Reads how many requests an engine is working on."""

    def __init__(self, engine_url: str) -> None:
        self._http = httpx.Client(base_url=engine_url, timeout=10)

    def __enter__(self) -> "Gauge":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def read(self) -> float:
        """Return the number of running and waiting requests."""
        values = _GAUGES.findall(self._http.get("/metrics").raise_for_status().text)
        if not values:
            raise RuntimeError("the engine's metrics have no vllm:num_requests_running")
        return sum(map(float, values))

    def wait(self, *, busy: bool, within_s: float) -> float:
        """Wait until the engine is busy, or idle; return how many seconds that took."""
        began = time.monotonic()
        while (self.read() > 0) is not busy:
            if time.monotonic() - began > within_s:
                raise RuntimeError(f"the engine was {'idle' if busy else 'busy'} for {within_s:g} s")
        return time.monotonic() - began


def disconnect(url: str, session: str, way: Way, gauge: Gauge) -> float:
    """Send a request, disconnect, and return the seconds until the engine is idle; retry if it finished too early."""
    for attempt in range(_TRIES):
        try:
            return _disconnect(url, f"{session}.{attempt}" if attempt else session, way, gauge)
        except TooLate as error:
            too_late = error
    raise too_late


def _disconnect(url: str, session: str, way: Way, gauge: Gauge) -> float:
    gauge.wait(busy=False, within_s=_STOPS_WITHIN_S)
    sock = _send(url, session, way)
    try:
        if way.streamed and not way.early:
            _read_some(sock)
        else:
            gauge.wait(busy=True, within_s=_BEGINS_WITHIN_S)
            if not way.early:
                time.sleep(_DECODING_S)
            _check_unanswered(sock, way)
        if gauge.read() == 0:
            raise TooLate(f"{way}: the engine had finished")
        if way.reset:
            reset_on_close(sock)
    finally:
        sock.close()
    return gauge.wait(busy=False, within_s=_STOPS_WITHIN_S)


def _send(url: str, session: str, way: Way) -> socket.socket:
    address = urlsplit(url)
    body = json.dumps(question(session, way)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
        f"x-session-id: {session}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    sock = socket.create_connection((address.hostname, address.port), timeout=_BEGINS_WITHIN_S)
    sock.sendall(head.encode() + body)
    return sock


def question(session: str, way: Way) -> dict[str, Any]:
    """Return the body of a request."""
    # The session's name comes first, so that no two prompts share a prefix that the engine could have cached.
    words = " ".join(f"{session} {n}" if n % 50 == 0 else "and then" for n in range(_LONG if way.early else _SHORT))
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": words}],
        "stream": way.streamed,
        "max_tokens": REPLY_TOKENS,
        "ignore_eos": True,
    }


def _read_some(sock: socket.socket) -> None:
    received = b""
    while received.count(b"data: ") < _CHUNKS_READ:
        data = sock.recv(65536)
        if not data:
            raise RuntimeError(f"the stream ended early: {received[-500:]!r}")
        received += data
    if b"data: [DONE]" in received:
        raise TooLate("the stream had ended")
    if not received.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the response was {received[:500]!r}")


def _check_unanswered(sock: socket.socket, way: Way) -> None:
    """Raise TooLate if a token has arrived already; the head of a stream may have."""
    sock.setblocking(False)
    try:
        received = sock.recv(65536)
    except BlockingIOError:
        return
    if not received.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the response was {received[:500]!r}")
    if not way.streamed or b"data: " in received:
        raise TooLate(f"{way}: the response had begun")

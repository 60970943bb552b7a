"""Clients that leave before they have their answer, and how soon the engine has stopped working for them.

What the engine does is read from its own metrics, past the gateway.
"""

import itertools
import json
import re
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

_GAUGES = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_BEGINS_WITHIN_S = 30.0
_STOPS_WITHIN_S = 30.0
# Words of a prompt that takes the engine a while, and of one that does not. vLLM stops between two steps and not within
# one, and a step may be a whole prompt: with a much longer one it is the length of a step that is measured.
_LONG, _SHORT = 250, 1
REPLY_TOKENS = 1500  # of the whole reply: many seconds of work
_TRIES = 5
_CHUNKS_READ = 5
_DECODING_S = 0.2  # after a short prompt has begun, the engine is writing
_NOW = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Way:
    """How a client leaves: what it asked for, when it goes, and whether its socket says good-bye."""

    streamed: bool
    early: bool  # while the prompt is computed; else while the reply is written
    reset: bool

    def __str__(self) -> str:
        asked = "stream" if self.streamed else "whole reply"
        when = "before the first token" if self.early else "while it is written"
        return f"{asked}, {when}, {'reset' if self.reset else 'closed'}"


WAYS = tuple(Way(*each) for each in itertools.product((True, False), (True, False), (False, True)))


class TooLate(Exception):
    """The engine was done before the client could leave: nothing was seen."""


class Gauge:
    """The requests that an engine says it is working on."""

    def __init__(self, engine_url: str) -> None:
        self._http = httpx.Client(base_url=engine_url, timeout=10)

    def __enter__(self) -> "Gauge":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def read(self) -> float:
        """Running and waiting requests."""
        found = _GAUGES.findall(self._http.get("/metrics").raise_for_status().text)
        if not found:
            raise RuntimeError("the engine's metrics have no vllm:num_requests_running")
        return sum(map(float, found))

    def wait(self, *, busy: bool, within_s: float) -> float:
        """Wait until it works, or until it does not; return how many seconds that took."""
        began = time.monotonic()
        while (self.read() > 0) is not busy:
            if time.monotonic() - began > within_s:
                raise RuntimeError(f"the engine was {'idle' if busy else 'busy'} for {within_s:g} s")
        return time.monotonic() - began


def leave(url: str, session: str, way: Way, gauge: Gauge) -> float:
    """Ask, leave, and return the seconds until the engine works on nothing; again if it was done before that."""
    for again in range(_TRIES):
        try:
            return _leave(url, session if not again else f"{session}.{again}", way, gauge)
        except TooLate as error:
            late = error
    raise late


def _leave(url: str, session: str, way: Way, gauge: Gauge) -> float:
    gauge.wait(busy=False, within_s=_STOPS_WITHIN_S)
    sock = _ask(url, session, way)
    try:
        if way.streamed and not way.early:
            _read_some(sock)
        else:
            gauge.wait(busy=True, within_s=_BEGINS_WITHIN_S)
            if not way.early:
                time.sleep(_DECODING_S)
            _check_unanswered(sock, way)
        if gauge.read() == 0:
            raise TooLate(f"{way}: the engine was done")
        if way.reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NOW)
    finally:
        sock.close()
    return gauge.wait(busy=False, within_s=_STOPS_WITHIN_S)


def _ask(url: str, session: str, way: Way) -> socket.socket:
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
    """The body of a request."""
    # The session's name comes first, so that no two prompts have a beginning in common that the engine could keep.
    words = " ".join(f"{session} {n}" if n % 50 == 0 else "and then" for n in range(_LONG if way.early else _SHORT))
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": words}],
        "stream": way.streamed,
        "max_tokens": REPLY_TOKENS,
        "ignore_eos": True,
    }


def _read_some(sock: socket.socket) -> None:
    seen = b""
    while seen.count(b"data: ") < _CHUNKS_READ:
        data = sock.recv(65536)
        if not data:
            raise RuntimeError(f"the stream ended early: {seen[-500:]!r}")
        seen += data
    if b"data: [DONE]" in seen:
        raise TooLate("the stream was over")
    if not seen.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the answer was {seen[:500]!r}")


def _check_unanswered(sock: socket.socket, way: Way) -> None:
    """Whoever has a token of the answer does not leave before the first; the head of a stream comes before it."""
    sock.setblocking(False)
    try:
        seen = sock.recv(65536)
    except BlockingIOError:
        return
    if not seen.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the answer was {seen[:500]!r}")
    if not way.streamed or b"data: " in seen:
        raise TooLate(f"{way}: the answer had begun")

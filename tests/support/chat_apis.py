"""The chat APIs, to be asked the same things."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.fakes import engine as fake
from tests.support.fakes.engine import (
    MODEL,
    Exchange,
    FakeEngine,
    delta,
    event,
    stream_of,
    text_event,
    texts_of,
    usage_of,
)
from tests.support.gateway_process import Gateway
from tests.support.raw_http import RawHttpClient

USAGE = usage_of(10, 2)


MB = 2**20


TYPE = "content-type: application/json"


@dataclass(frozen=True)
class Api:
    """A client API: where it is, how a request looks, and how the engine streams a reply."""

    path: str
    body: dict[str, Any]
    stream: Callable[[Sequence[str], Any], list[bytes]]
    word: bytes
    """One event of a reply, with `Hel` in it."""

    def __str__(self) -> str:
        return self.path

    def answers(self, engine: FakeEngine, handler: fake.Handler) -> None:
        """Let the engine answer it so."""
        if self.path == "/v1/completions":
            engine.on_completion = handler
        else:
            engine.on_chat = handler

    def send(self, wire: RawHttpClient, session: str, **body: Any) -> None:
        """Send a request of a session."""
        whole = json.dumps({"model": MODEL, **self.body, **body}).encode()
        wire.post(self.path, whole, f"x-session-id: {session}")

    def post(self, gateway: Gateway, session: str, **body: Any) -> httpx.Response:
        """The same, with its answer."""
        whole = {"model": MODEL, **self.body, **body}
        return gateway.http.post(self.path, json=whole, headers={"x-session-id": session})


APIS = [
    Api("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, stream_of, delta(content="Hel")),
    Api("/v1/completions", {"prompt": "hi"}, texts_of, event(text_event("Hel"))),
]


apis = pytest.mark.parametrize("api", APIS, ids=str)


def streaming(*chunks: bytes) -> fake.Handler:
    """An engine that streams these chunks."""

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for chunk in chunks:
            exchange.chunk(chunk)
        exchange.end()

    return answer

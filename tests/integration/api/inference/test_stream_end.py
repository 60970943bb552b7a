"""Between the last event of a stream and its end: the client has its reply, continues, and finds its turn."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
import pytest

from tests.support.fakes.engine import WITHIN, Exchange, FakeEngine
from tests.support.gateway_process import ROOT, Gateway, eventually

RECORDINGS = ROOT / "tests" / "recordings"
ASKED = [{"role": "user", "content": "Tell me until the last event."}]
# Asked for, or else the shared gateway would learn from these streams where other engines' usage is hidden.
USAGE = {"stream_options": {"include_usage": True}}
# Of each dialect: a request, a stream that an engine sent, and what its last event has in it.
STREAMS: dict[str, tuple[dict[str, Any], str, bytes]] = {
    "/v1/chat/completions": ({"messages": ASKED, **USAGE}, "chat-usage.sse", b"[DONE]"),
    "/v1/completions": ({"prompt": "hi", **USAGE}, "completions-usage.sse", b"[DONE]"),
    "/v1/messages": ({"messages": ASKED, "max_tokens": 6}, "messages.sse", b"message_stop"),
    "/v1/responses": ({"input": "hi"}, "responses.sse", b'"response.completed"'),
}


class Unended:
    """An engine's stream that ends when it is told to; what is asked after it is answered as usual."""

    def __init__(self, engine: FakeEngine, recording: str) -> None:
        self.may_end = threading.Event()
        self._events = (RECORDINGS / recording).read_bytes().split(b"\n\n")[:-1]
        self._restore = engine.reset
        engine.on_chat = engine.on_completion = engine.on_other = self

    def __call__(self, exchange: Exchange) -> None:
        """Answer the first request."""
        self._restore()
        exchange.begin()
        for event in self._events:
            exchange.chunk(event + b"\n\n")
        self.may_end.wait(WITHIN)
        exchange.end()

    def end_soon(self) -> None:
        """End the stream in a moment, in which a gateway that does not wait would have answered."""
        threading.Timer(0.05, self.may_end.set).start()


@contextmanager
def told(gateway: Gateway, path: str, session: str = "", **more: Any) -> Iterator[httpx.Response]:
    """A streamed answer, read to its last event."""
    body, _, last = STREAMS[path]
    asked = {"model": "demo", "stream": True, **body, **more}
    headers = {"x-session-id": session} if session else {}
    with gateway.http.stream("POST", path, json=asked, headers=headers) as response:
        heard, chunks = b"", response.iter_raw()  # held on to: dropped, it would close the connection
        while last not in heard or not heard.endswith(b"\n\n"):
            heard += next(chunks)
        yield response


@pytest.mark.parametrize("path", STREAMS)
def test_a_client_that_has_read_the_last_event_finds_the_turn(engine: FakeEngine, gateway: Gateway, path: str) -> None:
    session = "told" + path.replace("/", ".")
    stream = Unended(engine, STREAMS[path][1])
    with told(gateway, path, session):
        stream.end_soon()
        found = gateway.http.get(f"/admin/sessions/{session}").json()
    assert [turn["outcome"] for turn in found["turns"]] == ["completed"]


def test_a_conversation_without_an_id_continues_after_the_last_event(engine: FakeEngine, gateway: Gateway) -> None:
    stream = Unended(engine, "chat-usage.sse")
    asked = [{"role": "user", "content": "Who goes on before the end?"}]
    with told(gateway, "/v1/chat/completions", messages=asked) as response:
        reply = "".join(_words("chat-usage.sse"))
        stream.end_soon()
        history = [*asked, {"role": "assistant", "content": reply}, {"role": "user", "content": "and?"}]
        following = gateway.http.post("/v1/chat/completions", json={"model": "demo", "messages": history})
    assert following.headers["x-session-id"] == response.headers["x-session-id"]


def test_an_engine_that_never_ends_its_stream_is_not_waited_for_long(engine: FakeEngine, gateway: Gateway) -> None:
    stream = Unended(engine, "chat-usage.sse")
    with told(gateway, "/v1/chat/completions", "told-unended"):
        assert gateway.http.get("/admin/sessions/told-unended").status_code == 404
        stream.may_end.set()
        eventually(lambda: gateway.http.get("/admin/sessions/told-unended").is_success, "the turn is recorded")


def _words(recording: str) -> Iterator[str]:
    for line in (RECORDINGS / recording).read_text().splitlines():
        if line.startswith("data: {"):
            for choice in orjson.loads(line.removeprefix("data: "))["choices"]:
                yield choice["delta"].get("content") or ""

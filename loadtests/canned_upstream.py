"""An engine that costs almost nothing: it sends a canned completion, so that a measurement shows what a proxy adds.

`python -m loadtests.canned_upstream --port 9000`. The model's name selects the kind of response:

canned        JSON at once; a stream as fast as the reader takes it, each event in its own HTTP chunk and write
canned-5ms    the same stream with 5 ms (or 100 ms) between chunks, each carrying the time it was sent
canned-ragged the same stream split at arbitrary points, also within lines
"""

import argparse
import asyncio
import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

import orjson
import uvloop

MODELS = ("canned", "canned-5ms", "canned-100ms", "canned-ragged")
EVENTS = 64  # of a reply: the role, 62 tokens, the finish reason; usage and [DONE] come after them
CONTEXT_LIMIT = 262_144
BACKLOG = 4096
_CREATED = 1_760_000_000
_ID = "chatcmpl-6f1d2c0e9b7a4d53"
_USAGE = {
    "prompt_tokens": 120,
    "total_tokens": 182,
    "completion_tokens": 62,
    "prompt_tokens_details": {"cached_tokens": 96},
}
_FINGERPRINT = "vllm-0.32.0-tp1-4f2b6c1d"
_DONE = b"data: [DONE]\n\n"
_RAGGED_SIZES = (7, 190, 33, 401, 2, 64)

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_MODEL = re.compile(rb'"model":\s*"([^"]*)"')
_STREAM = re.compile(rb'"stream":\s*true')
_WITH_USAGE = re.compile(rb'"include_usage":\s*true')
_PACE = re.compile(r"-(\d+)ms$")
# The fields that select a response are in front of the messages or after them; the messages may be half a megabyte.
_EDGE_BYTES = 2048


def events(model: str, *, usage: bool) -> list[bytes]:
    """Return the events of a streamed reply as vLLM writes them."""
    finish = _chunk(model, [_choice({}, "stop")])
    last = [finish, {**_chunk(model, []), "usage": _USAGE}] if usage else [finish]
    last[-1]["system_fingerprint"] = _FINGERPRINT  # vLLM adds it to the last event, whichever that is
    return [
        _event(_chunk(model, [_choice({"role": "assistant", "content": ""}, None)])),
        *(token(model, f" token{i}") for i in range(EVENTS - 2)),
        *map(_event, last),
        _DONE,
    ]


def token(model: str, text: str) -> bytes:
    """Return one event in the middle of a reply."""
    return _event(_chunk(model, [_choice({"content": text}, None)]))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(body)


def ragged(model: str, *, usage: bool) -> list[bytes]:
    """Return the same bytes, split without regard to events and lines."""
    whole, cuts, at = b"".join(events(model, usage=usage)), [], 0
    for size in itertools.cycle(_RAGGED_SIZES):
        cuts.append(whole[at : at + size])
        at += size
        if at >= len(whole):
            return cuts
    raise AssertionError("a cycle does not end")


def _choice(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def _chunk(model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": _ID, "object": "chat.completion.chunk", "created": _CREATED, "model": model, "choices": choices}


def _whole(model: str) -> bytes:
    message = {"role": "assistant", "content": "".join(f" token{i}" for i in range(EVENTS - 2)), "tool_calls": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    answer = {"id": _ID, "object": "chat.completion", "created": _CREATED, "model": model, "choices": [choice]}
    return _json(200, {**answer, "usage": _USAGE})


def _json(status: int, value: object) -> bytes:
    body = orjson.dumps(value)
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status, len(body), body,
    )  # fmt: skip


def _framed(chunk: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(chunk), chunk)


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_STREAM_END = b"0\r\n\r\n"


def _written(chunks: Sequence[bytes]) -> list[bytes]:
    """Return the socket writes; the end of the body is sent with the last chunk, as uvicorn does."""
    return [*map(_framed, chunks[:-1]), _framed(chunks[-1]) + _STREAM_END]


_ANSWERS = {name.encode(): _whole(name) for name in MODELS}
_EVENTS = {(name.encode(), usage): events(name, usage=usage) for name in MODELS for usage in (False, True)}
_STREAMS = {key: _written(chunks) for key, chunks in _EVENTS.items()}
_STREAMS |= {(b"canned-ragged", usage): _written(ragged("canned-ragged", usage=usage)) for usage in (False, True)}
_PACES = {name.encode(): int(match[1]) / 1000 for name in MODELS if (match := _PACE.search(name))}


class CannedProtocol(asyncio.Protocol):
    """One connection. Requests arrive one after the other; pipelining is not supported."""

    def __init__(self, loop: asyncio.AbstractEventLoop, computed: set[object]) -> None:
        self._loop = loop
        self._computed = computed
        self._transport: asyncio.Transport
        self._parts: list[bytes] = []
        self._size = self._wanted = 0
        self._next: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream of a client that has disconnected."""
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        """Collect data until a request is complete, then answer it."""
        if self._parts:
            self._parts.append(data)
            self._size += len(data)
            if self._size < self._wanted:
                return
            data, self._parts = b"".join(self._parts), []
        end = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, end) if end >= 0 else None
        wanted = end + 4 + (int(length[1]) if length else 0) if end >= 0 else len(data) + 1
        if len(data) < wanted:
            self._parts, self._size, self._wanted = [data], len(data), wanted
            return
        self._answer(data[: data.find(b"\r\n")].split(b" "), data[end + 4 : wanted])

    def _answer(self, request: list[bytes], body: bytes) -> None:
        method, path = request[0], request[1].partition(b"?")[0]
        if path == b"/v1/chat/completions":
            self._chat(body)
        elif method == b"POST":
            self._transport.write(self._control(path, orjson.loads(body or b"{}")))
        else:
            self._transport.write(_get(path))

    def _chat(self, body: bytes) -> None:
        edges = body if len(body) <= 2 * _EDGE_BYTES else body[:_EDGE_BYTES] + body[-_EDGE_BYTES:]
        model_match = _MODEL.search(edges)
        model = model_match[1] if model_match else b"canned"
        if model not in _ANSWERS:
            self._transport.write(_json(404, {"error": {"message": "no such model", "code": 404}}))
        elif not _STREAM.search(edges):
            self._transport.write(_ANSWERS[model])
        else:
            usage = _WITH_USAGE.search(edges) is not None
            self._transport.write(_STREAM_HEAD)
            if model in _PACES:
                self._paced(model, _EVENTS[model, usage], self._loop.time(), 0)
            else:
                self._stream(_STREAMS[model, usage], 0)

    def _stream(self, writes: Sequence[bytes], at: int) -> None:
        """Send one chunk per iteration of the event loop: uvloop merges all writes of one iteration."""
        self._transport.write(writes[at])
        if at + 1 < len(writes):
            self._next = self._loop.call_soon(self._stream, writes, at + 1)

    def _paced(self, model: bytes, chunks: Sequence[bytes], began: float, at: int) -> None:
        """Send each chunk when it is due; the text of a token is the time at which it is written."""
        timed = 0 < at < EVENTS - 1
        chunk = token(model.decode(), f"@{time.monotonic_ns()}") if timed else chunks[at]
        last = at + 1 == len(chunks)
        self._transport.write(_framed(chunk) + (_STREAM_END if last else b""))
        if not last:
            due = began + (at + 1) * _PACES[model]
            self._next = self._loop.call_at(due, self._paced, model, chunks, began, at + 1)

    def _control(self, path: bytes, body: dict[str, Any]) -> bytes:
        """Answer the gateway's own requests: token ids, and a prefix computed under a salt."""
        if path == b"/tokenize":
            tokens = list(str(body.get("prompt", "")).encode())
            return _json(200, {"tokens": tokens, "count": len(tokens), "max_model_len": CONTEXT_LIMIT})
        if path == b"/v1/completions":
            return _json(200, self._completion(body))
        return _json(404, {"error": {"message": "not canned", "code": 404}})

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, salt = body.get("prompt", ""), body.get("cache_salt")
        key = (salt, str(prompt))
        cached = len(prompt) - 1 if key in self._computed else 0
        self._computed.add(key)
        usage = {
            "prompt_tokens": len(prompt),
            "total_tokens": len(prompt) + 1,
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        choice = {"index": 0, "text": " a", "logprobs": None, "finish_reason": "length"}
        return {"id": _ID, "object": "text_completion", "created": _CREATED, "model": body.get("model"),
                "choices": [choice], "usage": usage}  # fmt: skip


def _get(path: bytes) -> bytes:
    if path == b"/v1/models":
        cards = [
            {"id": name, "object": "model", "created": _CREATED, "owned_by": "vllm", "root": name, "parent": None,
             "max_model_len": CONTEXT_LIMIT}
            for name in MODELS
        ]  # fmt: skip
        return _json(200, {"object": "list", "data": cards})
    if path == b"/health":
        return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    if path == b"/version":
        return _json(200, {"version": "0.32.0"})
    return _json(404, {"error": {"message": "not canned", "code": 404}})


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    computed: set[object] = set()
    server = await loop.create_server(lambda: CannedProtocol(loop, computed), "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9000)
    uvloop.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()

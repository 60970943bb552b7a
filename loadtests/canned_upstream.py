"""An engine that costs almost nothing: it answers with a canned completion, so that what a proxy adds is what is seen.

`python -m loadtests.canned_upstream --port 9000`. The model's name says how it answers:

canned        a JSON answer at once; a stream as fast as the reader takes it, each event its own HTTP chunk and write
canned-5ms    the same stream with 5 ms (any whole number) between chunks, each of them holding the time it was sent
canned-ragged the same stream cut anywhere, in the middle of lines too
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
_STAMP = "vllm-0.32.0-tp1-4f2b6c1d"
_DONE = b"data: [DONE]\n\n"
_RAGGED_SIZES = (7, 190, 33, 401, 2, 64)

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_MODEL = re.compile(rb'"model":\s*"([^"]*)"')
_STREAM = re.compile(rb'"stream":\s*true')
_WITH_USAGE = re.compile(rb'"include_usage":\s*true')
_PACE = re.compile(r"-(\d+)ms$")
# Everything that decides an answer stands before or after the messages; the messages may be half a megabyte.
_EDGE = 2048


def events(model: str, *, usage: bool) -> list[bytes]:
    """The events of a streamed reply as vLLM writes them."""
    finish = _chunk(model, [_choice({}, "stop")])
    last = [finish, {**_chunk(model, []), "usage": _USAGE}] if usage else [finish]
    last[-1]["system_fingerprint"] = _STAMP  # vLLM stamps the last event of an answer, whichever that is
    return [
        _event(_chunk(model, [_choice({"role": "assistant", "content": ""}, None)])),
        *(token(model, f" token{i}") for i in range(EVENTS - 2)),
        *map(_event, last),
        _DONE,
    ]


def token(model: str, text: str) -> bytes:
    """One event in the middle of a reply."""
    return _event(_chunk(model, [_choice({"content": text}, None)]))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(body)


def ragged(model: str, *, usage: bool) -> list[bytes]:
    """The same bytes, cut without regard to events and lines."""
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
    """What goes to the socket, one write each; the end of the body goes with the last chunk, as uvicorn sends it."""
    return [*map(_framed, chunks[:-1]), _framed(chunks[-1]) + _STREAM_END]


_ANSWERS = {name.encode(): _whole(name) for name in MODELS}
_EVENTS = {(name.encode(), usage): events(name, usage=usage) for name in MODELS for usage in (False, True)}
_STREAMS = {key: _written(chunks) for key, chunks in _EVENTS.items()}
_STREAMS |= {(b"canned-ragged", usage): _written(ragged("canned-ragged", usage=usage)) for usage in (False, True)}
_PACES = {name.encode(): int(found[1]) / 1000 for name in MODELS if (found := _PACE.search(name))}


class Answering(asyncio.Protocol):
    """One connection. Requests come one after the other; nobody here pipelines."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seen: set[object]) -> None:
        self._loop = loop
        self._seen = seen
        self._transport: asyncio.Transport
        self._parts: list[bytes] = []
        self._size = self._wanted = 0
        self._next: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The loop's call."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """The loop's call; a reader that leaves ends its stream."""
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        """The loop's call."""
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
            self._transport.write(self._asked(path, orjson.loads(body or b"{}")))
        else:
            self._transport.write(_shown(path))

    def _chat(self, body: bytes) -> None:
        edges = body if len(body) <= 2 * _EDGE else body[:_EDGE] + body[-_EDGE:]
        found = _MODEL.search(edges)
        model = found[1] if found else b"canned"
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
        """One chunk for each turn of the loop: uvloop would make one write of all that is written in one turn."""
        self._transport.write(writes[at])
        if at + 1 < len(writes):
            self._next = self._loop.call_soon(self._stream, writes, at + 1)

    def _paced(self, model: bytes, chunks: Sequence[bytes], began: float, at: int) -> None:
        """One chunk when its time has come; the text of a token is the time at which it is written."""
        timed = 0 < at < EVENTS - 1
        chunk = token(model.decode(), f"@{time.monotonic_ns()}") if timed else chunks[at]
        last = at + 1 == len(chunks)
        self._transport.write(_framed(chunk) + (_STREAM_END if last else b""))
        if not last:
            due = began + (at + 1) * _PACES[model]
            self._next = self._loop.call_at(due, self._paced, model, chunks, began, at + 1)

    def _asked(self, path: bytes, body: dict[str, Any]) -> bytes:
        """What a gateway asks on its own account: token ids, and a prefix computed under a salt."""
        if path == b"/tokenize":
            tokens = list(str(body.get("prompt", "")).encode())
            return _json(200, {"tokens": tokens, "count": len(tokens), "max_model_len": CONTEXT_LIMIT})
        if path == b"/v1/completions":
            return _json(200, self._completion(body))
        return _json(404, {"error": {"message": "not canned", "code": 404}})

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, salt = body.get("prompt", ""), body.get("cache_salt")
        key = (salt, str(prompt))
        cached = len(prompt) - 1 if key in self._seen else 0
        self._seen.add(key)
        usage = {
            "prompt_tokens": len(prompt),
            "total_tokens": len(prompt) + 1,
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        choice = {"index": 0, "text": " a", "logprobs": None, "finish_reason": "length"}
        return {"id": _ID, "object": "text_completion", "created": _CREATED, "model": body.get("model"),
                "choices": [choice], "usage": usage}  # fmt: skip


def _shown(path: bytes) -> bytes:
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
    seen: set[object] = set()
    server = await loop.create_server(lambda: Answering(loop, seen), "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9000)
    uvloop.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()

"""An engine in the shape of vLLM on raw sockets: believable by default, and as broken as a test wants it.

A test sets `on_chat` (or `on_other`) and gets the connection in hand: it can answer in odd pieces, stop, close, or wait
until the other side has gone.
"""

import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import orjson

MODEL = "demo"
WITHIN = 60.0  # seconds that anything a test waits for may take, on a machine that does other things too
_WATCHED = frozenset({"/health", "/v1/models", "/metrics"})


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came in, and the number of the connection it came on."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        """The path as Starlette, and so vLLM, routes it: percent-decoded."""
        return unquote(self.target.partition("?")[0])

    @property
    def json(self) -> dict[str, Any]:
        """The body, which has to be a JSON object."""
        value = orjson.loads(self.body)
        assert isinstance(value, dict)
        return value

    def header(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self.headers if key == name]


class Exchange:
    """One request, and the means to answer it well or badly."""

    def __init__(self, request: Request, sock: socket.socket) -> None:
        self.request = request
        self._sock = sock
        self.over = False  # nothing more can come on this connection

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._sock.sendall(data)

    def json(self, value: Mapping[str, Any], status: int = 200, headers: Sequence[str] = ()) -> None:
        """Send a whole JSON answer."""
        body = json.dumps(value, separators=(",", ":")).encode()
        lines = ["content-type: application/json", f"content-length: {len(body)}", *headers]
        self.raw(f"HTTP/1.1 {status} X\r\n".encode() + "".join(f"{x}\r\n" for x in lines).encode() + b"\r\n" + body)

    def text(self, body: str) -> None:
        """Send a whole answer of plain text."""
        self.raw(f"HTTP/1.1 200 X\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())

    def begin(self, kind: str = "text/event-stream; charset=utf-8", status: int = 200) -> None:
        """Send the head of a chunked answer."""
        self.raw(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode())

    def chunk(self, data: bytes) -> None:
        """Send one chunk."""
        self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        """Send the last, empty chunk."""
        self.raw(b"0\r\n\r\n")

    def cut(self) -> None:
        """Close the connection, whatever was promised."""
        self.over = True
        self._sock.shutdown(socket.SHUT_RDWR)

    def gone(self, within: float = WITHIN) -> bool:
        """Whether the other side closes the connection within so many seconds."""
        self.over = True
        self._sock.settimeout(within)
        try:
            return self._sock.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


Handler = Callable[[Exchange], None]


class FakeEngine:
    """Listens on a free port; `stop` and `start` restart it on the same one."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._port = 0
        self.requests: list[Request] = []
        self.connections = 0
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._kv: dict[str, list[list[int]]] = {}
        self.reset()

    def reset(self) -> None:
        """Be an ordinary engine again and forget what was asked."""
        self.on_chat: Handler = self.answer_chat
        self.on_completion: Handler = self.answer_completion
        self.on_other: Handler = lambda exchange: exchange.json({"detail": "Not Found"}, 404)
        self.on_models: Handler = self._models
        self.on_health: Handler = lambda exchange: exchange.json({})
        self.metrics = "vllm:num_requests_running 0.0\n"
        self.on_tokenize: Handler = self._tokens
        self.before_completion: Callable[[], object] = lambda: None
        self.on_computed: Callable[[Mapping[str, Any], list[int]], None] = lambda body, ids: None
        self.leaks_salts = False
        self.context_limit = 4096
        with self._news:
            self.requests.clear()

    def forget(self) -> None:
        """Lose all KV, as an engine does that restarts."""
        with self._news:
            self._kv.clear()

    @property
    def listening(self) -> bool:
        """Whether it runs."""
        return bool(self._threads)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> "FakeEngine":
        """Listen."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=512)
        self._port = self._listener.getsockname()[1]
        self._spawn(self._accept, self._listener)
        return self

    def stop(self) -> None:
        """Close the port and every connection, and wait for the threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(WITHIN)  # from here on no connection is added
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(WITHIN)
        self._threads.clear()

    def drop_connections(self) -> None:
        """Close every connection, as an engine does that restarts."""
        with self._news:
            for sock in self._open.values():
                _shut(sock)

    @property
    def asked(self) -> list[Request]:
        """The requests of clients: all but those that the gateway sends by itself."""
        with self._news:
            return [request for request in self.requests if request.path not in _WATCHED]

    def seen(self, path: str) -> list[Request]:
        """Requests for a path so far."""
        with self._news:
            return [request for request in self.requests if request.path == path]

    def wait_seen(self, path: str, count: int = 1) -> list[Request]:
        """Wait until that many requests for a path have come."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.seen(path)) >= count, WITHIN), f"no {count} requests for {path}"
            return self.seen(path)

    def answer_chat(self, exchange: Exchange) -> None:
        """Answer a chat completion as vLLM does."""
        body = exchange.request.json
        ids = render(body["messages"], generation_prompt=True)
        self.on_computed(body, ids)
        usage = self._usage(body.get("cache_salt"), ids, completion=3)
        if not body.get("stream"):
            exchange.json(whole_reply("Hello there!", usage))
            return
        exchange.begin()
        asked = (body.get("stream_options") or {}).get("include_usage")
        for event in stream_of(["Hello", " there", "!"], usage if asked else None):
            exchange.chunk(event)
        exchange.end()

    def answer_completion(self, exchange: Exchange) -> None:
        """Answer a text completion as vLLM does."""
        self.before_completion()
        body = exchange.request.json
        ids = body["prompt"] if isinstance(body["prompt"], list) else list(body["prompt"].encode())
        self.on_computed(body, ids)
        usage = self._usage(body.get("cache_salt"), ids, completion=1)
        if not body.get("stream"):
            exchange.json({**text_event("x", "length"), "usage": usage})
            return
        exchange.begin()
        asked = (body.get("stream_options") or {}).get("include_usage")
        for one in texts_of(["x"], usage if asked else None):
            exchange.chunk(one)
        exchange.end()

    def _usage(self, salt: str | None, ids: list[int], completion: int) -> dict[str, Any]:
        with self._news:
            known = self._kv.setdefault("" if self.leaks_salts else salt or "", [])
            shared = max((_common(ids, other) for other in known), default=0)
            known.append(ids)
        return usage_of(len(ids), completion, cached=min(shared, len(ids) - 1) // 16 * 16)

    def _answer(self, exchange: Exchange) -> None:
        request = exchange.request
        match request.method, request.path:
            case "GET", "/health":
                self.on_health(exchange)
            case "GET", "/v1/models":
                self.on_models(exchange)
            case "GET", "/metrics":
                exchange.text(self.metrics)
            case "POST", "/tokenize":
                self.on_tokenize(exchange)
            case "POST", "/v1/completions":
                self.on_completion(exchange)
            case "POST", "/v1/chat/completions":
                self.on_chat(exchange)
            case _:
                self.on_other(exchange)

    def _models(self, exchange: Exchange) -> None:
        card = {"id": MODEL, "object": "model", "root": "org/demo", "parent": None, "max_model_len": self.context_limit}
        exchange.json({"object": "list", "data": [card]})

    def _tokens(self, exchange: Exchange) -> None:
        body = exchange.request.json
        plain = list(str(body["prompt"]).encode()) if "prompt" in body else None
        ids = plain or render(body["messages"], generation_prompt=body.get("add_generation_prompt", True))
        exchange.json({"count": len(ids), "max_model_len": self.context_limit, "tokens": ids})

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the end of the listener
            while True:
                sock, _ = listener.accept()
                with self._news:
                    self.connections += 1
                    self._open[self.connections] = sock
                self._spawn(self._serve, sock, self.connections)

    def _serve(self, sock: socket.socket, number: int) -> None:
        with sock, sock.makefile("rb") as stream:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while (request := _read(stream, number)) is not None:
                    with self._news:
                        self.requests.append(request)
                        self._news.notify_all()
                    exchange = Exchange(request, sock)
                    self._answer(exchange)
                    if exchange.over:
                        break
            except OSError:
                pass  # the other side has gone, which some tests want
            finally:
                with self._news:
                    del self._open[number]
                _shut(sock)

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


def render(messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool) -> list[int]:
    """A chat template and a tokeniser: one token for each byte."""
    text = "".join(f"<{m['role']}>{m.get('content') or ''}</>" for m in messages)
    return list((text + ("<assistant>" if generation_prompt else "")).encode())


def usage_of(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """A `usage` object as vLLM writes it."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def whole_reply(text: str, usage: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion in one piece."""
    message = {"role": "assistant", "content": text, "refusal": None, "tool_calls": [], "reasoning": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event, spelt as vLLM spells it."""
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def delta(**fields: object) -> bytes:
    """One event of a streamed reply."""
    return chunk_event([{"index": 0, "delta": fields, "logprobs": None, "finish_reason": None}])


def chunk_event(choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None = None) -> bytes:
    """A `chat.completion.chunk` event."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": choices}
    return event({**head, "usage": usage} if usage else head)


DONE = b"data: [DONE]\n\n"


def text_event(text: str, finish: str | None = None, **fields: object) -> dict[str, Any]:
    """A text completion, or a part of one."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None, **fields}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]}


def texts_of(words: Sequence[str], usage: Mapping[str, Any] | None = None) -> list[bytes]:
    """The events of a streamed text completion."""
    *before, last = words
    parts = [*(text_event(word) for word in before), text_event(last, "length")]
    counted = [event({**text_event(""), "choices": [], "usage": usage})] if usage else []
    return [*map(event, parts), *counted, DONE]


def stream_of(words: Sequence[str], usage: Mapping[str, Any] | None = None) -> list[bytes]:
    """The events of a streamed reply."""
    last = chunk_event([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}])
    counted = [chunk_event([], usage)] if usage else []
    return [delta(role="assistant", content=""), *(delta(content=word) for word in words), last, *counted, DONE]


def _read(stream: Any, number: int) -> Request | None:
    first = stream.readline()
    if not first:
        return None
    method, target, _ = first.decode("latin-1").split(" ", 2)
    headers: list[tuple[str, str]] = []
    while (line := stream.readline()) != b"\r\n":
        if not line:
            return None
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name.lower(), value.strip()))
    length = next((int(value) for name, value in headers if name == "content-length"), 0)
    body = stream.read(length)
    # A client that disconnects in the middle of a request has sent none.
    return Request(method, target, tuple(headers), body, number) if len(body) == length else None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        sock.shutdown(socket.SHUT_RDWR)

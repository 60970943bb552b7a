"""An engine for agents that calls the tools a question names: a model with random weights never calls one by itself.

`python -m loadtests.scripted_engine --port 9100 [--record FILE]`. Answers chat completions, Responses and Messages in
vLLM's formats, streamed or not; see `loadtests.scripted_replies`. `--record` writes each request as a line of JSON.
"""

import argparse
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loadtests import scripted_replies as replies

Body = dict[str, Any]
Kind = tuple[Callable[[Mapping[str, Any]], replies.Reply], Callable[..., Body], Callable[..., Iterator[bytes]]]
_KINDS: dict[str, Kind] = {
    "/v1/chat/completions": (replies.read_chat, replies.chat_complete, replies.chat_events),
    "/v1/responses": (replies.read_responses, replies.responses_complete, replies.responses_events),
    "/v1/messages": (replies.read_messages, replies.messages_complete, replies.messages_events),
}
_CONTEXT_LIMIT = 262_144


class ScriptedEngine(ThreadingHTTPServer):
    """Listens on 127.0.0.1. `models` are the names it serves; requests are recorded in the file `record`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, models: tuple[str, ...] = ("demo",), record: Path | None = None) -> None:
        super().__init__(("127.0.0.1", port), RequestHandler)
        self.models = models
        self.computed: set[tuple[str, str]] = set()  # salt and prompt
        self.results = 0  # tool results received so far
        self._record = record
        self._record_lock = threading.Lock()

    def record(self, request: Mapping[str, Any]) -> None:
        """Append a request to the recording, if there is one."""
        if self._record is not None:
            with self._record_lock, self._record.open("a") as file:
                file.write(json.dumps(request) + "\n")


class RequestHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: ScriptedEngine

    def setup(self) -> None:
        """Disable Nagle's algorithm."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_GET(self) -> None:
        """Answer /v1/models and /health."""
        self._record(b"")
        path = self.path.partition("?")[0]
        if path == "/v1/models":
            self._json(200, {"object": "list", "data": [_card(name) for name in self.server.models]})
        elif path == "/health":
            self._json(200, {})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_HEAD(self) -> None:
        """Answer 405, as vLLM does."""
        self._record(b"")
        self.send_response(405)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Answer completions of each API, and the gateway's own requests."""
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        self._record(raw)
        path = self.path.partition("?")[0]
        body: Body = json.loads(raw or b"{}")
        if path in _KINDS:
            self._complete(path, body)
        elif path == "/v1/messages/count_tokens":
            self._json(200, {"input_tokens": len(raw) // 4})
        elif path == "/tokenize":
            text = str(body.get("prompt") or json.dumps(body.get("messages")))
            tokens = list(text.encode())
            self._json(200, {"tokens": tokens, "count": len(tokens), "max_model_len": _CONTEXT_LIMIT})
        elif path == "/v1/completions":
            self._json(200, self._completion(body))
        else:
            self._json(404, {"detail": "Not Found"})

    def _complete(self, path: str, body: Body) -> None:
        if body.get("model") not in self.server.models:
            message = f"The model `{body.get('model')}` does not exist."
            self._json(404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})
            return
        read, complete, events = _KINDS[path]
        reply = read(body)
        self.server.results += reply.results
        if body.get("stream"):
            self._stream(events(reply, body))
        else:
            self._json(200, complete(reply, body))

    def _completion(self, body: Body) -> Body:
        prompt = body.get("prompt", "")
        key = (str(body.get("cache_salt")), str(prompt))
        cached = len(prompt) - 1 if key in self.server.computed else 0
        self.server.computed.add(key)
        usage = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + 1, "completion_tokens": 1,
                 "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
        choice = {"index": 0, "text": " a", "logprobs": None, "finish_reason": "length"}
        return {"id": "cmpl-1", "object": "text_completion", "created": replies.CREATED, "model": body.get("model"),
                "choices": [choice], "usage": usage}  # fmt: skip

    def _json(self, status: int, value: Body) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, events: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in events:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def _record(self, raw: bytes) -> None:
        body = raw.decode("utf-8", "replace")
        headers = [[name.lower(), value] for name, value in self.headers.items()]
        self.server.record({"method": self.command, "target": self.path, "headers": headers, "body": body})

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _card(name: str) -> Body:
    return {"id": name, "object": "model", "created": replies.CREATED, "owned_by": "vllm", "root": name,
            "parent": None, "max_model_len": _CONTEXT_LIMIT}  # fmt: skip


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--model", action="append", help="name of a served model; can be repeated")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    ScriptedEngine(options.port, tuple(options.model or ("demo",)), options.record).serve_forever()


if __name__ == "__main__":
    main()

"""The gateway as `cwg serve` runs it, with an eye inside: `python -m loadtests.watched PORT serve`.

`GET /` on PORT tells how many asyncio tasks there are and what the garbage collector keeps, by type. That is what a
leak is found by; from outside only its bytes can be seen.
"""

import asyncio
import gc
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from gateway.cli import main

_TYPES = 40


def look() -> dict[str, Any]:
    """What is in this process now."""
    gc.collect()
    found = gc.get_objects()
    tasks = Counter(_what(task) for task in found if isinstance(task, asyncio.Task) and not task.done())
    names = Counter(type(each).__qualname__ for each in found)
    return {"tasks": dict(tasks), "objects": len(found), "types": dict(names.most_common(_TYPES))}


def _what(task: "asyncio.Task[Any]") -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", coroutine))


class Answering(BaseHTTPRequestHandler):
    """One question."""

    def do_GET(self) -> None:
        """Look and tell."""
        body = json.dumps(look()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing for each request."""


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", int(sys.argv.pop(1))), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    main()

"""The gateway as `cwg serve` runs it, with an inspector inside: `python -m loadtests.inspected_gateway PORT serve`.

`GET /` on PORT returns the asyncio tasks and the objects that the garbage collector tracks, by type. These identify a
leak; from outside only its bytes are visible.
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


def inspect_process() -> dict[str, Any]:
    """Count the asyncio tasks and the tracked objects of this process."""
    gc.collect()
    objects = gc.get_objects()
    tasks = Counter(_task_name(task) for task in objects if isinstance(task, asyncio.Task) and not task.done())
    types = Counter(type(each).__qualname__ for each in objects)
    return {"tasks": dict(tasks), "objects": len(objects), "types": dict(types.most_common(_TYPES))}


def _task_name(task: "asyncio.Task[Any]") -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", coroutine))


class InspectionHandler(BaseHTTPRequestHandler):
    """Serves the counts as JSON."""

    def do_GET(self) -> None:
        """Answer with the current counts."""
        body = json.dumps(inspect_process()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", int(sys.argv.pop(1))), InspectionHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    main()

"""LMCache over its HTTP interface, above a real directory of files that it writes under LMCache's own names.

It keeps what lmcache 0.5.6 was seen to do: an object that is resident in memory is not written to the directory a
second time, a deletion takes from memory or directory what it is told to, and a load finds leading chunks only.
The bytes of an object are other ones each time it is computed, as floats of another batch may be.
"""

import json
import random
import secrets
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from weakref import WeakSet

from gateway.kv.keys import ObjectKey, object_keys
from tests.support.fakes.engine import FakeEngine

ROOT = "org/demo"  # of the model that the fake engine serves
CHUNK = 16
_SIZE = 200  # bytes of an object
_MEMORY = 2**20  # bytes
_STATIC: Mapping[str, Mapping[str, Any]] = {
    "status": {},
    "config": {
        "mp": {"transport": "zmq"},
        "storage_manager": {"l2_adapter_config": {"adapters": [{"base_path": "/kv", "serde_config": None}]}},
    },
    "config/adapters": {"adapters": [{"index": 0, "type_name": "fs", "tier": "l2", "primary": True}]},
    "healthcheck": {"status": "healthy"},
}


class FakeLMCache:
    """Listens on a free port. A test may refuse or hold back writes, and make calls fail.

    Several of them over one directory are the servers of several nodes, each with a memory of its own.
    """

    def __init__(
        self, folder: Path, world_size: int = 1, object_bytes: int = _SIZE, *, port: int = 0, chunk: int = CHUNK
    ) -> None:
        self.folder = folder
        self.chunk = chunk
        self.hash_algorithm = "blake3"
        self.world_size = world_size
        self.object_bytes = object_bytes
        self.memory: set[str] = set()  # file names of what is in L1
        self.started = "1.7e+09"  # when its process began
        self.reads_messages = True  # whether the thread for that is there
        self.prefetches: list[tuple[str, int]] = []  # salt and token ids of every load that was asked for
        self.before_write: Callable[[str], bool] = lambda name: True  # False: this object does not land
        self.before_answer: Callable[[str, str], None] = lambda method, path: None
        self._guard = threading.Lock()
        self._jobs: dict[int, tuple[int, int]] = {}
        self._counted: set[str] = set()  # what was in memory at the last request
        self._came: Counter[str] = Counter()  # by salt
        self._left: Counter[str] = Counter()
        self.deletions: list[tuple[str, str | None]] = []  # tier and adapter of every deletion
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.cache = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "FakeLMCache":
        """Listen."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    @property
    def listening(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Close the port and every connection."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.drop_connections()

    def behind(self, engine: FakeEngine) -> "FakeLMCache":
        """Have an engine store what it computes, and find here what it does not have to."""
        engine.on_computed = self.computed
        return self

    def computed(self, body: Mapping[str, Any], ids: Sequence[int]) -> None:
        """The engine has computed these ids, unless it was told to store nothing."""
        if (body.get("kv_transfer_params") or {}).get("lmcache.max_offload_tokens") != 0:
            self.store(ids, body.get("cache_salt") or "")

    def store(self, ids: Sequence[int], salt: str) -> None:
        """Keep what is not there of the whole chunks of `ids`."""
        for key in self.keys(ids, salt):
            with self._guard:
                new = key.file_name not in self.memory and not self._path(key).exists()
                self.memory.add(key.file_name)
            if new and self.before_write(key.file_name):
                self.write(key)

    def write(self, key: ObjectKey) -> None:
        """Write an object as LMCache does: under another name first."""
        fresh = self.folder / f"{secrets.token_hex(8)}.tmp"
        fresh.write_bytes(secrets.token_bytes(self.object_bytes))
        fresh.replace(self._path(key))

    def evict(self) -> None:
        """Lose every object, in memory and in the directory."""
        self.memory.clear()
        for path in self.folder.glob("*.data"):
            path.unlink()

    def some(self, chance: random.Random, share: float) -> int:
        """Evict a share of the objects, each from memory, from the directory or from both."""
        evicted = 0
        for path in sorted(self.folder.glob("*.data")):
            if chance.random() < share:
                evicted += 1
                where = chance.choice(["memory", "directory", "both"])
                if where != "directory":
                    self.memory.discard(path.name)
                if where != "memory":
                    path.unlink(missing_ok=True)
        return evicted

    def keys(self, ids: Sequence[int], salt: str) -> list[ObjectKey]:
        """The keys of the whole chunks of `ids`."""
        return object_keys(ROOT, ids, self.chunk, self.world_size, salt)

    def answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, Any] | str]:
        """Answer one request."""
        self.before_answer(method, path)
        self._count()
        match method, path.strip("/").split("/"):
            case "GET", names:
                return self._get("/".join(names))
            case "DELETE", ["cache", "objects"]:
                return 200, self._delete(body)
            case "POST", ["cache", "prefetches"]:
                return 202, self._prefetch(body)
            case _:
                return 404, {"detail": "Not Found"}

    def _get(self, path: str) -> tuple[int, Mapping[str, Any] | str]:
        match path.split("/"):
            case ["metrics"]:
                return 200, self._metrics()
            case ["threads?name=mq-server-thread"]:
                return 200, "Thread: <Thread(mq-server-thread, started daemon 1)>\n" * self.reads_messages
            case ["cache", "prefetches", number]:
                found, total = self._jobs.pop(int(number))
                return 200, {"status": "completed", "found_keys": found, "total_keys": total}
            case _ if path in _STATIC:
                return 200, self._status() if path == "status" else _STATIC[path]
            case _:
                return 404, {"detail": "Not Found"}

    def _status(self) -> Mapping[str, Any]:
        meta = {"1": {"model_name": ROOT, "world_size": self.world_size}}
        used = len(self.memory)
        level = {
            "total_object_count": used,
            "memory_used_bytes": used * self.object_bytes,
            "memory_configured_bytes": _MEMORY * (self.object_bytes // _SIZE),
        }
        return {
            "chunk_size": self.chunk,
            "hash_algorithm": self.hash_algorithm,
            "cache_context_meta": meta,
            "storage_manager": {"l1_managers": {"_default": level}},
        }

    def _count(self) -> None:
        """Count what has come into memory since the last request, and what has left it."""
        with self._guard:
            self._came.update(map(_salt, self.memory - self._counted))
            self._left.update(map(_salt, self._counted - self.memory))
            self._counted = set(self.memory)

    def _metrics(self) -> str:
        counts = {"write": self._came, "evicted": self._left}
        lines = [
            f'lmcache_mp_l1_{what}_chunks_total{{cache_salt="{salt}",l1_tag="_default"}} {count:.1f}'
            for what, by_salt in counts.items()
            for salt, count in by_salt.items()
        ]
        types = [f"# TYPE lmcache_mp_l1_{what}_chunks_total counter" for what in counts]
        return "\n".join([f"process_start_time_seconds {self.started}", *types, *lines, ""])

    def _delete(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        dropped = 0
        self.deletions.append((body["tier"], body.get("adapter")))
        for wire in body["keys"]:
            names = ("model_name", "kv_rank", "object_group_id", "chunk_hash_hex", "cache_salt")
            key = ObjectKey(*(wire[name] for name in names))
            with self._guard:
                dropped += key.file_name in self.memory
                self.memory.discard(key.file_name)
            if body["tier"] != "l1" and body.get("adapter") in (None, "fs"):
                self._path(key).unlink(missing_ok=True)
        return {"ok": True, "deleted": dropped, "skipped": 0}

    def _prefetch(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        keys = self.keys(body["token_ids"], body["cache_salt"])
        with self._guard:
            self.prefetches.append((body["cache_salt"], len(body["token_ids"])))
            number, found = len(self.prefetches), 0
            for key in keys:
                if key.file_name not in self.memory and not self._path(key).exists():
                    break
                self.memory.add(key.file_name)
                found += 1
            self._jobs[number] = found, len(keys)
        if not keys:
            return {"status": "noop"}
        return {"status": "submitted", "request_id": number, "chunks": len(keys) // self.world_size}

    def _path(self, key: ObjectKey) -> Path:
        return self.folder / key.file_name


def _salt(file_name: str) -> str:
    return file_name.removesuffix(".data").rpartition("@")[2]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    cache: FakeLMCache

    def __init__(self, *arguments: Any) -> None:
        self._open: WeakSet[socket.socket] = WeakSet()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, and remember it."""
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def drop_connections(self) -> None:
        """Close every connection."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has disconnected."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        status, answer = self.server.cache.answer(method, self.path, body)
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

"""A collector of traces that speaks OTLP/HTTP, and what it was sent."""

import gzip
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tests.support.gateway_process import eventually

_KEPT = 20_000
KINDS = ("", "internal", "server", "client")


@dataclass(frozen=True)
class CollectedSpan:
    """A span as it arrived. `parent` is "" for the first of its trace, `error` whether its status is one."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    error: bool
    started: int
    ended: int
    resource: dict[str, Any]

    def is_within(self, other: "CollectedSpan") -> bool:
        """Whether it is a child of `other`, and in its time to the millisecond."""
        slack = 2_000_000
        inside = other.started - slack <= self.started <= self.ended <= other.ended + slack
        return (self.trace, self.parent) == (other.trace, other.id) and inside


class Collector:
    """Listens on a free port. `answer` may hold a request back, and chooses its status."""

    def __init__(self) -> None:
        self.spans: deque[CollectedSpan] = deque(maxlen=_KEPT)
        self.requests = 0
        self.answer: Callable[[], int] = lambda: 200
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.collector = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def of(self, trace: str) -> list[CollectedSpan]:
        """The spans of a trace, in the order in which they began."""
        return sorted((span for span in [*self.spans] if span.trace == trace), key=lambda span: span.started)

    def wait(self, trace: str, *names: str) -> list[CollectedSpan]:
        """Wait until a trace has spans of these names, each as often as it is named; return all of its spans."""

        def there() -> bool:
            found = [span.name for span in self.of(trace)]
            return all(found.count(name) >= names.count(name) for name in names)

        seen = [(span.name, span.trace) for span in self.spans]
        eventually(there, f"{names} in trace {trace}", more=lambda: f"{seen}\n{[s.name for s in self.of(trace)]}")
        return self.of(trace)

    def named(self, name: str) -> list[CollectedSpan]:
        """All spans of a name."""
        return [span for span in [*self.spans] if span.name == name]

    def take(self, body: bytes) -> None:
        """Keep the spans of a request."""
        self.requests += 1
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        for of_resource in request.resource_spans:
            resource = _values(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += [_span(span, resource) for span in of_scope.spans]

    def start(self) -> "Collector":
        """Listen."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    listening = Collector().start()
    yield listening
    listening.stop()


class _Server(ThreadingHTTPServer):
    collector: Collector
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status = self.server.collector.answer()
        if status == 200:
            zipped = self.headers.get("content-encoding") == "gzip"
            self.server.collector.take(gzip.decompress(body) if zipped else body)
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _span(span: Any, resource: dict[str, Any]) -> CollectedSpan:
    return CollectedSpan(
        span.name,
        KINDS[span.kind],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        _values(span.attributes),
        tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        span.status.code == 2,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        resource,
    )


def _values(attributes: Sequence[KeyValue]) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}

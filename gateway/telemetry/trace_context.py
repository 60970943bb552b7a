"""W3C trace context: the header `traceparent`, and what the present task works for.

What a task works for is in context variables, which the tasks that it starts inherit: our requests to the engine and
the lines of the log take it from there.
"""

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, NamedTuple

from gateway.telemetry import genai

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"
SAMPLED_FLAG: Final = 1
_FIELDS = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE, _NO_SPAN = b"0" * 32, b"0" * 16


class TraceParent(NamedTuple):
    """A span of someone else's, as `traceparent` names it."""

    trace_id: int
    span_id: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class RequestIds:
    """What lines of the log say about a request: its id, and the trace that its client has begun, or ""."""

    request_id: str
    trace_id: str = ""


def header(trace_id: int, span_id: int, *, sampled: bool) -> bytes:
    """Write a `traceparent`."""
    return b"00-%032x-%016x-%02x" % (trace_id, span_id, sampled)


def parse(value: bytes) -> TraceParent | None:
    """Read a `traceparent`; None if it is malformed (https://www.w3.org/TR/trace-context/, 2.2)."""
    fields = _FIELDS.fullmatch(value)
    if fields is None:
        return None
    version, trace_id, span_id, flags, more = fields.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return None
    if trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceParent(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & SAMPLED_FLAG))


def find(headers: Iterable[tuple[bytes, bytes]]) -> tuple[TraceParent | None, bool]:
    """The parent that a request names, and whether it has any header of a trace context.

    There is no parent without a `traceparent`, with a malformed one, and with several.
    """
    found, count, has_any = b"", 0, False
    for name, value in headers:
        if name == TRACEPARENT:
            found, count = value, count + 1
        elif name == TRACESTATE:
            has_any = True
    return parse(found) if count == 1 else None, has_any or count > 0


def without(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without a trace context."""
    return [(name, value) for name, value in headers if name not in (TRACEPARENT, TRACESTATE)]


@dataclass(slots=True, eq=False)
class Span:
    """A span of a sampled trace that has begun; it is handed to OpenTelemetry when it is over.

    `parent_id` is 0 for the first of a trace. Times are of `time.time_ns`; `clock_ns` is `time.monotonic_ns` at the
    start. `error`: a short fixed word, never a message, which may quote a client.
    """

    name: str
    trace_id: int
    span_id: int
    parent_id: int
    started_ns: int
    clock_ns: int
    attributes: dict[str, str | int | float | bool]
    kind: str = "internal"
    error: str = ""
    link: "Span | None" = None
    is_remote: bool = False  # the parent is of another process

    @property
    def header(self) -> bytes:
        """The `traceparent` that makes a span of someone else's a child of this one."""
        return header(self.trace_id, self.span_id, sampled=True)


UNSAMPLED: Final = Span("", 0, 0, 0, 0, 0, {})
"""Stands for every span of a trace that is not sampled."""

ACTIVE: ContextVar[Span | None] = ContextVar("active_span", default=None)
"""The innermost span that is open in this task. None: nothing has decided yet whether there is one."""

REQUEST: ContextVar[RequestIds | None] = ContextVar("request", default=None)
"""Set only where the log has these."""


def current() -> Span | None:
    """The innermost span that is open in this task, None if its trace is not sampled."""
    span = ACTIVE.get()
    return None if span is UNSAMPLED else span


def detach() -> None:
    """Forget what this task works for: uvicorn starts the next request of a connection in the task of the last one."""
    ACTIVE.set(None)
    REQUEST.set(None)


def name_request(method: str, route: str) -> None:
    """Name the span of the request that is being served after its route, whose placeholders are in braces."""
    span = ACTIVE.get()
    if span is not None and span is not UNSAMPLED and span.kind == "server":
        span.name = f"{method} {route}"
        span.attributes[genai.ROUTE] = route


def log_fields() -> Mapping[str, str]:
    """What a line of the log is about: `request_id`, `trace_id` and `span_id`, as far as they are known."""
    fields: dict[str, str] = {}
    if (request := REQUEST.get()) is not None:
        fields["request_id"] = request.request_id
        if request.trace_id:
            fields["trace_id"] = request.trace_id
    if (span := current()) is not None:
        fields |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
    return fields

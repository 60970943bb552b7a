"""Traces: which requests are traced, and the spans of what is done for them.

A span is a few fields until it is over, and then goes to `SpanSink`; OpenTelemetry's SDK is imported only if spans are
wanted. Of what is not sampled there is nothing at all: only the engine gets a header that says so, because vLLM records
every request that comes without one.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from gateway.errors import GatewayError
from gateway.runtime.logs import escaped
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.trace_context import ACTIVE, UNSAMPLED, Span, TraceParent, current
from gateway.telemetry.trace_options import Sampler, TraceOptions

log = logging.getLogger(__name__)

Value = str | int | float | bool
Attributes = dict[str, Value]

_LONGEST = 200  # characters of a name
_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class SpanSink(Protocol):
    """Where spans go."""

    def write(self, span: Span, ended_ns: int) -> None:
        """Take a span that ended at a time of `time.time_ns`. Never waits."""
        ...


class Traces:
    """Without a sink, tracing is off."""

    def __init__(self, sink: SpanSink | None = None, sampler: Sampler | None = None) -> None:
        self._sink = sink
        self._sampler = sampler or Sampler()
        self._process, self._span_id = os.urandom(8).hex().encode(), _random(8)
        self._unsampled = itertools.count(_random(7))

    @property
    def on(self) -> bool:
        """Whether anything can be traced."""
        return self._sink is not None

    def begin_request(self, method: str, parent: TraceParent | Span | None) -> Span | None:
        """Begin the span of a request; None if it is not sampled.

        One that only reads is not traced by itself: whoever watches the gateway would fill the collector.
        """
        if parent is not None:
            if not self._follows(parent):
                return None
            remote = isinstance(parent, TraceParent)
            return _begun(method, parent.trace_id, parent.span_id, kind="server", is_remote=remote)
        trace_id = 0 if method in _READS else self._sampled_id()
        return _begun(method, trace_id, 0, kind="server") if trace_id else None

    def _sampled_id(self) -> int:
        """The id of a trace that begins here, 0 if it is not sampled."""
        if not self._sampler.share:
            return 0
        trace_id = _random(16)
        return trace_id if self._sampler.begins(trace_id) else 0

    def _follows(self, parent: TraceParent | Span) -> bool:
        if self._sampler.follows_parent or isinstance(parent, Span):
            return parent is not UNSAMPLED and (isinstance(parent, Span) or parent.sampled)
        return self._sampler.begins(parent.trace_id)

    def child(self, name: str, *, kind: str = "internal", attributes: Mapping[str, Value] | None = None) -> Span | None:
        """Begin a child of the span that is open in this task; None if its trace is not sampled."""
        parent = current()
        if parent is None:
            return None
        return _begun(name, parent.trace_id, parent.span_id, kind=kind, attributes=attributes)

    @contextmanager
    def step(self, name: str, *, kind: str = "internal", **attributes: Value) -> Iterator[Attributes]:
        """Record the block as a child; yields its attributes, to which the block may add."""
        span = self.child(name, kind=kind, attributes=attributes)
        if span is None:
            yield {}
            return
        with self.opened(span):
            yield span.attributes

    @contextmanager
    def automatic(self, name: str, cause: Span | None, attributes: Mapping[str, Value]) -> Iterator[None]:
        """Record the block, which nobody asked for, as a trace of its own that links to its cause.

        It is sampled if its cause was; of an unknown cause, as traces are that begin here.
        """
        trace_id = 0 if self._sink is None else _random(16) if cause else self._sampled_id()
        if not trace_id:
            token = ACTIVE.set(UNSAMPLED)
            try:
                yield
            finally:
                ACTIVE.reset(token)
            return
        span = _begun(name, trace_id, 0, attributes=attributes)
        span.link = cause
        with self.opened(span):
            yield

    @contextmanager
    def opened(self, span: Span) -> Iterator[None]:
        """Record the block as `span`; what is begun in it becomes a child."""
        token = ACTIVE.set(span)
        try:
            yield
        except BaseException as error:
            span.error = span.error or error_type(error)
            raise
        finally:
            ACTIVE.reset(token)
            self.record(span, span.started_ns + time.monotonic_ns() - span.clock_ns)

    def record(self, span: Span, ended_ns: int) -> None:
        """Hand over a span that ended at a time of `time.time_ns`."""
        if self._sink is None:
            return
        try:
            self._sink.write(span, ended_ns)
        except Exception:  # a turn must be recorded, and a request answered, whatever becomes of its spans
            log.exception("a span could not be recorded")

    def record_child(self, parent: Span, name: str, started_ns: int, ended_ns: int) -> None:
        """Record a step that is over already."""
        self.record(Span(name, parent.trace_id, _random(8), parent.span_id, started_ns, 0, {}), ended_ns)

    def engine_headers(self) -> dict[str, str]:
        """The headers that make an engine's span a child of the one that is open in this task, or prevent one."""
        if self._sink is None:
            return {}
        span = current()
        return {"traceparent": (self.unsampled_header() if span is None else span.header).decode()}

    def unsampled_header(self) -> bytes:
        """A `traceparent` of a trace that nobody records: another one each time, and cheaper than random."""
        return b"00-%b%016x-%016x-00" % (self._process, next(self._unsampled), self._span_id)


def clean(text: str, longest: int = _LONGEST) -> str:
    """A name from outside as it may be on a span: of bounded length, on one line, and valid in UTF-8."""
    return escaped(text[:longest]).encode("utf-8", "replace").decode()


def error_type(error: BaseException) -> str:
    """`error.type` of an exception: its code, or its class."""
    if isinstance(error, GatewayError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__


@asynccontextmanager
async def open_traces(environment: Mapping[str, str], metrics: Metrics) -> AsyncIterator[Traces]:
    """Export spans if the environment says where to. Raises StartError for variables that cannot be used."""
    options = TraceOptions.read(environment)
    if options is None:
        yield Traces()
        return
    # A third of a second, and 20 MB, that most gateways need not spend.
    from gateway.telemetry.otlp import OtlpSink  # noqa: PLC0415

    sink = OtlpSink(options, metrics.count_spans)
    log.info("traces go to %s", options.endpoint)
    try:
        yield Traces(sink, options.sampler)
    finally:
        await sink.close()


def _begun(
    name: str, trace_id: int, parent_id: int, *, kind: str = "internal", is_remote: bool = False,
    attributes: Mapping[str, Value] | None = None,
) -> Span:  # fmt: skip
    started_ns, clock_ns = time.time_ns(), time.monotonic_ns()
    given = dict(attributes or ())
    return Span(name, trace_id, _random(8), parent_id, started_ns, clock_ns, given, kind, is_remote=is_remote)


def _random(size: int) -> int:
    """An id: random, and never 0."""
    return int.from_bytes(os.urandom(size)) or 1

"""Spans on their way to a collector: OpenTelemetry's SDK, and its exporter over OTLP/HTTP.

The exporter works in a thread of the SDK. What it cannot send is counted and lost: no request ever waits for it. A
failure is logged once, and once that it is over.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from gateway import __version__
from gateway.telemetry import genai
from gateway.telemetry.trace_context import SAMPLED_FLAG, Span
from gateway.telemetry.trace_options import TraceOptions

log = logging.getLogger(__name__)

_SERVICE = "context-window-gateway"
_CLOSE_S = 3.0
_SAMPLED = TraceFlags(SAMPLED_FLAG)
_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
CountSpans = Callable[[str, int], None]


class OtlpSink:
    """A `SpanSink` in front of the SDK. `count` gets what became of spans, `exported`, `failed` or `dropped`."""

    def __init__(self, options: TraceOptions, count: CountSpans) -> None:
        self._count = count
        self._room = options.queue
        self._written = 0
        self._ids = _Ids()
        self._exporter = _WatchedExporter(options.endpoint, count)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=options.queue,
            max_export_batch_size=options.batch,
            schedule_delay_millis=options.delay_ms,
        )
        provider = TracerProvider(
            sampler=ALWAYS_ON, resource=_resource(), shutdown_on_exit=False, id_generator=self._ids
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer(_SERVICE, __version__)

    def write(self, span: Span, ended_ns: int) -> None:
        """See `SpanSink.write`. Call it in one thread only."""
        # The SDK drops the oldest span of a full queue, and tells nobody.
        if self._written - self._exporter.taken >= self._room:
            self._count("dropped", 1)
            return
        self._ids.trace_id, self._ids.span_id = span.trace_id, span.span_id
        made = self._tracer.start_span(
            span.name,
            context=_context(span),
            kind=_KINDS[span.kind],
            attributes=span.attributes,
            links=[Link(SpanContext(span.link.trace_id, span.link.span_id, False, _SAMPLED))] if span.link else None,
            start_time=span.started_ns,
        )
        if span.error:
            made.set_attribute(genai.ERROR, span.error)
            made.set_status(Status(StatusCode.ERROR))
        self._written += 1
        made.end(end_time=max(ended_ns, span.started_ns))

    async def close(self) -> None:
        """Export what waits, for at most 3 s; the SDK itself would wait for ten times as long."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await done.wait()
        except TimeoutError:
            log.warning("not every span was exported within %g s", _CLOSE_S)
        self._exporter.close()


class _Ids(IdGenerator):
    """Hands back the ids of a span that has begun already."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _Reasons(logging.Filter):
    """Keeps what a library says about each failure to itself, and remembers the last."""

    last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.last = record.getMessage()
        return False


class _WatchedExporter(SpanExporter):
    """The exporter, with what became of the spans. `taken` is how many the SDK has handed over."""

    def __init__(self, endpoint: str, count: CountSpans) -> None:
        self._exporter = trace_exporter.OTLPSpanExporter()
        self._endpoint = endpoint
        self._count = count
        self._reasons = _Reasons()
        self._log = logging.getLogger(trace_exporter.__name__)
        self._log.addFilter(self._reasons)
        self._lost = 0
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called in the SDK's thread."""
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - of any library below; the next batch may be sent
            self._reasons.last = f"{type(error).__name__}: {error}"
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._sent(len(spans))
        else:
            self._failed(len(spans))
        return result

    def _sent(self, count: int) -> None:
        self._count("exported", count)
        if self._lost:
            log.warning("traces are exported again; %d spans were lost", self._lost)
            self._lost = 0

    def _failed(self, count: int) -> None:
        self._count("failed", count)
        if not self._lost:
            log.warning("spans are lost: %s does not take them: %s", self._endpoint, self._reasons.last)
        self._lost += count

    def shutdown(self) -> None:
        """Called by the SDK when everything was exported."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Do nothing: the exporter has no buffer."""
        return True

    def close(self) -> None:
        """Give up what is still being sent."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        self._log.removeFilter(self._reasons)


def _resource() -> Resource:
    """What says which process the spans are from; the environment's OTEL_RESOURCE_ATTRIBUTES come first."""
    own = {
        "service.name": _SERVICE,
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
    }
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def _context(span: Span) -> Context:
    """The context of a span's parent; empty for the first of a trace."""
    if not span.parent_id:
        return Context()
    parent = SpanContext(span.trace_id, span.parent_id, span.is_remote, _SAMPLED)
    return set_span_in_context(NonRecordingSpan(parent), Context())

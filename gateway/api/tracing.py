"""The span of a request, and what the log says about it.

Both are made here for the inference and the admin API. An MCP tool call appears as the request to the admin API that it
makes, whether it came over HTTP or from `cwg mcp`.
"""

import os
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.connection import client_of
from gateway.api.in_process import InProcessConnection
from gateway.telemetry import genai, trace_context
from gateway.telemetry.trace_context import ACTIVE, REQUEST, TRACEPARENT, UNSAMPLED, RequestIds, Span, TraceParent
from gateway.telemetry.traces import clean
from gateway.windows.context import Services

_REQUEST_ID = b"x-request-id"
_LONGEST_ID = 128


def trace_requests(app: ASGIApp, services: Services) -> ASGIApp:
    """The application with a span for each request that is sampled; unchanged if neither tracing nor the log needs it.

    The log needs ids if its lines are JSON.
    """
    with_ids = services.settings.log_format == "json"
    return _Traced(app, services, with_ids=with_ids) if services.traces.on or with_ids else app


class _Traced:
    def __init__(self, app: ASGIApp, services: Services, *, with_ids: bool) -> None:
        self._app = app
        self._traces = services.traces
        self._with_ids = with_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = scope["headers"]
        given, has_any = trace_context.find(headers)
        outer = ACTIVE.get() if given is None and _is_in_process(scope) else None
        if self._with_ids and not (_is_in_process(scope) and REQUEST.get()):
            REQUEST.set(_ids(headers, given))
        if not self._traces.on:
            await self._app(scope, receive, send)
            return
        span = self._traces.begin_request(scope["method"], given or outer)
        if span is not None:
            await self._serve(scope, receive, send, span)
            return
        ACTIVE.set(UNSAMPLED)
        if given is None or given.sampled:
            kept = trace_context.without(headers) if has_any else headers
            scope["headers"] = [*kept, (TRACEPARENT, self._traces.unsampled_header())]
        await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, span: Span) -> None:
        """Serve a request that is sampled. The engine gets the header of the span of its own part."""
        _describe(span, scope)
        headers = scope["headers"]
        if span.is_remote:  # its tracestate is passed on
            scope["headers"] = [one for one in headers if one[0] != TRACEPARENT]
        else:
            scope["headers"] = trace_context.without(headers)

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = span.attributes[genai.STATUS] = message["status"]
                span.error = str(status) if status >= 500 else ""
            await send(message)

        with self._traces.opened(span):
            await self._app(scope, receive, send_noting)


def _is_in_process(scope: Scope) -> bool:
    return isinstance(client_of(scope), InProcessConnection)


def _describe(span: Span, scope: Scope) -> None:
    span.attributes |= {genai.METHOD: scope["method"], genai.PATH: clean(scope["path"])}
    if request_id := _first(scope["headers"], _REQUEST_ID):
        span.attributes[genai.REQUEST_ID] = clean(request_id.decode("latin-1"), _LONGEST_ID)


def _ids(headers: Iterable[tuple[bytes, bytes]], parent: TraceParent | None) -> RequestIds:
    given = _first(headers, _REQUEST_ID).decode("latin-1")[:_LONGEST_ID]
    return RequestIds(given or os.urandom(8).hex(), f"{parent.trace_id:032x}" if parent else "")


def _first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")

"""Serve an admin operation: check the key and the parameters, report progress, and render errors in one shape."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import auth, requests
from gateway.api.asgi import ClientGone, bounded_query, not_found, parse_object, read_body, stream_body
from gateway.api.health import Health
from gateway.api.operation import JSON, NDJSON, Operation
from gateway.api.schemas import Json
from gateway.engines.connection import Headers
from gateway.errors import GatewayError, invalid_field
from gateway.records import check_session_id, check_window_name
from gateway.runtime.progress import Progress, silent
from gateway.telemetry.trace_context import name_request
from gateway.validation.shown import shown
from gateway.windows.autofreeze.service import AutofreezeService
from gateway.windows.context import OperationContext, Services

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_JSON_BYTES = 2**20
"""Largest JSON body of the admin API and of MCP: names, a description, a question."""
_LONGEST_FIELD = 100
_LISTS = ("tags", "without_tags")  # parameters of a query that are lists, separated by commas


class Call:
    """One admin request: its tenant, the services, and where to report progress."""

    def __init__(self, request: Request, tenant: str) -> None:
        self.tenant = tenant
        self.services: Services = request.state.services
        self.health: Health = request.state.health
        self.autofreeze: AutofreezeService = request.state.autofreeze
        self.inference: ASGIApp = request.state.inference
        self.progress: Progress = silent
        self.now = time.time()
        self.path: dict[str, str] = request.path_params
        self._request = request

    async def serve(self, operation: Operation) -> Any:
        """Read what the operation takes, and run it."""
        given = self._query() if self._request.scope["query_string"] else {}
        query = requests.read_query(operation.query, given) if given else requests.without_query(operation.query)
        body = await self._body(operation) if operation.takes == JSON else None
        taken = {"query": query} if operation.query.model_fields else {}
        return await operation.handler(self, **taken, **({"body": body} if operation.body.model_fields else {}))

    def _query(self) -> dict[str, Any]:
        """The query. A parameter that is given twice is refused; tags are one list."""
        bounded_query(self._request.scope["query_string"])
        given: dict[str, Any] = {}
        for name, value in self._request.query_params.multi_items():
            if name in _LISTS:
                given.setdefault(name, []).extend(value.split(","))
            elif name in given:
                message = f"{shown(name)} is given more than once"
                raise invalid_field(name[:_LONGEST_FIELD], message, "send it once")
            else:
                given[name] = value
        return given

    async def _body(self, operation: Operation) -> requests.Body | None:
        """The JSON body; without one, an empty object, and None for an operation that takes nothing."""
        settings = self.services.settings
        raw = await read_body(self._request.scope, self._request.receive, settings, MAX_JSON_BYTES)
        if not raw and not operation.body.model_fields:
            return None
        return requests.read(operation.body, parse_object(raw, settings.max_json_values) if raw else {})

    def stream(self) -> AsyncIterator[bytes]:
        """The body of a request, piece by piece, where it may be too large for memory."""
        return stream_body(self._request.scope, self._request.receive, self.services.settings)

    @property
    def headers(self) -> Headers:
        """The headers of the request."""
        headers: Headers = self._request.scope["headers"]
        return headers

    @property
    def keys(self) -> Headers:
        """The headers with the caller's key."""
        return [(name, value) for name, value in self.headers if name in auth.KEY_HEADERS]

    @property
    def context(self) -> OperationContext:
        """The context of a window operation that begins now."""
        return OperationContext(self.services, self.tenant, self.progress)

    @property
    def window_name(self) -> str:
        """The window in the path."""
        return check_window_name(self.path["name"], "window name in the URL")

    @property
    def session_id(self) -> str:
        """The session in the path."""
        return check_session_id(self.path["session_id"], "session id in the URL")


class Endpoint:
    """One method of one route as an ASGI application."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        name = f"{scope['method']} {scope['path']!r:.200}"
        try:
            answer = await _or_error(self._answer(Request(scope, receive)), name)
        except (ClientGone, ClientDisconnect):
            return
        response = error_answer(answer) if isinstance(answer, GatewayError) else answer
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> ASGIApp:
        operation = self._operation
        name_request(request.method, operation.path)
        call = Call(request, auth.TENANT if operation.probe else _tenant(request))
        if request.headers.get("accept") == NDJSON:
            return _ProgressResponse(operation, call)
        result = await call.serve(operation)
        return result if callable(result) else json_answer(operation.status, result)  # a stream is an application


class _ProgressResponse:
    """Lines of JSON: one for each step, the last one with the result or the error."""

    def __init__(self, operation: Operation, call: Call) -> None:
        self._operation = operation
        self._call = call
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        call.progress = self._report

    def _report(self, stage: str, done: int, total: int) -> None:
        self._lines.put_nowait(_json({"progress": {"stage": stage, "done": done, "total": total}}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that stops watching does not undo the work.
        task = asyncio.create_task(self._run())
        headers = [(b"content-type", NDJSON.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while (line := await self._lines.get()) is not None:
            await send({"type": "http.response.body", "body": line + b"\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        await task

    async def _run(self) -> None:
        try:
            last = await _or_error(self._last(), self._operation.handler.__name__)
            self._lines.put_nowait(_json(_last_line(0, last)) if isinstance(last, GatewayError) else last)
        except ClientGone:
            pass
        finally:
            self._lines.put_nowait(None)

    async def _last(self) -> bytes:
        """The last line; a result that is no JSON is a failure as any other."""
        return _json(_last_line(self._operation.status, await self._call.serve(self._operation)))


async def _or_error(work: Awaitable[T], name: str) -> T | GatewayError:
    """The result, or the error for the client; an unexpected exception is logged. Raises ClientGone."""
    try:
        return await work
    except (ClientGone, ClientDisconnect):
        raise
    except GatewayError as error:
        return error
    except Exception:
        log.exception("%s failed", name)
        return GatewayError("internal", "internal error; see the gateway's log")


class Methods:
    """One path, by method."""

    def __init__(self, methods: dict[str, ASGIApp]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._methods[method](scope, receive, send)


def _tenant(request: Request) -> str:
    services: Services = request.state.services
    headers, settings = request.scope["headers"], services.settings
    auth.refuse_foreign(headers, settings.allowed_origins)
    return auth.tenant(headers, settings.api_key, settings.allowed_origins)


async def _no_route(request: Request, _: Exception) -> Response:
    return error_answer(not_found(request.url.path))


async def _no_method(request: Request, error: Exception) -> Response:
    allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
    answer = error_answer(
        GatewayError("method_not_allowed", f"{request.method} is not served here", hint=f"use {allowed}")
    )
    answer.headers["allow"] = allowed
    return answer


HANDLERS = {404: _no_route, 405: _no_method}


def error_answer(error: GatewayError) -> Response:
    """An error in the admin API's shape."""
    return json_answer(error.status, error_shape(error))


def _last_line(status: int, result: Any) -> Json:
    if callable(result):
        result = GatewayError("invalid_request", "the answer is a file", hint=f"do not ask for {NDJSON}")
    if isinstance(result, GatewayError):
        return {"status": result.status, **error_shape(result)}
    return {"status": status, "result": result}


def error_shape(error: GatewayError) -> Json:
    """An error as it is in every answer of the admin API."""
    return {
        "error": {
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "retryable": error.retryable,
            "details": error.details,
        }
    }


def json_answer(status: int, value: Any) -> Response:
    """A JSON answer."""
    return Response(_json(value), status, media_type="application/json")


def _json(value: Any) -> bytes:
    if isinstance(value, BaseModel):  # at once: a page takes a third longer by way of a dict
        return value.model_dump_json(exclude_unset=True).encode()
    return orjson.dumps(value, default=_fields)


def _fields(value: Any) -> Json:
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    raise TypeError(f"{type(value).__name__} is no JSON")

"""The admin door: the verbs over HTTP, as JSON."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.edge import auth, fields, show
from gateway.edge.health import COMPONENTS, Health
from gateway.edge.http import ClientGone, not_found, read_body
from gateway.errors import GatewayError
from gateway.parts import Parts
from gateway.progress import Progress, silent
from gateway.records import check_session_id, check_window_name
from gateway.store.contract import SORT_KEYS, WindowQuery
from gateway.windows import clone, delete, freeze, thaw

log = logging.getLogger(__name__)

Verb = Callable[["Call"], Awaitable[tuple[int, Any]]]

_LIMIT = fields.whole(1, 100)
_OFFSET = fields.whole(0, 2**31)
_STATES = ("active", "frozen", "thawed", "expired")
_NDJSON = "application/x-ndjson"


class Call:
    """One admin request: who asks, with what, and where progress goes."""

    def __init__(self, request: Request, tenant: str) -> None:
        self.tenant = tenant
        self.parts: Parts = request.state.parts
        self.health: Health = request.state.health
        self.progress: Progress = silent
        self.path: dict[str, str] = request.path_params
        self._request = request

    def query(self, table: dict[str, Callable[[str, Any], Any]]) -> dict[str, Any]:
        """Read the query. A parameter that comes twice is refused; tags are one list."""
        items = self._request.query_params.multi_items()
        names = [name for name, _ in items]
        twice = next((name for name in names if names.count(name) > 1 and name != "tags"), None)
        if twice is not None:
            raise GatewayError("invalid_request", f"{twice} is given more than once", details={"field": twice})
        given: dict[str, Any] = dict(items)
        if "tags" in given:
            given["tags"] = [tag for name, value in items if name == "tags" for tag in value.split(",")]
        return fields.read(given, table)

    async def body(self, table: dict[str, Callable[[str, Any], Any]], required: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read the JSON body; none is an empty object."""
        fields.refuse_unknown(self._request.query_params.keys(), ())
        limits = self.parts.settings
        request = self._request
        raw = await read_body(
            request.scope, request.receive, limit=limits.max_body_bytes, timeout_s=limits.client_timeout_s
        )  # fmt: skip
        try:
            given = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError as error:
            raise GatewayError(
                "invalid_request", f"the body is not JSON: {error}", hint="send a JSON object"
            ) from error
        if not isinstance(given, dict):
            raise GatewayError("invalid_request", f"the body is a JSON {type(given).__name__}, not an object")
        return fields.read(given, table, required)

    @property
    def window_name(self) -> str:
        """The window in the path."""
        return check_window_name(self.path["name"], "window name in the URL")

    @property
    def session_id(self) -> str:
        """The session in the path."""
        return check_session_id(self.path["session_id"], "session id in the URL")


async def list_sessions(call: Call) -> tuple[int, Any]:
    """GET /admin/sessions."""
    q = call.query(
        {"state": fields.one_of(*_STATES), "model": _model, "limit": _LIMIT, "offset": _OFFSET},
    )
    limit, offset = q.get("limit", 50), q.get("offset", 0)
    await call.parts.turns.settle()
    page, total = await call.parts.store.list_sessions(
        call.tenant, state=q.get("state"), model=q.get("model"), limit=limit, offset=offset
    )
    shown = [show.session(s) for s in page]
    return 200, {"sessions": shown, **show.paging(len(page), total, limit, offset)}


async def get_session(call: Call) -> tuple[int, Any]:
    """GET /admin/sessions/{session_id}."""
    call.query({})
    await call.parts.turns.settle()
    session = await call.parts.store.session(call.tenant, call.session_id)
    if session is None:
        raise _no_session(call.session_id)
    turns = await call.parts.store.turns(call.tenant, session.id, limit=20)
    windows, _ = await call.parts.store.list_windows(call.tenant, WindowQuery(session_id=session.id, limit=100))
    model = call.parts.engine.known(session.model)
    return 200, {
        **show.session(session),
        "context_limit": model.context_limit if model else None,
        "turns": [show.turn(t) for t in turns],
        "windows": [w.name for w in windows],
    }


async def delete_session(call: Call) -> tuple[int, Any]:
    """DELETE /admin/sessions/{session_id}."""
    call.query({})
    # A turn that is going on would make the session anew when it is recorded.
    await call.parts.sessions.at_rest(call.tenant, call.session_id, call.parts.settings.busy_wait_s)
    if not await call.parts.store.delete_session(call.tenant, call.session_id):
        raise _no_session(call.session_id)
    return 200, {"session_id": call.session_id, "deleted": True}


async def freeze_session(call: Call) -> tuple[int, Any]:
    """POST /admin/windows."""
    body = await call.body(
        {
            "session_id": lambda name, value: check_session_id(value, name),
            "window_name": lambda name, value: check_window_name(value, name),
            "description": fields.description,
            "tags": fields.tags,
            "ttl_seconds": fields.seconds,
        },
        required=("session_id", "window_name"),
    )
    naming = freeze.Naming(
        body["window_name"], body.get("description", ""), body.get("tags", ()), body.get("ttl_seconds")
    )  # fmt: skip
    window, warnings = await freeze.freeze(call.parts, call.tenant, body["session_id"], naming, call.progress)
    return 201, {**show.window(window), "warnings": warnings}


async def list_windows(call: Call) -> tuple[int, Any]:
    """GET /admin/windows."""
    q = call.query(
        {
            "tags": fields.tags,
            "model": _model,
            "session_id": lambda name, value: check_session_id(value, name),
            "search": lambda name, value: fields.text(name, value, longest=200),
            "created_after": fields.when,
            "created_before": fields.when,
            "sort_by": fields.one_of(*SORT_KEYS),
            "sort_order": fields.one_of("asc", "desc"),
            "limit": _LIMIT,
            "offset": _OFFSET,
        }
    )
    descending = q.pop("sort_order", "desc") == "desc"
    query = WindowQuery(**q, descending=descending)
    page, total = await call.parts.store.list_windows(call.tenant, query)
    shown = [show.window_line(w) for w in page]
    return 200, {"windows": shown, **show.paging(len(page), total, query.limit, query.offset)}


async def window_status(call: Call) -> tuple[int, Any]:
    """GET /admin/windows/{name}."""
    q = call.query({"include_blocks": fields.flag, "include_lineage": fields.flag})
    window = await thaw.found(call.parts, call.tenant, call.window_name)
    manifest = await call.parts.store.manifest(window.manifest)
    keys = {o.key for o in manifest.objects}
    present, warnings = await call.parts.pins.present(show.keys_of(keys))
    status = show.window_status(window, manifest, present)
    if q.get("include_blocks"):
        status["blocks"] = show.blocks(manifest, present)
    if q.get("include_lineage"):
        ancestors, clones = await call.parts.store.lineage(call.tenant, window.name)
        status["lineage"] = {"parent": window.parent, "ancestors": ancestors, "clones": clones}
    return 200, {**status, "warnings": warnings}


async def delete_window(call: Call) -> tuple[int, Any]:
    """DELETE /admin/windows/{name}."""
    call.query({})
    done = await delete.delete(call.parts, call.tenant, call.window_name)
    return 200, {"window_name": call.window_name, **asdict(done)}


async def thaw_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/thaw."""
    body = await call.body(
        {
            "new_session_id": lambda name, value: check_session_id(value, name),
            "warm": fields.one_of("none", "cpu", "gpu"),
        }
    )
    session, window, receipt = await thaw.thaw(
        call.parts,
        call.tenant,
        call.window_name,
        new_session_id=body.get("new_session_id"),
        warm=body.get("warm", "none"),
        progress=call.progress,
    )
    return 200, {
        "session_id": session.id,
        "window_name": window.name,
        "model": window.model,
        "token_count": window.token_count,
        "cache_salt": window.salt,
        "receipt": thaw.as_json(receipt),
        "warnings": receipt.warnings,
    }


async def clone_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/clone."""
    body = await call.body(
        {
            "target_window": lambda name, value: check_window_name(value, name),
            "description": fields.description,
            "tags": fields.tags,
        },
        required=("target_window",),
    )
    naming = freeze.Naming(body["target_window"], body.get("description", ""), body.get("tags", ()))
    copy = await clone.clone(call.parts, call.tenant, call.window_name, naming)
    shared = copy.chunk_count * copy.world_size
    return 201, {"source_window": copy.parent, "target_window": copy.name, "shared_blocks": shared, **show.window(copy)}


async def window_messages(call: Call) -> tuple[int, Any]:
    """GET /admin/windows/{name}/messages."""
    call.query({})
    window = await thaw.found(call.parts, call.tenant, call.window_name)
    frame = await call.parts.store.frame(window.frame) if window.frame else {}
    return 200, {
        "window_name": window.name,
        "messages": await call.parts.store.messages(window.transcript),
        "frame": frame,
    }


async def health(call: Call) -> tuple[int, Any]:
    """GET /admin/health."""
    q = call.query({"component": fields.one_of(*COMPONENTS)})
    return 200, call.health.summary(await call.health.components(q.get("component")))


async def doctor(call: Call) -> tuple[int, Any]:
    """POST /admin/doctor: run the self-test now."""
    await call.body({})
    checks = await call.health.test()
    return 200, {"ok": all(c.status != "failed" for c in checks), "checks": [asdict(c) for c in checks]}


class Endpoint:
    """One method of one route as an ASGI application: key, call, answer; errors in one shape."""

    def __init__(self, verb: Verb) -> None:
        self._verb = verb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        request = Request(scope, receive)
        try:
            parts: Parts = request.state.parts
            _refuse_foreign(request)
            call = Call(request, auth.tenant(scope["headers"], parts.settings.api_key))
            if request.headers.get("accept") == _NDJSON:
                answer: ASGIApp = _Progressing(self._verb, call)
            else:
                answer = _answer(*await self._verb(call))
        except (ClientGone, ClientDisconnect):
            return
        except GatewayError as error:
            answer = error_answer(error)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = error_answer(GatewayError("internal", "the gateway failed; its log says why"))
        await answer(scope, receive, send)


class _Progressing:
    """An answer that tells progress: a line of JSON for each step, the last one with the result or the error."""

    def __init__(self, verb: Verb, call: Call) -> None:
        self._verb = verb
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()

        def tell(stage: str, done: int, total: int) -> None:
            lines.put_nowait(orjson.dumps({"progress": {"stage": stage, "done": done, "total": total}}) + b"\n")

        self._call.progress = tell
        # A client that stops watching does not undo the work: it goes on as it would without progress.
        task = asyncio.create_task(self._finish(lines))
        headers = [(b"content-type", _NDJSON.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while (line := await lines.get()) is not None:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        await task

    async def _finish(self, lines: "asyncio.Queue[bytes | None]") -> None:
        try:
            status, result = await self._verb(self._call)
            lines.put_nowait(orjson.dumps({"status": status, "result": result}) + b"\n")
        except ClientGone:
            pass
        except GatewayError as error:
            lines.put_nowait(_error_line(error))
        except Exception:
            log.exception("%s failed", self._verb.__name__)
            lines.put_nowait(_error_line(GatewayError("internal", "the gateway failed; its log says why")))
        finally:
            lines.put_nowait(None)


async def healthz(_: Request) -> Response:
    """GET /healthz: this process answers."""
    return _answer(200, {"status": "ok"})


async def readyz(request: Request) -> Response:
    """GET /readyz: requests will succeed."""
    seen: Health = request.state.health
    if seen.ready:
        return _answer(200, {"status": "ready"})
    why = "isolation" if seen.leaking else "engine" if not seen.engine_up else "self-test"
    return _answer(503, {"status": "not ready", "waiting_for": why})


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


def routes() -> list[BaseRoute]:
    """Every route of the admin door and of health."""
    served: list[tuple[str, str, Verb]] = [
        ("GET", "/admin/sessions", list_sessions),
        ("GET", "/admin/sessions/{session_id}", get_session),
        ("DELETE", "/admin/sessions/{session_id}", delete_session),
        ("POST", "/admin/windows", freeze_session),
        ("GET", "/admin/windows", list_windows),
        ("GET", "/admin/windows/{name}", window_status),
        ("DELETE", "/admin/windows/{name}", delete_window),
        ("POST", "/admin/windows/{name}/thaw", thaw_window),
        ("POST", "/admin/windows/{name}/clone", clone_window),
        ("GET", "/admin/windows/{name}/messages", window_messages),
        ("GET", "/admin/health", health),
        ("POST", "/admin/doctor", doctor),
    ]
    by_path: dict[str, dict[str, ASGIApp]] = {}
    for method, path, verb in served:
        by_path.setdefault(path, {})[method] = Endpoint(verb)
    admin: list[BaseRoute] = [
        Route(path, _Methods(methods), methods=list(methods)) for path, methods in by_path.items()
    ]
    return [*admin, Route("/healthz", healthz), Route("/readyz", readyz)]


class _Methods:
    """One path, by method."""

    def __init__(self, methods: dict[str, ASGIApp]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._methods[method](scope, receive, send)


def error_answer(error: GatewayError) -> Response:
    """An error in the admin API's shape."""
    return _answer(error.status, _shape(error))


def _error_line(error: GatewayError) -> bytes:
    return orjson.dumps({"status": error.status, **_shape(error)}) + b"\n"


def _shape(error: GatewayError) -> dict[str, Any]:
    return {
        "error": {
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "retryable": error.retryable,
            "details": error.details,
        }
    }


def _answer(status: int, value: Any) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _refuse_foreign(request: Request) -> None:
    """Refuse what a page of another site makes a browser send: where there is no key, that is all it takes."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
        raise GatewayError("forbidden", f"requests from {origin!r:.200} are not served here")


def _model(name: str, value: object) -> str:
    return fields.text(name, value, longest=500)


def _no_session(session_id: str) -> GatewayError:
    return GatewayError(
        "session_not_found", f"there is no session {session_id!r}", hint="GET /admin/sessions lists them"
    )

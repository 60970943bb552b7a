"""The admin door: the verbs over HTTP, as JSON, and the probes. `gateway.edge.endpoint` is what they share."""

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway.edge import cache, fields, metrics, policies, show, transfer, verbs
from gateway.edge.endpoint import Call, Endpoint, Methods, Verb, json_answer
from gateway.edge.health import COMPONENTS, Health
from gateway.errors import GatewayError
from gateway.records import check_session_id, check_window_name
from gateway.store.contract import SORT_KEYS, WindowQuery
from gateway.windows import clone, delete, forget, freeze, isolate, thaw

_LIMIT = fields.whole(1, 100)
_OFFSET = fields.whole(0, 2**31)
_STATES = ("active", "frozen", "thawed", "expired")


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
    model = call.parts.engines.known(session.model)
    return 200, {
        **show.session(session),
        "context_limit": model.context_limit if model else None,
        "estimates": call.parts.estimator.report().get(session.model),
        "turns": [show.turn(t) for t in turns],
        "windows": [w.name for w in windows],
    }


async def delete_session(call: Call) -> tuple[int, Any]:
    """DELETE /admin/sessions/{session_id}."""
    call.query({})
    done = await forget.delete_session(call.parts, call.tenant, call.session_id)
    return 200, {
        "session_id": call.session_id,
        "deleted": True,
        "blocks_deleted": done.blocks_deleted,
        "space_freed_bytes": done.space_freed_bytes,
        "warnings": done.warnings,
    }


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
            "isolate": fields.boolean,
        },
        required=("target_window",),
    )
    naming = freeze.Naming(body["target_window"], body.get("description", ""), body.get("tags", ()))
    isolated = body.get("isolate", False)
    warnings: list[str] = []
    if isolated:
        copy, warnings = await isolate.isolate(call.parts, call.tenant, call.window_name, naming)
    else:
        copy = await clone.clone(call.parts, call.tenant, call.window_name, naming)
    return 201, {
        "source_window": copy.parent,
        "target_window": copy.name,
        "shared_blocks": 0 if isolated else copy.chunk_count * copy.world_size,
        "isolated": isolated,
        **show.window(copy),
        "warnings": warnings,
    }


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


async def healthz(_: Request) -> Response:
    """GET /healthz: this process answers."""
    return json_answer(200, {"status": "ok"})


async def readyz(request: Request) -> Response:
    """GET /readyz: requests will succeed."""
    seen: Health = request.state.health
    if seen.ready:
        return json_answer(200, {"status": "ready"})
    why = "isolation" if seen.leaking else "engine" if not seen.engine_up else "self-test"
    return json_answer(503, {"status": "not ready", "waiting_for": why})


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
        ("GET", "/admin/windows/{name}/export", transfer.export_window),
        ("POST", "/admin/windows/import", transfer.import_window),
        *verbs.SERVED,
        ("GET", "/admin/cache", cache.statistics),
        ("GET", "/admin/policies", policies.get_policies),
        ("PUT", "/admin/policies", policies.put_policies),
        ("DELETE", "/admin/policies", policies.delete_policies),
        ("POST", "/admin/policies/check", policies.check_policies),
        ("GET", "/admin/health", health),
        ("POST", "/admin/doctor", doctor),
        ("GET", "/admin/metrics", metrics.as_json),
    ]
    by_path: dict[str, dict[str, ASGIApp]] = {}
    for method, path, verb in served:
        by_path.setdefault(path, {})[method] = Endpoint(verb)
    admin: list[BaseRoute] = [Route(path, Methods(methods), methods=list(methods)) for path, methods in by_path.items()]
    return [
        *admin,
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics.prometheus),
    ]


def _model(name: str, value: object) -> str:
    return fields.text(name, value, longest=500)


def _no_session(session_id: str) -> GatewayError:
    return GatewayError(
        "session_not_found", f"there is no session {session_id!r}", hint="GET /admin/sessions lists them"
    )

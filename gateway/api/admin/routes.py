"""The admin API's table of routes: the operations as JSON, and the probes. `gateway.api.endpoint` serves them."""

from dataclasses import asdict

from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway.api.admin import (
    archives,
    autofreeze,
    cache,
    continuation,
    metrics,
    models,
    openapi,
    serializers,
    windows,
)
from gateway.api.admin.models import requests
from gateway.api.endpoint import Call, Endpoint, Methods, json_answer
from gateway.api.operation import ENGINE, operation
from gateway.sessions.resolver import session_not_found
from gateway.store.types import WindowQuery
from gateway.windows import catalog, clone, delete, freeze, isolate, thaw
from gateway.windows.retention import orphans


@operation("GET", "/admin/sessions")
async def list_sessions(call: Call, query: requests.SessionsQuery) -> models.Sessions:
    """List sessions, last active first."""
    limit, offset = query.limit, query.offset
    await call.services.recorder.flush()
    by = orphans.expired_by(call.services.settings)
    page, total = await call.services.store.list_sessions(
        call.tenant, state=query.state, model=query.model, limit=limit, offset=offset, expired_by=by
    )
    shown = [models.SessionLine(**serializers.session_fields(s, by)) for s in page]
    return models.Sessions(sessions=shown, **serializers.paging(len(page), total, limit, offset))


@operation("GET", "/admin/sessions/{session_id}")
async def get_session(call: Call) -> models.Session:
    """Tell all about a session, its last turns too."""
    await call.services.recorder.flush()
    session = await call.services.store.session(call.tenant, call.session_id)
    if session is None:
        raise session_not_found(call.session_id)
    turns = await call.services.store.turns(call.tenant, session.id, limit=20)
    windows, _ = await call.services.store.list_windows(call.tenant, WindowQuery(session_id=session.id, limit=100))
    model = call.services.engines.known(session.model)
    return models.Session(
        **serializers.session_fields(session, orphans.expired_by(call.services.settings)),
        context_limit=model.context_limit if model else None,
        estimates=serializers.estimates(call.services.estimator.report().get(session.model)),
        turns=[serializers.turn(t) for t in turns],
        windows=[w.name for w in windows],
        warnings=serializers.crowding(session.token_count, model.context_limit if model else None),
    )


@operation("DELETE", "/admin/sessions/{session_id}", errors=("session_busy",))
async def delete_session(call: Call) -> models.SessionDeleted:
    """Delete a session, and the KV that only it needed."""
    done = await orphans.delete_session(call.services, call.tenant, call.session_id)
    return models.SessionDeleted(
        session_id=call.session_id,
        deleted=True,
        blocks_deleted=done.blocks_deleted,
        space_freed_bytes=done.space_freed_bytes,
        warnings=list(done.warnings),
    )


@operation(
    "POST", "/admin/windows", status=201, errors=("session_not_found", "session_busy", "window_already_exists", *ENGINE)
)
async def freeze_session(call: Call, body: requests.FreezeRequest) -> models.Frozen:
    """Freeze a session into a window."""
    naming = freeze.Naming(
        body.window_name, body.description or "", body.tags or (), body.ttl_seconds
    )  # fmt: skip
    window, warnings = await freeze.freeze(call.services, call.tenant, body.session_id, naming, call.progress)
    return models.Frozen(**serializers.window_fields(window), warnings=warnings)


@operation("GET", "/admin/windows")
async def list_windows(call: Call, query: requests.WindowsQuery) -> models.Windows:
    """List windows, newest first unless sorted otherwise."""
    filters = query.model_dump(exclude_none=True, exclude={"sort_order"})
    wanted = WindowQuery(**filters, descending=query.sort_order == "desc")
    page, total = await call.services.store.list_windows(call.tenant, wanted)
    shown = [models.WindowLine(**serializers.window_line_fields(w)) for w in page]
    return models.Windows(windows=shown, **serializers.paging(len(page), total, query.limit, query.offset))


@operation("GET", "/admin/windows/{name}")
async def window_status(call: Call, query: requests.StatusQuery) -> models.WindowStatus:
    """Tell all about a window, and where its bytes are now."""
    window = await catalog.get_window(call.services, call.tenant, call.window_name)
    held = await call.services.store.sizes(window)
    present, warnings = await call.services.pins.present([*{key: None for have in held.values() for key in have}])
    status = serializers.window_status_fields(window, held, present)
    if query.include_blocks:
        status["blocks"] = serializers.blocks(await call.services.store.pinned(window), present)
    if query.include_lineage:
        ancestors, clones = await call.services.store.lineage(call.tenant, window.name)
        status["lineage"] = {"parent": window.parent, "ancestors": ancestors, "clones": clones}
    return models.WindowStatus(**status, warnings=warnings)


@operation("DELETE", "/admin/windows/{name}")
async def delete_window(call: Call) -> models.WindowDeleted:
    """Delete a window for good, and the KV that no other holds."""
    done = await delete.delete(call.services, call.tenant, call.window_name)
    return models.WindowDeleted(window_name=call.window_name, **asdict(done))


@operation("POST", "/admin/windows/{name}/thaw", errors=("session_already_exists", "window_corrupted", *ENGINE))
async def thaw_window(call: Call, body: requests.ThawRequest) -> models.Thawed:
    """Thaw a window into a new session."""
    prompt, max_tokens = body.continuation_prompt, body.max_tokens
    await continuation.check(call, prompt, max_tokens)
    session, window, receipt = await thaw.thaw(
        call.services,
        call.tenant,
        call.window_name,
        new_session_id=body.new_session_id,
        warm=body.warm,
        progress=call.progress,
    )
    return models.Thawed(
        session_id=session.id,
        window_name=window.name,
        model=window.model,
        token_count=window.token_count,
        cache_salt=window.salt,
        receipt=models.ThawReceipt.model_validate(receipt),
        warnings=receipt.warnings,
        continuation=await continuation.go_on(call, session, prompt, max_tokens) if prompt else None,
    )


@operation(
    "POST",
    "/admin/windows/{name}/clone",
    status=201,
    errors=("window_already_exists", "window_corrupted", "cache_unavailable"),
)
async def clone_window(call: Call, body: requests.CloneRequest) -> models.Cloned:
    """Give a window a second name; no KV byte is copied."""
    naming = freeze.Naming(body.target_window, body.description or "", body.tags or ())
    isolated = body.isolate
    warnings: list[str] = []
    if isolated:
        copy, warnings = await isolate.isolate(call.services, call.tenant, call.window_name, naming)
    else:
        copy = await clone.clone(call.services, call.tenant, call.window_name, naming)
    return models.Cloned(
        source_window=call.window_name,
        target_window=copy.name,
        shared_blocks=copy.chunk_count * copy.world_size,
        isolated=isolated,
        **serializers.window_fields(copy),
        warnings=warnings,
    )


@operation("GET", "/admin/windows/{name}/messages", errors=("window_corrupted",))
async def window_messages(call: Call) -> models.Messages:
    """The text of a window."""
    window = await catalog.get_window(call.services, call.tenant, call.window_name)
    text = await call.services.store.text(window)
    return models.Messages(window_name=window.name, messages=list(text.messages), frame=dict(text.frame or {}))


@operation("GET", "/admin/health")
async def health(call: Call, query: requests.HealthQuery) -> models.Health:
    """Look at every component, or at one, now."""
    return models.Health.model_validate(call.health.summary(await call.health.components(query.component)))


@operation("POST", "/admin/doctor")
async def doctor(call: Call) -> models.Doctor:
    """Run the self-test now."""
    checks = await call.health.test()
    shown = [models.Check.model_validate(check) for check in checks]
    return models.Doctor(ok=all(check.status != "failed" for check in checks), checks=shown)


@operation("GET", "/healthz", probe=True)
async def healthz(_: Call) -> models.Alive:
    """Tell that this process answers."""
    return models.Alive(status="ok")


@operation("GET", "/readyz", answer=models.Ready, probe=True, also={503: models.NotReady})
async def readyz(call: Call) -> models.Ready | Response:
    """Tell whether requests will succeed."""
    waits = call.health.waiting_for
    if waits is None:
        return models.Ready(status="ready")
    part, why = waits
    return json_answer(503, models.NotReady(status="not ready", waiting_for=part, reason=why))


OPERATIONS = (
    list_sessions,
    get_session,
    delete_session,
    freeze_session,
    list_windows,
    window_status,
    delete_window,
    thaw_window,
    clone_window,
    window_messages,
    *archives.OPERATIONS,
    *windows.OPERATIONS,
    *autofreeze.OPERATIONS,
    cache.statistics,
    health,
    doctor,
    metrics.as_json,
    healthz,
    readyz,
    metrics.prometheus,
)


def routes() -> list[BaseRoute]:
    """Every route of the admin door and of health, and the document that describes them."""
    by_path: dict[str, dict[str, ASGIApp]] = {}
    for one in (*OPERATIONS, openapi.documented(OPERATIONS)):
        by_path.setdefault(one.path, {})[one.method] = Endpoint(one)
    return [Route(path, Methods(methods), methods=list(methods)) for path, methods in by_path.items()]

"""The admin door: the verbs over HTTP, as JSON, and the probes. `gateway.api.endpoint` is what they share."""

from dataclasses import asdict
from typing import Any, get_args

from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway.api import parameters
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
from gateway.api.endpoint import Call, Endpoint, Methods, json_answer
from gateway.api.health import COMPONENTS
from gateway.api.operation import ENGINE, operation
from gateway.records import SessionState
from gateway.sessions.resolver import session_not_found
from gateway.store.types import SORT_KEYS, WindowQuery
from gateway.validation.fields import Field
from gateway.windows import ask, catalog, clone, delete, freeze, isolate, thaw
from gateway.windows.retention import orphans

_PAGE = {"limit": parameters.whole(1, 100).default(50), "offset": parameters.whole(0, 2**31).default(0)}
_NAMING: dict[str, Field[Any]] = {"description": parameters.description, "tags": parameters.tags}


@operation(
    "GET",
    "/admin/sessions",
    query={"state": parameters.one_of(*get_args(SessionState)), "model": parameters.line(500), **_PAGE},
)
async def list_sessions(call: Call) -> models.Sessions:
    """List sessions, last active first."""
    q = call.given
    limit, offset = q["limit"], q["offset"]
    await call.services.recorder.flush()
    by = orphans.expired_by(call.services.settings)
    page, total = await call.services.store.list_sessions(
        call.tenant, state=q.get("state"), model=q.get("model"), limit=limit, offset=offset, expired_by=by
    )
    shown = [models.SessionLine(**serializers.session_fields(s, by)) for s in page]
    return models.Sessions(sessions=shown, **serializers.paging(len(page), total, limit, offset))


@operation(
    "GET",
    "/admin/sessions/{session_id}",
)
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
    "POST",
    "/admin/windows",
    status=201,
    body={
        "session_id": parameters.session_id,
        "window_name": parameters.window_name,
        **_NAMING,
        "ttl_seconds": parameters.seconds,
    },
    required=("session_id", "window_name"),
    errors=("session_not_found", "session_busy", "window_already_exists", *ENGINE),
)
async def freeze_session(call: Call) -> models.Frozen:
    """Freeze a session into a window."""
    body = call.given
    naming = freeze.Naming(
        body["window_name"], body.get("description", ""), body.get("tags", ()), body.get("ttl_seconds")
    )  # fmt: skip
    window, warnings = await freeze.freeze(call.services, call.tenant, body["session_id"], naming, call.progress)
    return models.Frozen(**serializers.window_fields(window), warnings=warnings)


@operation(
    "GET",
    "/admin/windows",
    query={
        "tags": parameters.tags.about("only with all of these tags"),
        "model": parameters.line(500),
        "session_id": parameters.session_id,
        "search": parameters.line(200).about("only with this text in name or description"),
        "created_after": parameters.when,
        "created_before": parameters.when,
        "sort_by": parameters.one_of(*SORT_KEYS).default("created_at"),
        "sort_order": parameters.one_of("asc", "desc").default("desc"),
        **_PAGE,
    },
)
async def list_windows(call: Call) -> models.Windows:
    """List windows, newest first unless sorted otherwise."""
    q = call.given
    filters = {name: value for name, value in q.items() if name != "sort_order"}
    query = WindowQuery(**filters, descending=q["sort_order"] == "desc")
    page, total = await call.services.store.list_windows(call.tenant, query)
    shown = [models.WindowLine(**serializers.window_line_fields(w)) for w in page]
    return models.Windows(windows=shown, **serializers.paging(len(page), total, query.limit, query.offset))


@operation(
    "GET",
    "/admin/windows/{name}",
    query={"include_blocks": parameters.flag.default(False), "include_lineage": parameters.flag.default(False)},
)
async def window_status(call: Call) -> models.WindowStatus:
    """Tell all about a window, and where its bytes are now."""
    q = call.given
    window = await catalog.get_window(call.services, call.tenant, call.window_name)
    held = await call.services.store.sizes(window)
    present, warnings = await call.services.pins.present([*{key: None for have in held.values() for key in have}])
    status = serializers.window_status_fields(window, held, present)
    if q["include_blocks"]:
        status["blocks"] = serializers.blocks(await call.services.store.pinned(window), present)
    if q["include_lineage"]:
        ancestors, clones = await call.services.store.lineage(call.tenant, window.name)
        status["lineage"] = {"parent": window.parent, "ancestors": ancestors, "clones": clones}
    return models.WindowStatus(**status, warnings=warnings)


@operation(
    "DELETE",
    "/admin/windows/{name}",
)
async def delete_window(call: Call) -> models.WindowDeleted:
    """Delete a window for good, and the KV that no other holds."""
    done = await delete.delete(call.services, call.tenant, call.window_name)
    return models.WindowDeleted(window_name=call.window_name, **asdict(done))


@operation(
    "POST",
    "/admin/windows/{name}/thaw",
    body={
        "new_session_id": parameters.session_id.about("made up if not given"),
        "warm": parameters.one_of("none", "cpu", "gpu").default("none"),
        "continuation_prompt": windows.question.about("sent at once as the new session's next turn"),
        "max_tokens": parameters.count(1, ask.MAX_TOKENS).about("of the answer to continuation_prompt"),
    },
    errors=("session_already_exists", "window_corrupted", *ENGINE),
)
async def thaw_window(call: Call) -> models.Thawed:
    """Thaw a window into a new session."""
    body = call.given
    prompt, max_tokens = body.get("continuation_prompt"), body.get("max_tokens")
    await continuation.check(call, prompt, max_tokens)
    session, window, receipt = await thaw.thaw(
        call.services,
        call.tenant,
        call.window_name,
        new_session_id=body.get("new_session_id"),
        warm=body["warm"],
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
    body={
        "target_window": parameters.window_name,
        **_NAMING,
        "isolate": parameters.boolean.default(False).about("under a salt of its own"),
    },
    required=("target_window",),
    errors=("window_already_exists", "window_corrupted", "cache_unavailable"),
)
async def clone_window(call: Call) -> models.Cloned:
    """Give a window a second name; no KV byte is copied."""
    body = call.given
    naming = freeze.Naming(body["target_window"], body.get("description", ""), body.get("tags", ()))
    isolated = body["isolate"]
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


@operation("GET", "/admin/health", query={"component": parameters.one_of(*COMPONENTS)})
async def health(call: Call) -> models.Health:
    """Look at every component, or at one, now."""
    q = call.given
    return models.Health.model_validate(call.health.summary(await call.health.components(q.get("component"))))


@operation(
    "POST",
    "/admin/doctor",
)
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

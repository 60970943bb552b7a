"""The admin API's operations and its table of routes. `gateway.api.endpoint` serves them.

Lists, the tree and the status of a window are answered as plain objects, and their models document them: making models
of a page took a tenth of the time of its request. The tests hold every answer against its schema.
"""

import asyncio
from dataclasses import asdict

from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway.api import selftest
from gateway.api.admin import (
    archives,
    autofreeze,
    cache,
    continuation,
    current_session,
    engines,
    ledger,
    metrics,
    openapi,
    search,
    serializers,
    windows,
)
from gateway.api.admin.models import requests, responses, status, transcripts
from gateway.api.endpoint import Call, Endpoint, Methods, json_answer
from gateway.api.operation import ENGINE, operation
from gateway.api.schemas import Json
from gateway.errors import invalid_field
from gateway.sessions.resolver import session_not_found
from gateway.store.types import WindowQuery
from gateway.windows import catalog, clone, delete, freeze, residency, rewind, thaw
from gateway.windows.retention import orphans


@operation("GET", "/admin/sessions", answer=responses.Sessions)
async def list_sessions(call: Call, query: requests.SessionsQuery) -> Json:
    """List sessions, last active first."""
    await call.services.recorder.flush()
    expired_by = orphans.expired_by(call.services.settings)
    page, total = await call.services.store.listed_sessions(call.tenant, expired_by=expired_by, **query.model_dump())
    lines = [{**serializers.session_fields(s, expired_by), "saved": saved} for s, saved in page]
    return {"sessions": lines, **serializers.paging(len(page), total, query.limit, query.offset)}


@operation("GET", "/admin/sessions/{session_id}")
async def get_session(call: Call) -> responses.Session:
    """Describe a session, with its last turns."""
    await call.services.recorder.flush()
    session = await call.services.store.session(call.tenant, call.session_id)
    if session is None:
        raise session_not_found(call.session_id)
    turns = await call.services.store.turns(call.tenant, session.id, limit=20)
    windows, _ = await call.services.store.list_windows(call.tenant, WindowQuery(session_id=session.id, limit=100))
    model = call.services.engines.known(session.model)
    saved = await call.services.store.saved(call.tenant, "session", [session.id])
    return responses.Session(
        **serializers.session_fields(session, orphans.expired_by(call.services.settings)),
        context_limit=model.context_limit if model else None,
        estimates=serializers.estimates(call.services.estimator.report().get(session.model)),
        saved=serializers.saved(saved[session.id]),
        turns=[serializers.turn(t) for t in turns],
        windows=[w.name for w in windows],
        warnings=serializers.context_limit_warnings(session.token_count, model.context_limit if model else None),
    )


@operation("DELETE", "/admin/sessions/{session_id}", errors=("session_busy",))
async def delete_session(call: Call) -> responses.SessionDeleted:
    """Delete a session, and the KV that only it needed."""
    result = await orphans.delete_session(call.context, call.session_id)
    return responses.SessionDeleted(
        session_id=call.session_id,
        deleted=True,
        blocks_deleted=result.blocks_deleted,
        space_freed_bytes=result.space_freed_bytes,
        warnings=list(result.warnings),
    )


@operation(
    "POST", "/admin/windows", status=201, errors=("session_not_found", "session_busy", "window_already_exists", *ENGINE)
)
async def freeze_session(call: Call, body: requests.FreezeRequest) -> responses.Frozen:
    """Freeze a session into a window."""
    naming = freeze.Naming(body.window_name, body.description, body.tags, body.ttl_seconds)
    window, warnings = await freeze.freeze(call.context, body.session_id, naming)
    return responses.Frozen(**serializers.window_fields(window, call.now), warnings=list(warnings))


@operation("GET", "/admin/windows/{name}", answer=responses.WindowStatus)
async def window_status(call: Call, query: requests.StatusQuery) -> Json:
    """Describe a window, and where its bytes are now."""
    window = await catalog.get_window(call.services, call.tenant, call.window_name)
    pinned, saved = await call.services.store.sizes_and_saved(window)
    keys = dict.fromkeys(key for sizes in pinned.values() for key in sizes)
    present, caches, warnings = await residency.find(call.services, window, [*keys])
    fields = serializers.window_status_fields(window, call.now, pinned, present)
    fields |= {"saved": saved, "caches": caches}
    if query.include_lineage:
        ancestors, clones = await call.services.store.lineage(call.tenant, window.name)
        fields["lineage"] = {"parent": window.parent, "ancestors": ancestors, "clones": clones}
    if query.include_blocks:  # tens of thousands
        fields["blocks"] = await asyncio.to_thread(
            serializers.blocks, await call.services.store.pinned(window), present
        )
    return {**fields, "warnings": warnings}


@operation("DELETE", "/admin/windows/{name}")
async def delete_window(call: Call) -> responses.WindowDeleted:
    """Delete a window permanently, and the KV that no other window uses."""
    result = await delete.delete(call.context, call.window_name)
    return responses.WindowDeleted(window_name=call.window_name, **asdict(result))


@operation(
    "POST",
    "/admin/windows/{name}/thaw",
    errors=(
        "session_already_exists",
        "session_not_found",
        "session_busy",
        "window_already_exists",
        "window_corrupted",
        "storage_full",
        *ENGINE,
    ),
)
async def thaw_window(call: Call, body: requests.ThawRequest) -> responses.Thawed:
    """Thaw a window into a new session, or take an existing one back to it."""
    prompt, max_tokens = body.continuation_prompt, body.max_tokens
    await continuation.check(call, prompt, max_tokens)
    operation = thaw.thaw_text if body.as_text else thaw.thaw
    session, window, receipt, replaced = await operation(
        call.context,
        call.window_name,
        new_session_id=body.new_session_id,
        warm=body.warm,
        at_turn=body.at_turn,
        rewound=_rewound(body),
    )
    return responses.Thawed(
        session_id=session.id,
        window_name=window.name,
        model=session.model,
        token_count=session.token_count,
        cache_salt=session.salt,
        receipt=responses.ThawReceipt.model_validate(receipt),
        warnings=list(receipt.warnings),
        replaced=None if replaced is None else responses.Replaced.model_validate(replaced),
        continuation=await continuation.send_prompt(call, session, prompt, max_tokens) if prompt else None,
    )


def _rewound(body: requests.ThawRequest) -> rewind.Rewound | None:
    """The session to take back, if there is one. Raises `invalid_request` for fields that exclude each other."""
    if body.into_session is None:
        if body.keep_as is not None:
            raise invalid_field("keep_as", "keep_as keeps what into_session has, which is not given")
        return None
    if body.new_session_id is not None:
        message = "new_session_id makes a new session, into_session takes an existing one: give one of them"
        raise invalid_field("into_session", message)
    return rewind.Rewound(body.into_session, body.keep_as)


@operation(
    "POST",
    "/admin/windows/{name}/clone",
    status=201,
    errors=("window_already_exists", "window_corrupted", "cache_unavailable", *ENGINE),
)
async def clone_window(call: Call, body: requests.CloneRequest) -> responses.Cloned:
    """Give a window a second name; no KV byte is copied."""
    naming = freeze.Naming(body.target_window, body.description, body.tags)
    make_copy = clone.isolate if body.isolate else clone.clone
    ancestors = await call.services.store.ancestors(call.tenant, call.window_name)
    copy, warnings = await make_copy(call.context, call.window_name, naming, body.at_turn)
    return responses.Cloned(
        source_window=call.window_name,
        target_window=copy.name,
        shared_blocks=copy.chunk_count * copy.world_size,
        isolated=body.isolate,
        ancestors=[call.window_name, *ancestors],
        **serializers.window_fields(copy, call.now),
        warnings=list(warnings),
    )


@operation("GET", "/admin/windows/{name}/messages", errors=("window_corrupted",))
async def window_messages(call: Call) -> transcripts.Messages:
    """The text of a window."""
    window = await catalog.get_window(call.services, call.tenant, call.window_name)
    text = await call.services.store.text(window)
    return transcripts.Messages(
        window_name=window.name, **await asyncio.to_thread(serializers.transcript, text.messages, text.frame)
    )


@operation("GET", "/admin/sessions/{session_id}/messages")
async def session_messages(call: Call) -> transcripts.SessionMessages:
    """The text of a session, as of its last finished turn."""
    await call.services.recorder.flush()
    found = await call.services.store.snapshot(call.tenant, call.session_id)
    if found is None:
        raise session_not_found(call.session_id)
    session, text = found
    return transcripts.SessionMessages(
        session_id=session.id, **await asyncio.to_thread(serializers.transcript, text.messages, text.frame)
    )


@operation("GET", "/admin/health")
async def health(call: Call, query: requests.HealthQuery) -> status.Health:
    """Check every component now, or one of them."""
    return status.Health.model_validate(call.health.summary(await call.health.components(query.component)))


@operation("POST", "/admin/doctor")
async def doctor(call: Call) -> status.Doctor:
    """Run the self-test now."""
    checks = await call.health.test()
    shown = [status.Check.model_validate(check) for check in checks]
    keeps_kv = selftest.keeps_kv(call.services, checks)
    passed = all(check.status != "failed" for check in checks)
    return status.Doctor(ok=bool(keeps_kv) and passed, keeps_kv=keeps_kv, checks=shown)


@operation("GET", "/healthz", probe=True)
async def healthz(_: Call) -> status.Alive:
    """Whether this process answers."""
    return status.Alive(status="ok")


@operation("GET", "/readyz", answer=status.Ready, probe=True, also={503: status.NotReady})
async def readyz(call: Call) -> status.Ready | Response:
    """Whether requests will succeed."""
    waiting_for = call.health.waiting_for
    if waiting_for is None:
        return status.Ready(status="ready")
    component, reason = waiting_for
    return json_answer(503, status.NotReady(status="not ready", waiting_for=component, reason=reason))


OPERATIONS = (  # in the order in which their paths are tried: what is asked for most comes first
    window_status,
    *search.OPERATIONS,
    list_sessions,
    get_session,
    current_session.current_session,
    delete_session,
    freeze_session,
    delete_window,
    thaw_window,
    clone_window,
    window_messages,
    session_messages,
    *archives.OPERATIONS,
    *windows.OPERATIONS,
    *autofreeze.OPERATIONS,
    cache.statistics,
    *engines.OPERATIONS,
    ledger.ledger,
    health,
    doctor,
    metrics.as_json,
    healthz,
    readyz,
    metrics.prometheus,
)


def routes() -> list[BaseRoute]:
    """Every route of the admin API, and the document that describes them."""
    by_path: dict[str, dict[str, ASGIApp]] = {}
    for one in (*OPERATIONS, openapi.documented(OPERATIONS)):
        by_path.setdefault(one.path, {})[one.method] = Endpoint(one)
    return [Route(path, Methods(methods), methods=list(methods)) for path, methods in by_path.items()]

"""Freeze a session into a window. "Frozen" means what was verified in a tier, not what was expected.

1. Snapshot the session at its last finished turn.
2. Ask the engine for the token ids with which the next turn will begin.
3. Compute what is missing: every whole chunk that no tier has yet.
4. Barrier: wait until each object is seen in a durable tier, by its own name.
5. Pin and checksum each object.
6. Commit the window with its manifest and the text of the snapshot, in one transaction. Only now does the window exist;
a crash before this leaves pins that the next sweep takes away.

Nothing holds the session meanwhile: it may go on, be edited or be deleted. The window is what the snapshot was.
"""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

from gateway.dialects import transcripts
from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.kv.tiers.base import TierFull
from gateway.records import Manifest, PinnedObject, Session, Usage, Window
from gateway.runtime.progress import Progress, silent
from gateway.sessions.resolver import session_not_found
from gateway.store.types import Text
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.materialize import Plan, ensure_stored, pin, plan
from gateway.windows.next_turn import next_turn_ids
from gateway.windows.receipt import with_receipt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Naming:
    """What the caller says of a new window."""

    name: str
    description: str = ""
    tags: tuple[str, ...] = ()
    ttl_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A session at rest, and what it renders to."""

    session: Session
    text: Text
    model: Model
    ids: tuple[int, ...]
    salt: str


@dataclass(frozen=True, slots=True)
class _Freezing:
    """What every step of one freeze needs; `wanted` as in `freeze`."""

    services: Services
    snapshot: _Snapshot
    wanted: bool
    progress: Progress


@instrumented
async def freeze(
    services: Services,
    tenant: str,
    session_id: str,
    naming: Naming,
    progress: Progress = silent,
    *,
    wanted: bool = True,
) -> tuple[Window, list[str]]:
    """Freeze the session's last finished turn; return the window, and warnings where it is less than whole.

    A session that is deleted meanwhile leaves its window if that is `wanted`; if nobody asked for it, the freeze raises
    `session_not_found`. Raises `session_not_found`, `session_busy`, `window_already_exists`, `model_mismatch`,
    `engine_unreachable`, `engine_timeout`, `storage_full`. A cache or a tier that cannot be reached raises nothing: the
    window says what it lacks.
    """
    clock = time.monotonic()
    if await services.store.window(tenant, naming.name):
        raise window_name_taken(naming.name)
    progress("snapshot", 0, 0)
    snapshot = await _snapshot(services, tenant, session_id, progress)
    planned, warnings = await _plan(services, snapshot)
    async with all_or_nothing(services), _loose_unless_kept(services, snapshot):
        if planned and planned.keys:
            await services.pins.check_room(services.settings.disk_reserve_bytes)
        freezing = _Freezing(services, snapshot, wanted, progress)
        window = await _keep(freezing, planned, naming, warnings, clock)
    if planned and window.chunk_count < planned.chunks:
        await release_strays(services)  # chunks behind a hole were pinned too, and no window holds them
    return window, warnings


async def check_budget(services: Services, tenant: str, objects: Sequence[PinnedObject]) -> None:
    """Raise `storage_full` where a tenant's windows would hold more than its budget with these objects."""
    budget = services.settings.tenant_budget_bytes
    if budget and (held := await services.store.held_bytes(tenant, objects)) > budget:
        raise GatewayError(
            "storage_full",
            f"the windows would hold {held} bytes, {held - budget} more than they may (tenant_budget_bytes)",
            hint="delete windows that are not needed",
        )


async def release_strays(services: Services) -> int:
    """Unpin what no window holds; return how many objects that were."""
    async with services.pins.lock.acquire(exclusive=True):
        swept, warnings = await services.pins.sweep(await services.store.held_objects())
    for warning in warnings:
        log.warning("could not check for stray pins: %s", warning)
    return swept


@asynccontextmanager
async def all_or_nothing(services: Services) -> AsyncIterator[None]:
    """Where the block fails to make a window, let go of what it has pinned. Raises `storage_full` for a full tier."""
    try:
        yield
    except TierFull as error:
        await release_strays(services)
        hint = "free space, or delete windows that are not needed"
        raise GatewayError("storage_full", str(error), hint=hint) from error
    except BaseException:  # whatever it was: what nobody will commit must not stay pinned
        await release_strays(services)
        raise


@asynccontextmanager
async def _loose_unless_kept(services: Services, snapshot: _Snapshot) -> AsyncIterator[None]:
    """Where the block fails, a sweep looks at what it had the engine compute: its session may be gone by then."""
    try:
        yield
    except BaseException:
        await services.store.mark_orphaned(snapshot.salt, snapshot.session.tenant, snapshot.session.lineage)
        raise


def window_name_taken(name: str) -> GatewayError:
    """The error for a window name that is in use."""
    return GatewayError(
        "window_already_exists",
        f"window {name!r} already exists",
        hint="choose another name, or delete that window",
    )


async def _snapshot(services: Services, tenant: str, session_id: str, progress: Progress) -> _Snapshot:
    await services.recorder.flush()
    await services.turns.wait_until_idle(tenant, session_id, services.settings.busy_wait_s)
    found = await services.store.snapshot(tenant, session_id)
    if found is None:
        raise session_not_found(session_id)
    session, text = found
    if not text.messages:
        raise GatewayError(
            "invalid_request",
            f"session {session_id!r} has no finished turn yet",
            hint="freeze it after its first reply",
        )
    model = await services.engines.model(session.model)
    progress("render", 0, 0)
    engine = services.engines.for_lineage(session.lineage, session.engine)
    ids = await next_turn_ids(engine, model.id, text.frame or {}, text.messages)
    # What the turns ran under, a client's own salt folded in; other weights since then mean another salt.
    same = session.fingerprint == model.fingerprint
    salt = session.salt if same else services.salts.of(tenant, session.lineage, model.fingerprint)
    return _Snapshot(session, text, model, tuple(ids), salt)


async def _plan(services: Services, snapshot: _Snapshot) -> tuple[Plan | None, list[str]]:
    """Name the objects to keep, or say why none can be kept."""
    if services.cache is None or not services.pins.tiers:
        return None, [
            "no cache is configured (cache_url with kv_dir or kv_redis_url): only text and token ids were kept"
        ]
    if transcripts.has_media(snapshot.text.messages):
        return None, [
            "media in the conversation: its KV cannot be named by token ids, only text and token ids were kept"
        ]
    try:
        info = await services.cache.info()
        wanted = plan(snapshot.model, snapshot.salt, snapshot.ids, info, services.settings.chunk_size)
    except GatewayError as error:
        return None, [f"{error.message}: only text and token ids were kept"]
    if not wanted.keys:
        short = f"{len(snapshot.ids)} tokens are less than one chunk of {wanted.chunk_size}"
        return wanted, [f"{short}: there is nothing to keep, a thaw recomputes them"]
    return wanted, []


async def _keep(freezing: _Freezing, planned: Plan | None, naming: Naming, warnings: list[str], clock: float) -> Window:
    """Land, pin and commit; a second time where an object did not land or turned out to be damaged."""
    parts, snapshot, progress = freezing.services, freezing.snapshot, freezing.progress
    if planned is None or not planned.keys:
        return await _commit(freezing, _window(snapshot, planned, 0, (), naming, None, clock), ())
    engine = parts.engines.for_lineage(snapshot.session.lineage, snapshot.session.engine)
    for again in (False, True):
        usage, unreachable = await ensure_stored(parts, engine, planned, again=again, progress=progress)
        progress("pin", 0, len(planned.keys))
        # From the first pin to the commit nobody may unpin.
        async with parts.pins.lock.acquire(exclusive=False):
            chunks, objects = await pin(parts, planned)
            if chunks < planned.chunks and not again:
                continue
            warnings += unreachable
            if chunks < planned.chunks:
                warnings.append(f"{chunks} of {planned.chunks} chunks were seen in a tier: a thaw recomputes the rest")
            window = _window(snapshot, planned, chunks, objects, naming, usage, clock)
            return await _commit(freezing, window, objects)
    raise AssertionError("the second time always commits")


async def _commit(freezing: _Freezing, window: Window, objects: tuple[PinnedObject, ...]) -> Window:
    parts, snapshot = freezing.services, freezing.snapshot
    freezing.progress("commit", 0, 0)
    await check_budget(parts, window.tenant, objects)
    manifest = Manifest(window.manifest, snapshot.ids, objects)
    committed = await parts.store.add_window(
        window, manifest, snapshot.text, session=snapshot.session, wanted=freezing.wanted
    )
    if committed is None:
        raise window_name_taken(window.name)
    return committed


def _window(
    snapshot: _Snapshot, planned: Plan | None, chunks: int, objects: Sequence[PinnedObject], naming: Naming,
    usage: Usage | None, clock: float,
) -> Window:  # fmt: skip
    session, model = snapshot.session, snapshot.model
    now = time.time()
    window = Window(
        tenant=session.tenant,
        name=naming.name,
        session_id=session.id,
        lineage=session.lineage,
        salt=snapshot.salt,
        pin_salt=snapshot.salt,
        model=model.id,
        model_root=model.root,
        fingerprint=model.fingerprint,
        world_size=planned.world_size if planned else 1,
        token_count=len(snapshot.ids),
        chunk_size=planned.chunk_size if planned else 0,
        chunk_count=0,
        size_bytes=0,
        kv="absent",
        transcript=b"",
        frame=None,
        manifest=uuid4().hex,
        created_at=now,
        description=naming.description,
        tags=naming.tags,
        parent=session.window,
        expires_at=now + naming.ttl_seconds if naming.ttl_seconds is not None else None,
    )
    # The engine's own count, where something had to be computed.
    counts = {"prompt_tokens": usage.prompt if usage else None, "cached_tokens": usage.cached if usage else None}
    return with_receipt(window, chunks, objects, clock, counts)

"""Freeze a session into a window. "Frozen" means what was verified in a tier, not what was expected.

1. Snapshot the session at its last finished turn.
2. Ask the engine for the token ids with which the next turn will begin.
3. Compute what is missing: every whole chunk that no tier has yet.
4. Wait until each object is in a durable tier, by its own name.
5. Pin and checksum each object.
6. Commit the window with its manifest and the text of the snapshot, in one transaction. Only now does the window exist;
a crash before this leaves pins that the next gateway removes, and a claim that says which (`gateway.windows.claims`).

The session is not locked meanwhile: it may continue, be edited or be deleted. The window is what the snapshot was.
"""

import logging
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from gateway.dialects import transcripts
from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.records import Manifest, PinnedObject, Session, Usage, Window
from gateway.sessions.resolver import session_not_found
from gateway.store.types import Text
from gateway.telemetry import genai
from gateway.windows.catalog import NewWindow
from gateway.windows.claims import Claim
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.ensure_stored import NO_CACHE, Plan, ensure_stored, pin, plan, with_receipt
from gateway.windows.next_turn import next_turn_ids

log = logging.getLogger(__name__)

_NAMES_TRIED = 100  # sessions may share a shortened name within a second


@dataclass(frozen=True, slots=True)
class Naming:
    """The name of a new window, and what else its caller chooses. None: nothing, or in a clone as its source has it."""

    name: str
    description: str | None = None
    tags: tuple[str, ...] | None = None
    ttl_seconds: float | None = None


@instrumented
async def freeze(ctx: OperationContext, session_id: str, naming: Naming, *, wanted: bool = True) -> NewWindow:
    """Freeze the session's last finished turn.

    If the session is deleted meanwhile, the window is still made if it is `wanted`, that is, if somebody asked for it;
    else the freeze raises `session_not_found`. Raises `session_not_found`, `session_busy`, `window_already_exists`,
    `model_mismatch`, `engine_unreachable`, `engine_timeout`, `storage_full`. A cache or a tier that cannot be reached
    raises nothing: the window records what it lacks.
    """
    services = ctx.services
    if await services.store.window(ctx.tenant, naming.name):
        raise window_name_taken(naming.name)
    snapshot = await _snapshot(ctx, session_id)
    planned, warnings = await _plan(services, snapshot)
    async with _orphaned_on_failure(services, snapshot):
        window, more = await _Freeze(ctx, snapshot, naming, planned, wanted).run()
    return NewWindow(window, (*warnings, *more))


async def freeze_automatically(ctx: OperationContext, session_id: str, naming: Naming) -> NewWindow:
    """Freeze a session that nobody asked to freeze, as `naming.name`, or with a number appended if that is taken.

    Raises what `freeze` raises.
    """
    for number in range(1, _NAMES_TRIED + 1):
        numbered = naming if number == 1 else replace(naming, name=f"{naming.name}-{number}")
        try:
            return await freeze(ctx, session_id, numbered, wanted=False)
        except GatewayError as error:
            if error.code != "window_already_exists":
                raise
    raise GatewayError("window_already_exists", f"{naming.name} and {_NAMES_TRIED - 1} names like it are taken")


async def check_budget(services: Services, tenant: str, objects: Sequence[PinnedObject]) -> None:
    """Raise `storage_full` if these objects would take a tenant's windows over its budget."""
    budget = services.settings.tenant_budget_bytes
    if budget and (size := await services.store.held_bytes(tenant, objects)) > budget:
        raise GatewayError(
            "storage_full",
            f"the windows would hold {size} bytes, {size - budget} more than they may (tenant_budget_bytes)",
            hint="delete windows that are not needed",
        )


def window_name_taken(name: str) -> GatewayError:
    """The error for a window name that is in use."""
    return GatewayError(
        "window_already_exists", f"window {name!r} already exists", hint="choose another name, or delete that window"
    )


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A session between two turns, and the token ids of its next turn."""

    session: Session
    text: Text
    model: Model
    ids: Sequence[int]
    salt: str


@asynccontextmanager
async def _orphaned_on_failure(services: Services, snapshot: _Snapshot) -> AsyncIterator[None]:
    """If the block fails, leave the KV it had computed to the sweeper: its session may be deleted by then."""
    try:
        yield
    except BaseException:
        await services.store.mark_orphaned(snapshot.salt, snapshot.session.tenant, snapshot.session.lineage)
        raise


async def _snapshot(ctx: OperationContext, session_id: str) -> _Snapshot:
    services = ctx.services
    with ctx.step("snapshot"):
        await services.recorder.flush()
        await services.turns.wait_until_idle(ctx.tenant, session_id, services.settings.busy_wait_s)
        found = await services.store.snapshot(ctx.tenant, session_id)
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
    with ctx.step("render"):
        engine = services.engines.for_lineage(session.lineage, session.engine)
        ids = await next_turn_ids(engine, model.id, text.frame or {}, text.messages, any_length=True)
    if model.context_limit:  # of a longer conversation, what the engine can still be sent
        ids = ids[: model.context_limit - 1]
    # The salt of the turns includes a client's own salt; if the weights have changed since, it is another one.
    unchanged = session.fingerprint == model.fingerprint
    salt = session.salt if unchanged else services.salts.of(ctx.tenant, session.lineage, model.fingerprint)
    return _Snapshot(session, text, model, array("I", ids), salt)


async def _plan(services: Services, snapshot: _Snapshot) -> tuple[Plan | None, list[str]]:
    """Name the objects to pin, or say why there are none."""
    if services.cache is None or not services.pins.tiers:
        return None, [NO_CACHE]
    if transcripts.has_media(snapshot.text.messages):
        return None, [
            "media in the conversation: its KV cannot be named by token ids, only text and token ids were kept"
        ]
    try:
        info = await services.cache.info()
        planned = plan(snapshot.model, snapshot.salt, snapshot.ids, info, services.cache.chunk_size)
    except GatewayError as error:
        return None, [f"{error.message}: only text and token ids were kept"]
    if not planned.keys:
        short = f"{len(snapshot.ids)} tokens are less than one chunk of {planned.chunk_size}"
        return planned, [f"{short}: there is nothing to keep, a thaw recomputes them"]
    return planned, []


@dataclass(frozen=True, slots=True)
class _Freeze:
    """Steps 3 to 6 of one freeze; `wanted` as in `freeze`."""

    ctx: OperationContext
    snapshot: _Snapshot
    naming: Naming
    plan: Plan | None
    wanted: bool

    async def run(self) -> NewWindow:
        """Commit the window with the KV of the plan, if there is any."""
        keys = self.plan.keys if self.plan else ()
        return await self.ctx.services.claims.commit_under(keys, self._run)

    async def _run(self, claim: Claim) -> NewWindow:
        if self.plan is None or not self.plan.keys:
            return NewWindow(await self._commit(claim, 0, (), None))
        await self.ctx.services.pins.check_room(self.ctx.services.settings.disk_reserve_bytes)
        return await self._store_and_commit(claim, self.plan)

    async def _store_and_commit(self, claim: Claim, plan: Plan, *, again: bool = False) -> NewWindow:
        """Store, pin and commit; once `again` if an object did not reach a tier or its pin was damaged."""
        services, session = self.ctx.services, self.snapshot.session
        engine = services.engines.for_lineage(session.lineage, session.engine)
        usage, warnings = await ensure_stored(self.ctx, engine, plan, again=again)
        with self.ctx.step("pin", len(plan.keys)) as seen:
            chunks, objects = await pin(services, plan)
            seen[genai.DONE] = len(objects)
        if chunks < plan.chunks and again:
            warnings.append(f"{chunks} of {plan.chunks} chunks were seen in a tier: a thaw recomputes the rest")
        if chunks == plan.chunks or again:
            return NewWindow(await self._commit(claim, chunks, objects, usage), tuple(warnings))
        return await self._store_and_commit(claim, plan, again=True)

    async def _commit(
        self, claim: Claim, chunks: int, objects: tuple[PinnedObject, ...], usage: Usage | None
    ) -> Window:
        services, snapshot = self.ctx.services, self.snapshot
        # The engine's own counts, if it had to compute.
        counts = {"prompt_tokens": usage.prompt if usage else None, "cached_tokens": usage.cached if usage else None}
        window = with_receipt(self._window(), chunks, objects, self.ctx.duration_ms(), counts)
        with self.ctx.step("commit"):
            await check_budget(services, window.tenant, objects)
            manifest = Manifest(window.manifest, snapshot.ids, objects)
            committed = await claim.commit(
                window, manifest, snapshot.text, session=snapshot.session, wanted=self.wanted
            )
        if committed is None:
            raise window_name_taken(window.name)
        return committed

    def _window(self) -> Window:
        session, model, naming, now = self.snapshot.session, self.snapshot.model, self.naming, time.time()
        return Window(
            tenant=session.tenant,
            name=naming.name,
            session_id=session.id,
            lineage=session.lineage,
            salt=self.snapshot.salt,
            pin_salt=self.snapshot.salt,
            model=model.id,
            model_root=model.root,
            fingerprint=model.fingerprint,
            world_size=self.plan.world_size if self.plan else 1,
            token_count=len(self.snapshot.ids),
            chunk_size=self.plan.chunk_size if self.plan else 0,
            created_at=now,
            description=naming.description or "",
            tags=naming.tags or (),
            parent=session.window,
            expires_at=now + naming.ttl_seconds if naming.ttl_seconds is not None else None,
        )

"""Drain an engine: freeze the sessions that it served last, and load them where they will continue.

1. Mark the engine in the store: within `engine_check_s` no gateway and no worker sends it a request while another one
can take it. What it computes is finished.
2. Freeze each session that has continued since it was frozen last, as automatic freezing does, except those in a turn.
3. Load each of these windows into the cache of the engine that the session will continue at.

A call does this for as long as it may take, and says what is left; it is repeated until the engine is empty.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.engines.node import EngineNode
from gateway.errors import GatewayError, invalid_field
from gateway.records import Session, Window
from gateway.store.types import FreezeCandidate
from gateway.windows.autofreeze.service import AutofreezeService
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.placement import load, place

log = logging.getLogger(__name__)

_HORIZON_S = 86400.0  # a session that was idle for longer moves with its next turn, without a freeze
_PAGE = 256
_AT_ONCE = 2  # freezes: each has an engine compute a tail, and requests come first
_MARGIN_S = 1.0  # for the read of the store, and for a request that is on its way
_PASS_S = 20.0  # seconds after which a call begins no more freezes
_FORGET_S = 86400.0  # an engine that is drained and not configured is forgotten then


@dataclass(frozen=True, slots=True)
class Moved:
    """A session that was frozen, and the engine to which its next turn will go ("" if there is none).

    `chunks_loaded`: into the memory of that engine's cache; None if they were not loaded.
    """

    session_id: str
    window_name: str
    engine: str
    chunks_loaded: int | None


@dataclass(frozen=True, slots=True)
class NotMoved:
    """A session that could not be frozen, and why. It continues at another engine all the same."""

    session_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drained:
    """What one call of a drain did, and what is left.

    `requests`: those that the engine computes or that wait there, whoever sent them; None if it does not say. `busy`:
    sessions in a turn. `sessions_left`: those still to be frozen, busy and failed ones included. `seconds_left`: until
    every worker and every gateway of the store knows of the drain; until then one of them may send a request there.
    """

    engine: str
    draining: bool
    since: float | None
    moved: tuple[Moved, ...] = ()
    failed: tuple[NotMoved, ...] = ()
    busy: tuple[str, ...] = ()
    sessions_left: int = 0
    seconds_left: float = 0.0
    requests: int | None = None
    empty: bool = False
    warnings: tuple[str, ...] = ()


@dataclass
class _Pass:
    """What one call does to the sessions of an engine."""

    services: Services
    autofreeze: AutofreezeService
    node: EngineNode
    ends: float
    moved: list[Moved] = field(default_factory=list)
    failed: list[NotMoved] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    async def run(self, rows: Sequence[FreezeCandidate]) -> None:
        """Move the sessions, last active first."""
        await asyncio.gather(*(self._move(row) for row in rows))

    async def _move(self, row: FreezeCandidate) -> None:
        session, services = row.session, self.services
        if await services.turns.has_turn_in_flight(session.tenant, session.id):
            self.busy.append(session.id)
            return
        async with self.gate:
            if time.monotonic() > self.ends:
                return
            try:
                window = await self.autofreeze.freeze_now(row, f"engine {self.node.url} is drained")
            except GatewayError as error:
                self.failed.append(NotMoved(session.id, error.message))
                return
            if window is not None:  # None: another worker freezes it
                self.moved.append(await self._load(session, window))

    async def _load(self, session: Session, window: Window) -> Moved:
        """Load a window where its session will continue. A failure is a warning."""
        services = self.services
        node, cache = place(
            services, session.lineage, prefer=session.engine, model=session.model, tokens=window.token_count
        )
        engine = node.url if node else ""
        if node is None or cache is None or node is self.node or not window.chunk_count:
            return Moved(session.id, window.name, engine, None)
        try:
            manifest = await services.store.manifest(window)
            ctx = OperationContext(services, session.tenant)
            objects = await load(ctx, cache, window, manifest, window.chunk_count)
        except GatewayError as error:
            self.warnings.append(f"window {window.name!r} was not loaded: {error.message}")
            return Moved(session.id, window.name, engine, None)
        return Moved(session.id, window.name, engine, objects // window.world_size)


@instrumented
async def drain(ctx: OperationContext, autofreeze: AutofreezeService, engine: str) -> Drained:
    """Drain an engine, named by its URL or by its host and port.

    Raises `invalid_request` if there is no such engine, or no other.
    """
    services = ctx.services
    node = _node(services, engine)
    await _mark(services, node)
    since = (await services.store.drained()).get(node.url, time.time())
    node.drained = True
    await services.recorder.flush()
    this = _Pass(services, autofreeze, node, time.monotonic() + _PASS_S)
    await this.run(await _sessions_at(services, node.url))
    await services.recorder.flush()
    left = await _sessions_at(services, node.url)
    await node.read_queue()
    requests, seconds_left = _requests(node), _seconds_left(services, since)
    return Drained(
        node.url, True, since,
        moved=tuple(this.moved), failed=tuple(this.failed), busy=tuple(this.busy),
        sessions_left=len(left), seconds_left=seconds_left, requests=requests,
        empty=not left and not requests and not seconds_left,
        warnings=(*this.warnings, *_warnings(services, node, requests)),
    )  # fmt: skip


async def _mark(services: Services, node: EngineNode) -> None:
    """Store that an engine is drained. Raises `invalid_request` if no other is left, whoever has drained those."""
    usable = [member.url for member in services.engines.members if not member.leaving or member is node]
    if not await services.store.drain(node.url, time.time(), usable):
        message = f"{node.url} is the only engine that is not drained: there is none to move its sessions to"
        raise invalid_field("engine", message, "add another engine first, or undo the drain of another one")


@instrumented
async def undrain(ctx: OperationContext, engine: str) -> Drained:
    """Let an engine have requests again. Raises `invalid_request` if there is no such engine."""
    node = _node(ctx.services, engine)
    await ctx.services.store.undrain(node.url)
    node.drained = False
    warnings = ("its address has left its name: it stays drained",) if node.leaving else ()
    return Drained(node.url, node.draining, None, warnings=warnings)


async def watch_drained(services: Services) -> None:
    """Take over, periodically, which engines are drained: others may have said so. Ends only when cancelled."""
    while True:
        await asyncio.sleep(services.settings.engine_check_s)
        try:
            await apply_drained(services)
        except GatewayError as error:
            log.warning("could not read which engines are drained: %s", error.message)


async def apply_drained(services: Services) -> None:
    """Take over which engines are drained."""
    drained = await services.store.drained()
    members = services.engines.members
    for member in members:
        if member.drained != (member.url in drained):
            member.drained = member.url in drained
            log.info("engine %s is %s", member.url, "drained" if member.drained else "drained no longer")
    for url in drained.keys() - {member.url for member in members}:
        if time.time() - drained[url] > _FORGET_S:
            await services.store.undrain(url)


def _node(services: Services, engine: str) -> EngineNode:
    """The engine of this URL, or host and port. Raises `invalid_request`."""
    wanted = engine.rstrip("/")
    for member in services.engines.members:
        if wanted in (member.url.rstrip("/"), member.url.partition("://")[2].rstrip("/")):
            return member
    known = ", ".join(member.url for member in services.engines.members) or "none is known"
    raise invalid_field("engine", f"engine must be the URL of one of the engines, not {engine!r}", f"engines: {known}")


async def _sessions_at(services: Services, url: str) -> list[FreezeCandidate]:
    """The sessions that an engine served last, long enough to keep KV, that have continued since their last freeze."""
    since, before = time.time() - _HORIZON_S, None
    least = services.cache.chunk_size if services.cache and services.pins.tiers else 0
    found: list[FreezeCandidate] = []
    while page := await services.store.unfrozen(since, before, _PAGE):
        found += [row for row in page if row.session.engine == url and row.session.token_count >= least]
        last = page[-1].session
        before = last.last_active_at, last.tenant, last.id
    return found


def _seconds_left(services: Services, since: float) -> float:
    """Seconds until all have read what the store says, and the last request that they sent before is seen there."""
    passed = time.time() - since  # negative where a clock has been set back
    knows_s = services.settings.engine_check_s + _MARGIN_S
    return round(min(knows_s - passed, knows_s), 1) if passed < knows_s else 0.0


def _requests(node: EngineNode) -> int | None:
    """What the engine has to do; an engine that is gone has nothing."""
    return 0 if node.state == "ejected" else node.queue.requests


def _warnings(services: Services, node: EngineNode, requests: int | None) -> list[str]:
    warnings = []
    if requests is None:
        warnings.append("the engine's /metrics do not say how many requests it has: look there before you stop it")
    others = [member for member in services.engines.members if not member.draining]
    alone = [m.id for m in node.engine.served if not any(other.engine.known(m.id) for other in others)]
    if alone:
        names = ", ".join(alone)
        warnings.append(f"no other engine serves {names}: its sessions stay there, and fail when it stops")
    return warnings

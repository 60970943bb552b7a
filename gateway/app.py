"""The composition root: create and open every service, and list which paths are served by what."""

import asyncio
import gc
import logging
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import uvloop
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import endpoint, server, workers
from gateway.api.admin import routes
from gateway.api.health import Health
from gateway.api.inference.handler import Inference
from gateway.api.inference.request import TOKENIZER_PATHS
from gateway.api.mcp.transport import PATHS, McpTransport
from gateway.api.page import routes as page
from gateway.api.tracing import trace_requests
from gateway.api.workers import Report
from gateway.engines.client import HttpEngineClient
from gateway.engines.connection_pool import Upstream
from gateway.engines.node import EngineNode
from gateway.engines.pool import EnginePool
from gateway.errors import StartError
from gateway.kv.cache_pool import CachePool
from gateway.kv.lmcache import LMCache
from gateway.kv.pins import Pins
from gateway.kv.tiers.base import Tier, TierUnavailable
from gateway.kv.tiers.disk import DiskTier
from gateway.runtime import open_files, serve_lock
from gateway.runtime.stalls import LostSince, Stalls
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.cache_review import CacheReviewer
from gateway.sessions.in_flight import TurnLocks, TurnsElsewhere
from gateway.sessions.open_turns import OpenTurns
from gateway.sessions.recorder import TurnRecorder
from gateway.sessions.resolver import SessionResolver
from gateway.sessions.salt_notes import SaltNotes
from gateway.sessions.salts import SaltRule, checked_secret
from gateway.sessions.token_estimator import Estimator, hub_folder
from gateway.settings import Settings, SettingsError
from gateway.store.copying import check_finished
from gateway.store.failures import StoreDamaged
from gateway.store.leases import Leases
from gateway.store.membership import Membership
from gateway.store.opening import store_of
from gateway.store.store import Store
from gateway.telemetry import trace_context
from gateway.telemetry.metrics import Metrics, Shared, clear, forget
from gateway.telemetry.traces import Traces, open_traces
from gateway.validation.tier_settings import check_tiers
from gateway.windows.autofreeze import rules
from gateway.windows.autofreeze.service import AutofreezeService
from gateway.windows.background import BackgroundTasks
from gateway.windows.catalog import WITHOUT_TEXT_HINT, windows_without_text
from gateway.windows.claims import Claims
from gateway.windows.context import Services
from gateway.windows.drain import apply_drained, watch_drained
from gateway.windows.nodes import Nodes
from gateway.windows.retention.sweeper import run_sweeper

if TYPE_CHECKING:
    from gateway.kv.tiers.redis import RedisTier
    from gateway.kv.tiers.s3 import S3Tier

log = logging.getLogger(__name__)

_REPORTS_PER_TIMEOUT = 10  # of a worker that is alive, in `worker_timeout_s`
_INFERENCE = ("/v1/", "/s/", "/w/")
_FOR_PAGES = (
    "x-session-id", "x-session-match", "x-context-tokens", "x-context-limit", "x-context-history",
    "x-context-added-messages", "x-context-hint", "x-context-ancestor", "x-context-dropped-messages",
)  # fmt: skip
_TOKENIZER = frozenset(path.decode() for path in TOKENIZER_PATHS)


class Gateway:
    """The ASGI application. The inference API, which has to be fast, has no router; Starlette routes the admin API and
    the page.
    """

    def __init__(self, services: Services, health: Health, autofreeze: AutofreezeService) -> None:
        self._inference = trace_requests(Inference(services), services)
        self._state = {
            "services": services, "health": health, "autofreeze": autofreeze, "inference": self._inference
        }  # fmt: skip
        self._rest = Starlette(routes=[*routes.routes(), *page.routes()], exception_handlers=endpoint.HANDLERS)
        self._rest.router.redirect_slashes = False  # a redirect would go to whatever Host the caller named
        self._admin = trace_requests(self._rest_with_state, services)
        self._mcp = McpTransport(self._admin, services.settings)
        self._app = _for_pages(self._route, services.settings.allowed_origins)

    async def __aenter__(self) -> "Gateway":
        await self._mcp.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._mcp.__aexit__(*exc)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self._app(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(_INFERENCE) or scope["path"] in _TOKENIZER:
            await self._inference(scope, receive, send)
        elif scope["path"] in PATHS:
            trace_context.detach()  # its tools' own requests are traced
            await self._mcp(scope, receive, send)
        else:
            await self._admin(scope, receive, send)

    async def _rest_with_state(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = self._state
        await self._rest(scope, receive, send)


def _for_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The application, with preflights answered and its answers readable for pages of these origins."""
    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=_FOR_PAGES
    )


@asynccontextmanager
async def open_services(settings: Settings, shared: Shared | None = None) -> AsyncIterator[Services]:
    """Create and open every service; leaving closes them in reverse. Removes what a killed gateway left behind."""
    async with AsyncExitStack() as stack:
        stalls = await stack.enter_async_context(Stalls())
        store = await stack.enter_async_context(store_of(settings))
        await check_finished(store)
        membership = await stack.enter_async_context(Membership(store, ttl_s=settings.gateway_lease_s))
        leases = Leases(store, membership)
        telemetry = await stack.enter_async_context(Metrics(shared))
        traces = await stack.enter_async_context(open_traces(os.environ, telemetry))
        elsewhere = await _turns_elsewhere(stack, settings, store, membership)
        turns = ActiveTurns(store, elsewhere)
        cache = await stack.enter_async_context(_caches(settings, leases)) if settings.has_cache else None
        estimator = Estimator(file=settings.tokenizer_path, folders=(settings.data_path,), hub=hub_folder(os.environ))
        await asyncio.to_thread(estimator.check)
        reviews = CacheReviewer(store, estimator, lambda: cache.chunk_size if cache else settings.chunk_size)
        make_node = partial(_node, settings, stalls.lost_since, telemetry, traces)
        engines = [make_node(one.url, one.cache) for one in settings.nodes if one.url]
        pool = await stack.enter_async_context(EnginePool(engines, settings.engine_check_s))
        if cache is not None:
            pool.load_s = cache.load_s
        nodes = Nodes(settings.nodes, pool, cache, make_node, settings.engine_check_s, telemetry)
        await stack.enter_async_context(nodes)
        tiers = await _tiers(stack, settings, store.store_id)
        recorder = await stack.enter_async_context(
            TurnRecorder(store, turns, reviews, telemetry, elsewhere, traces, max_pending=settings.turn_queue)
        )
        pins = Pins(tiers)
        services = Services(
            settings=settings,
            store=store,
            engines=pool,
            cache=cache,
            pins=pins,
            claims=Claims(store, pins, membership),
            leases=leases,
            salts=SaltRule(await checked_secret(settings, store, membership.peers), settings.isolation == "tenant"),
            turns=turns,
            sessions=SessionResolver(store, turns, recorder, by_prefix=settings.identify == "prefix"),
            recorder=recorder,
            salt_notes=await stack.enter_async_context(SaltNotes(store)),
            metrics=telemetry,
            traces=traces,
            background=await stack.enter_async_context(BackgroundTasks()),
            estimator=estimator,
            stalls=stalls,
        )
        telemetry.register_gauge("cwg_turns_in_flight", lambda: turns.in_flight)
        telemetry.register_gauge("cwg_turns_unrecorded", lambda: recorder.unrecorded)
        await apply_drained(services)
        services.background.spawn(watch_drained(services), "watching drained engines")
        services.background.spawn(run_sweeper(services), "sweeping")
        services.background.spawn(store.fill_in_titles(), "filling in titles")
        services.background.spawn(store.keep_searchable(), "indexing messages")
        if released := await services.claims.release_strays():
            log.warning("unpinned %d objects left by a freeze that was never committed", released)
        if problem := await windows_without_text(services):
            log.error("%s; %s", problem, WITHOUT_TEXT_HINT)
        if elsewhere is not None and elsewhere.lags:
            await membership.wait_until_seen()
        yield services


async def _turns_elsewhere(
    stack: AsyncExitStack, settings: Settings, store: Store, membership: Membership
) -> TurnsElsewhere | None:
    """How the turns of other processes on this store are seen, None if there can be none."""
    if settings.store_path is None:
        return await stack.enter_async_context(OpenTurns(store, membership))
    if settings.workers == 1:
        return None
    locks = TurnLocks(settings.data_path / "turns")
    stack.callback(locks.close)
    return locks


def _caches(settings: Settings, leases: Leases) -> CachePool:
    """The caches, each with locks of its own: a load on one server does not disturb one on another."""
    alone = leases.hold if settings.store_path is None else None

    def make(url: str) -> LMCache:
        locks = settings.data_path / "loads" / f"{crc32(url.encode()):08x}"
        return LMCache(url, settings.connect_timeout_s, locks, settings.chunk_size, alone)

    return CachePool(make, settings.chunk_size)


def _node(
    settings: Settings, lost_since: LostSince, telemetry: Metrics, traces: Traces, url: str, cache: str
) -> EngineNode:
    connect, silence = settings.connect_timeout_s, settings.engine_timeout_s
    upstream = Upstream(url, connect_timeout_s=connect, silence_timeout_s=silence, lost_since=lost_since)
    client = HttpEngineClient(
        url,
        api_key=settings.engine_api_key,
        fingerprint=settings.model_fingerprint,
        connect_timeout_s=connect,
        timeout_s=silence,
        lost_since=lost_since,
        abort_grace_s=settings.abort_grace_s,
        has_cache=settings.has_cache,
        trace_headers=traces.engine_headers,
    )
    node = EngineNode(upstream, client, lost_since, cache=cache)
    telemetry.watch_address("cwg_engine_up", url, lambda: node.up)
    telemetry.watch_address("cwg_engine_draining", url, lambda: node.draining)
    return node


async def _tiers(stack: AsyncExitStack, settings: Settings, store_id: str) -> tuple[Tier, ...]:
    tiers: list[Tier] = []
    if settings.kv_path and settings.pins_path:
        if not settings.kv_path.is_dir():
            log.warning(
                "kv_dir %s does not exist: it must be the base_path of LMCache's fs adapter, which creates it",
                settings.kv_path,
            )
        try:
            tiers.append(await stack.enter_async_context(DiskTier(settings.kv_path, settings.pins_path / store_id)))
        except TierUnavailable as error:
            raise StartError(f"{error}: make pins_dir writable") from error
    if settings.kv_redis_url:
        tiers.append(await stack.enter_async_context(_redis_tier(settings, store_id)))
    if settings.s3_bucket:
        tiers.append(await stack.enter_async_context(_s3_tier(settings, store_id)))
    return tuple(tiers)


def _redis_tier(settings: Settings, store_id: str) -> "RedisTier":
    # It is a third of all imports at startup, and most gateways have no Redis.
    from gateway.kv.tiers.redis import RedisOptions, RedisTier  # noqa: PLC0415

    options = RedisOptions(
        url=settings.kv_redis_url,
        adapter=settings.kv_redis_adapter,
        prefix=settings.kv_redis_prefix,
        cluster=settings.kv_redis_cluster,
    )
    return RedisTier(options, store_id, settings.connect_timeout_s)


def _s3_tier(settings: Settings, store_id: str) -> "S3Tier":
    try:
        from gateway.kv.tiers.s3 import S3Tier  # noqa: PLC0415 - awscrt comes with an extra
        from gateway.kv.tiers.s3_client import S3Options  # noqa: PLC0415
    except ImportError as error:
        raise StartError(f"s3_bucket is set, but {error.name} is not installed: install the gateway with the extra s3, "
                         "as in pip install '.[s3]'") from error  # fmt: skip
    options = S3Options(
        bucket=settings.s3_bucket,
        pins_bucket=settings.s3_pins_bucket,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        path_style=settings.s3_path_style,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key,
    )
    return S3Tier(options, store_id, settings.connect_timeout_s)


async def run(settings: Settings, sock: socket.socket, report: Report | None, shared: Shared | None = None) -> None:
    """Serve `sock` until a signal. One of several workers reports when it serves, and that it is alive.

    Raises StartError.
    """
    async with (
        open_services(settings, shared) as services,
        Health(services) as health,
        AutofreezeService(services) as autofreeze,
        Gateway(services, health, autofreeze) as gateway,
    ):
        # Objects that live as long as the process need no collection: that saves a twelfth of the time (loadtests/).
        # The thresholds stay: closed connections are cycles, and memory grew when they waited longer.
        gc.collect()
        gc.freeze()
        log.info("listening on http://%s:%d", *sock.getsockname()[:2])
        if report is not None:
            report.ready()
            services.background.spawn(
                _report_alive(report, settings.worker_timeout_s / _REPORTS_PER_TIMEOUT), "reporting"
            )
        await server.serve(gateway, settings, sock, services.stalls.lost_since)


async def _report_alive(report: Report, every_s: float) -> None:
    while True:
        report.alive()
        await asyncio.sleep(every_s)


def main(settings: Settings) -> None:
    """Serve until a signal, in this process or in several.

    Raises StartError, and SettingsError for settings that do not go together.
    """
    rules.from_settings(settings)
    try:
        check_tiers(vars(settings))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    open_files.raise_open_files()
    sock = server.listen(settings)
    with suppress(OSError):  # the first writer reports what is wrong with it
        settings.data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    locked = serve_lock.lock(_locks(settings))
    try:
        _serve(settings, sock)
    finally:
        for file in locked:
            os.close(file)


def _locks(settings: Settings) -> list[Path]:
    """Locks of what no other gateway may use: the data directory, and the store if it is elsewhere."""
    store = settings.store_path
    own = settings.data_path / "serve.lock"
    return (
        [own] if store is None or store.parent == settings.data_path else [own, store.with_name(f"{store.name}.lock")]
    )


def _serve(settings: Settings, sock: socket.socket) -> None:
    if settings.workers == 1:
        _run(run(settings, sock, None))
        return
    folder = settings.data_path / "metrics"
    clear(folder)

    def serve(slot: int, sock: socket.socket, report: Report) -> None:
        _run(run(settings, sock, report, Shared(folder, slot)))

    gc.freeze()  # objects that exist now stay shared between the workers
    workers.Supervisor(
        settings.workers, sock, serve, lambda slot: forget(folder, slot),
        extra_s=settings.shutdown_grace_s + settings.shutdown_freeze_s, silent_s=settings.worker_timeout_s,
    ).run()  # fmt: skip


def _run(work: Coroutine[None, None, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(work)
        except StoreDamaged as error:  # at startup; later the request that needs the store gets it
            raise StartError(f"{error.message}; {error.hint}") from error

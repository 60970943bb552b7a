"""What window operations run with: the services of the gateway, and the context of one call."""

import functools
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from gateway.engines.pool import EnginePool
from gateway.kv.cache_pool import CachePool
from gateway.kv.pins import Pins
from gateway.metrics import Metrics
from gateway.runtime.offload import Offload
from gateway.runtime.progress import Progress, silent
from gateway.runtime.stalls import Stalls
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.recorder import TurnRecorder
from gateway.sessions.resolver import SessionResolver
from gateway.sessions.salt_notes import SaltNotes
from gateway.sessions.salts import SaltRule
from gateway.sessions.token_estimator import Estimator
from gateway.settings import Settings
from gateway.store.leases import Leases
from gateway.store.store import Store
from gateway.windows.background import BackgroundTasks
from gateway.windows.claims import Claims

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """The services of a running gateway, opened by `gateway.app`. `cache`: all caches; None: none is configured."""

    settings: Settings
    store: Store
    engines: EnginePool
    cache: CachePool | None
    pins: Pins
    claims: Claims
    leases: Leases
    salts: SaltRule
    turns: ActiveTurns
    sessions: SessionResolver
    recorder: TurnRecorder
    salt_notes: SaltNotes
    background: BackgroundTasks
    metrics: Metrics
    estimator: Estimator
    stalls: Stalls
    offload: Offload = field(default_factory=Offload)


@dataclass(frozen=True, slots=True)
class OperationContext:
    """One call of an operation: its tenant, where it reports progress, and when it began (`time.monotonic`).

    The result of an operation has its warnings in a field `warnings`. Functions that operations are made of return
    them as the second of two values; no argument collects them.
    """

    services: Services
    tenant: str
    progress: Progress = silent
    started: float = field(default_factory=time.monotonic)

    def duration_ms(self) -> float:
        """Milliseconds since it began."""
        return round((time.monotonic() - self.started) * 1000, 1)


OperationFunction = Callable[Concatenate[OperationContext, P], Coroutine[Any, Any, T]]


def instrumented(operation: OperationFunction[P, T]) -> OperationFunction[P, T]:
    """Count an operation's calls, results and duration under its function's name, whichever API called it."""

    @functools.wraps(operation)
    async def run(ctx: OperationContext, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with ctx.services.metrics.operation(operation.__name__):
            return await operation(ctx, *args, **kwargs)

    return run

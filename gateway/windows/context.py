"""What window operations run with: the services of the gateway, and the context of one call."""

import functools
import inspect
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

from msgspec import Struct, structs

from gateway.engines.pool import EnginePool
from gateway.kv.cache_pool import CachePool
from gateway.kv.pins import Pins
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
from gateway.telemetry import genai
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.trace_context import current
from gateway.telemetry.traces import Attributes, Traces, clean
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
    traces: Traces
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

    @contextmanager
    def step(self, stage: str, total: int = 0) -> Iterator[Attributes]:
        """Report the beginning of a step as progress, and record it as a span; yields the span's attributes."""
        self.progress(stage, 0, total)
        with self.services.traces.step(stage) as attributes:
            if total:
                attributes[genai.TOTAL] = total
            yield attributes


OperationFunction = Callable[Concatenate[OperationContext, P], Coroutine[Any, Any, T]]


def instrumented(operation: OperationFunction[P, T]) -> OperationFunction[P, T]:
    """Count an operation's calls, results and duration under its function's name, whichever API called it.

    If its request is traced, it is a span, with the numbers of its result.
    """
    name = operation.__name__
    first = next(iter([*inspect.signature(operation).parameters][1:]), "")
    about = _SUBJECTS.get(first)

    @functools.wraps(operation)
    async def run(ctx: OperationContext, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with ctx.services.metrics.operation(name):
            if current() is None:
                return await operation(ctx, *args, **kwargs)
            with ctx.services.traces.step(name) as attributes:
                if about is not None:
                    attributes[about] = clean(str(args[0] if args else kwargs[first]))
                result = await operation(ctx, *args, **kwargs)
                attributes.update(_numbers(result))
                return result

    return run


# Names only: other arguments may be text.
_SUBJECTS: Mapping[str, str] = MappingProxyType(
    {"name": genai.WINDOW, "source": genai.WINDOW, "session_id": genai.CONVERSATION}
)
_RECEIPTS = ("receipt", "restored", "usage")


def _numbers(result: object) -> Attributes:
    """The numbers of an operation's result and of its receipts, and how many warnings it has; no text."""
    found: Attributes = {}
    for part in (result, *(getattr(result, name, None) for name in _RECEIPTS)):
        for name, value in _items(part):
            if name == "warnings":
                found[genai.WARNINGS] = len(value)
            elif isinstance(value, int | float) and not name.endswith("_at"):
                found[genai.RECEIPT + name] = value
    return found


def _items(part: object) -> Iterable[tuple[str, Any]]:
    if isinstance(part, Mapping):
        return part.items()
    if isinstance(part, Struct):
        return structs.asdict(part).items()
    if is_dataclass(part):
        return [(field.name, getattr(part, field.name)) for field in fields(part)]
    return part._asdict().items() if hasattr(part, "_asdict") else ()

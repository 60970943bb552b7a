"""Every metric, defined once: its name, what it counts, and its labels.

Numbers are counted where a turn is recorded and where a verb ends, never on the way of a request. With several workers
they live in files that all of them read, so that whichever worker is asked answers for all; a worker that takes a dead
one's place goes on with its numbers. Labels are bounded: no session, no window, no model that is not served.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

from gateway.errors import GatewayError, StartError
from gateway.records import Turn

CONTENT_TYPE = CONTENT_TYPE_LATEST

_EVERY_S = 0.5
_LAG_KEPT = 20  # looks at the event loop: ten seconds
_FILE_BYTES = 2**18  # a thousand time series
_FILES = ("counter", "histogram", "gauge_livesum", "gauge_livemax")
_TURN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1)
_VERB_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. `merge` says how the gauges of several workers become one."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    merge: Literal["livesum", "livemax"] = "livesum"
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("cwg_turns_total", "counter", ("dialect", "model", "outcome"), "finished turns, by outcome"),
    Metric("cwg_prompt_tokens_total", "counter", ("model",), "prompt tokens, as the engine counted them"),
    Metric("cwg_completion_tokens_total", "counter", ("model",), "completion tokens, as the engine counted them"),
    Metric("cwg_cached_tokens_total", "counter", ("model",), "prompt tokens that the engine did not have to compute"),
    Metric("cwg_misses_total", "counter", ("reason",), "turns that hit less of the cache than expected, by reason"),
    Metric(
        "cwg_turn_seconds",
        "histogram",
        ("dialect",),
        "duration of whole turns, engine and client included",
        buckets=_TURN_S,
    ),
    Metric(
        "cwg_overhead_seconds",
        "histogram",
        ("dialect",),
        "time from a turn's last byte received to its request to the engine: the gateway's own work",
        buckets=_OVERHEAD_S,
    ),
    Metric("cwg_verbs_total", "counter", ("result", "verb"), "window operations, by result: `ok` or the error code"),
    Metric(
        "cwg_verb_seconds", "histogram", ("verb",), "duration of the window operations that were `ok`", buckets=_VERB_S
    ),
    Metric("cwg_turns_in_flight", "gauge", (), "turns in progress or waiting to be recorded"),
    Metric("cwg_turns_unrecorded", "gauge", (), "finished turns waiting for the store"),
    Metric("cwg_turns_lost_total", "counter", (), "turns that were answered but could not be recorded"),
    Metric("cwg_event_loop_lag_seconds", "gauge", (), "longest delay of the event loop in ten seconds", "livemax"),
    Metric("cwg_workers", "gauge", (), "worker processes that are serving"),
    Metric("cwg_engine_up", "gauge", ("engine",), "1 when the engine answered last time, else 0", "livemax"),
    Metric("cwg_windows", "gauge", ("kv",), "windows, by how much of their KV is pinned"),
    Metric("cwg_pinned_objects", "gauge", ("tier",), "KV objects that windows hold"),
    Metric("cwg_pinned_bytes", "gauge", ("tier",), "bytes of these objects"),
)
_STORED = ("cwg_windows", "cwg_pinned_objects", "cwg_pinned_bytes")
_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store knows: windows by `kv`, and objects and bytes by tier."""

    windows: Mapping[str, int]
    tiers: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Shared:
    """Where the numbers of several workers are, and which of them this one is."""

    folder: Path
    slot: int


@dataclass(frozen=True, slots=True)
class _Series:
    """What a turn counts in; finding it by its labels costs as much as counting."""

    turns: Counter
    seconds: Histogram
    overhead: Histogram
    prompt: Counter
    completion: Counter
    cached: Counter


class Metrics:
    """The numbers of this process, and of its fellow workers when they are asked for."""

    def __init__(self, shared: Shared | None = None) -> None:
        """Raises StartError where the files of several workers cannot be made."""
        self._shared = shared
        # The library has no way to say it for one registry, and else follows a variable of the environment.
        values.ValueClass = values.MutexValue if shared is None else _in_files(shared)
        self._registry = CollectorRegistry()
        self._turns = self._counter("cwg_turns_total")
        self._prompt = self._counter("cwg_prompt_tokens_total")
        self._completion = self._counter("cwg_completion_tokens_total")
        self._cached = self._counter("cwg_cached_tokens_total")
        self._misses = self._counter("cwg_misses_total")
        self._lost = self._counter("cwg_turns_lost_total")
        self._turn_seconds = self._histogram("cwg_turn_seconds")
        self._overhead = self._histogram("cwg_overhead_seconds")
        self._verbs = self._counter("cwg_verbs_total")
        self._verb_seconds = self._histogram("cwg_verb_seconds")
        self._lag = self._gauge("cwg_event_loop_lag_seconds")
        self._engine_up = self._gauge("cwg_engine_up")
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self.register_gauge("cwg_workers", lambda: 1)

    async def __aenter__(self) -> "Metrics":
        self._task = asyncio.create_task(self._look(), name="telemetry")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def register_gauge(self, name: str, value: Callable[[], float]) -> None:
        """Take a gauge's value from `value`, now and then and whenever the numbers are read."""
        self._watched.append((self._gauge(name), value))

    def watch_engine(self, url: str, is_up: Callable[[], bool]) -> None:
        """Watch whether an engine is up. A password in its URL is nobody's business."""
        self._watched.append((self._engine_up.labels(urlsplit(url).netloc.rpartition("@")[2]), is_up))

    def turn(self, turn: Turn, dialect: str, overhead_s: float, *, served: bool) -> None:
        """Count a turn that is over. `served`: the engine knows the model; other names are a client's invention."""
        key = (dialect, turn.model if served else "", turn.outcome)
        series = self._series.get(key) or self._series.setdefault(key, self._series_of(*key))
        series.turns.inc()
        series.seconds.observe(turn.duration_ms / 1000)
        series.overhead.observe(overhead_s)
        if turn.usage:
            series.prompt.inc(turn.usage.prompt)
            series.completion.inc(turn.usage.completion)
            series.cached.inc(turn.usage.cached or 0)

    def missed(self, reason: str) -> None:
        """Count a turn that hit less than it should have. Reasons are a few words of our own, never a client's."""
        self._misses.labels(reason).inc()

    def lost_turn(self) -> None:
        """Count a turn that was answered and could not be recorded."""
        self._lost.inc()

    @contextmanager
    def verb(self, verb: str) -> Iterator[None]:
        """Count a verb with its result; raises what it raises."""
        clock = time.monotonic()
        result = "failed"
        try:
            yield
            result = "ok"
            self._verb_seconds.labels(verb).observe(time.monotonic() - clock)
        except GatewayError as error:
            result = error.code
            raise
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        finally:
            self._verbs.labels(result, verb).inc()

    def text(self, stored: Stored) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(_Once(self._families(stored)))

    def rows(self, stored: Stored) -> list[dict[str, Any]]:
        """The same as rows for JSON."""
        return [
            {
                "name": sample.name,
                "type": family.type,
                "help": family.documentation,
                "labels": dict(sample.labels),
                "value": sample.value,
            }
            for family in self._families(stored)
            for sample in family.samples
        ]

    def token_totals(self) -> tuple[int, int]:
        """The prompt tokens of all workers since the gateway started, and those of them that were cached."""
        samples = [sample for family in self._counted() for sample in family.samples]
        prompt, cached = (
            sum(sample.value for sample in samples if sample.name == name)
            for name in ("cwg_prompt_tokens_total", "cwg_cached_tokens_total")
        )
        return int(prompt), int(cached)

    def _families(self, stored: Stored) -> list[Any]:
        self._refresh()
        return self._counted() + _stored_families(stored)

    def _counted(self) -> list[Any]:
        source = self._registry
        if self._shared is not None:
            source = CollectorRegistry()
            MultiProcessCollector(source, str(self._shared.folder))  # type: ignore[no-untyped-call]
        counted = sorted(source.collect(), key=lambda family: family.name)
        for family in counted:
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
        return [family for family in counted if family.samples]

    def _refresh(self) -> None:
        for gauge, value in self._watched:
            gauge.set(value())

    async def _look(self) -> None:
        """Measure how late the event loop is, for all who wait in it."""
        late: deque[float] = deque(maxlen=_LAG_KEPT)
        while True:
            self._refresh()
            clock = time.monotonic()
            await asyncio.sleep(_EVERY_S)
            late.append(max(0.0, time.monotonic() - clock - _EVERY_S))
            self._lag.set(max(late))

    def _series_of(self, dialect: str, model: str, outcome: str) -> "_Series":
        return _Series(
            self._turns.labels(dialect, model, outcome),
            self._turn_seconds.labels(dialect),
            self._overhead.labels(dialect),
            self._prompt.labels(model),
            self._completion.labels(model),
            self._cached.labels(model),
        )

    def _counter(self, name: str) -> Counter:
        metric = _BY_NAME[name]
        return Counter(name, metric.help, metric.labels, registry=self._registry)

    def _gauge(self, name: str) -> Gauge:
        metric = _BY_NAME[name]
        return Gauge(name, metric.help, metric.labels, registry=self._registry, multiprocess_mode=metric.merge)

    def _histogram(self, name: str) -> Histogram:
        metric = _BY_NAME[name]
        return Histogram(name, metric.help, metric.labels, registry=self._registry, buckets=metric.buckets)


class _Once(Collector):
    """Families that have been collected already."""

    def __init__(self, families: Sequence[Any]) -> None:
        self._families = families

    def collect(self) -> Sequence[Any]:
        """Return them."""
        return self._families


def clear(folder: Path) -> None:
    """Begin with nothing: the numbers of a gateway that has ended are not this one's. Raises StartError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in folder.glob("*.db"):
            file.unlink()
    except OSError as error:
        raise _unusable(folder, error) from error


def forget(folder: Path, slot: int) -> None:
    """Take away what was true only as long as a worker lived: its gauges."""
    mark_process_dead(slot, str(folder))  # type: ignore[no-untyped-call]


def _in_files(shared: Shared) -> Any:
    """How numbers are kept in files, one set for each slot."""
    try:
        for kind in _FILES:
            _reserve(shared.folder / f"{kind}_{shared.slot}.db")
    except OSError as error:
        raise _unusable(shared.folder, error) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.folder)
    return MultiProcessValue(lambda: shared.slot)  # type: ignore[no-untyped-call]


def _reserve(path: Path) -> None:
    """Take the blocks on the disk now: a page that finds none later would kill the process that writes to it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, _FILE_BYTES)
    finally:
        os.close(file)


def _unusable(folder: Path, error: OSError) -> StartError:
    return StartError(f"the metrics of several workers cannot be kept in {folder}: {error.strerror}; see data_dir")


def _stored_families(stored: Stored) -> list[GaugeMetricFamily]:
    windows, objects, size = (
        GaugeMetricFamily(name, _BY_NAME[name].help, labels=_BY_NAME[name].labels) for name in _STORED
    )
    for kv, count in sorted(stored.windows.items()):
        windows.add_metric([kv], count)
    for tier, (count, total) in sorted(stored.tiers.items()):
        objects.add_metric([tier], count)
        size.add_metric([tier], total)
    return [windows, objects, size]

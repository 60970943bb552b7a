"""Every metric, defined once: its name, what it counts, and its labels.

Turns are counted when they are recorded and operations when they end, never on the request path. With several workers
the numbers are in files that all of them read, so that any worker reports for all; a worker that replaces a dead one
continues its numbers. Labels are bounded: no session, no window, no model that is not served.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

from gateway.errors import GatewayError, StartError
from gateway.records import Turn
from gateway.runtime.disk import allocate

CONTENT_TYPE = CONTENT_TYPE_LATEST

_EVERY_S = 0.5
_LAG_SAMPLES = 20  # of the event loop: ten seconds
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
    Metric(
        "cwg_spans_total",
        "counter",
        ("result",),
        "spans of traces: `exported`, `failed` to be, or `dropped` because too many were waiting",
    ),
    Metric("cwg_engine_up", "gauge", ("engine",), "1 when the engine answered last time, else 0", "livemax"),
    Metric("cwg_engine_draining", "gauge", ("engine",), "1 while the engine is drained, else 0", "livemax"),
    Metric(
        "cwg_cache_up",
        "gauge",
        ("cache",),
        "of several caches: 1 when it could be asked last time and stores KV as the others do, else 0",
        "livemax",
    ),
    Metric("cwg_windows", "gauge", ("kv",), "windows, by how much of their KV is pinned"),
    Metric("cwg_pinned_objects", "gauge", ("tier",), "KV objects that windows hold"),
    Metric("cwg_pinned_bytes", "gauge", ("tier",), "bytes of these objects"),
    Metric("cwg_held_byte_hours_total", "counter", (), "bytes that windows have held, by hours"),
    Metric(
        "cwg_saved_tokens_total",
        "counter",
        ("source",),
        "tokens that the engine did not have to compute, ever: by `turn`, `thaw` and `ask`",
    ),
    Metric("cwg_saved_seconds_total", "counter", ("source",), "about how long computing these tokens would have taken"),
)
_STORED = (
    "cwg_windows", "cwg_pinned_objects", "cwg_pinned_bytes", "cwg_held_byte_hours_total", "cwg_saved_tokens_total",
    "cwg_saved_seconds_total",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """What is in the store: windows by `kv`, objects and bytes by tier, tokens and seconds saved by source."""

    windows: Mapping[str, int]
    tiers: Mapping[str, tuple[int, int]]
    saved: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    held_byte_hours: float = 0.0


@dataclass(frozen=True, slots=True)
class Shared:
    """Where the numbers of several workers are, and which worker this is."""

    folder: Path
    slot: int


@dataclass(frozen=True, slots=True)
class _Series:
    """The series that a turn counts in; finding them by labels costs as much as counting."""

    turns: Counter
    seconds: Histogram
    overhead: Histogram
    prompt: Counter
    completion: Counter
    cached: Counter


class Metrics:
    """The numbers of this process, and those of all workers when they are read."""

    def __init__(self, shared: Shared | None = None) -> None:
        """Raises StartError if the files of several workers cannot be created."""
        self._shared = shared
        # The library has no parameter for this; it would follow a variable of the environment.
        values.ValueClass = values.MutexValue if shared is None else _in_files(shared)
        self._registry = registry = CollectorRegistry()
        defined = [metric for metric in METRICS if metric.name not in _STORED]
        self._counters = {
            m.name: Counter(m.name, m.help, m.labels, registry=registry) for m in defined if m.kind == "counter"
        }
        self._histograms = {
            m.name: Histogram(m.name, m.help, m.labels, registry=registry, buckets=m.buckets)
            for m in defined
            if m.kind == "histogram"
        }
        self._gauges = {
            m.name: Gauge(m.name, m.help, m.labels, registry=registry, multiprocess_mode=m.merge)
            for m in defined
            if m.kind == "gauge"
        }
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self._addresses: dict[tuple[str, str], tuple[Gauge, Callable[[], float]]] = {}  # by metric and host
        self.register_gauge("cwg_workers", lambda: 1)

    async def __aenter__(self) -> "Metrics":
        self._task = asyncio.create_task(self._measure(), name="metrics")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def register_gauge(self, name: str, value: Callable[[], float]) -> None:
        """Take a gauge's value from `value`, periodically and whenever the numbers are read."""
        self._watched.append((self._gauges[name], value))

    def watch_address(self, name: str, url: str, value: Callable[[], float]) -> None:
        """Take a gauge's value for an engine or a cache from `value`. A password in its URL is left out."""
        host = _host(url)
        self._addresses[name, host] = (self._gauges[name].labels(host), value)

    def forget_address(self, url: str) -> None:
        """Show no more of an engine or a cache that is gone."""
        host = _host(url)
        for name, gone in [key for key in self._addresses if key[1] == host]:
            gauge, _ = self._addresses.pop((name, gone))
            gauge.set(math.nan)  # in files, from which nothing can be removed, it is neither up nor down
            if self._shared is None:
                self._gauges[name].remove(host)

    def count_turn(self, turn: Turn, dialect: str, overhead_s: float, *, served: bool) -> None:
        """Count a finished turn. `served`: the engine has the model; other names are whatever clients send."""
        key = (dialect, turn.model if served else "", turn.outcome)
        series = self._series.get(key) or self._series.setdefault(key, self._series_of(*key))
        series.turns.inc()
        series.seconds.observe(turn.duration_ms / 1000)
        series.overhead.observe(overhead_s)
        if turn.usage:
            series.prompt.inc(turn.usage.prompt)
            series.completion.inc(turn.usage.completion)
            series.cached.inc(turn.usage.cached or 0)

    def count_miss(self, reason: str) -> None:
        """Count a turn with fewer cached tokens than expected. Reasons are a few fixed words, never a client's."""
        self._counters["cwg_misses_total"].labels(reason).inc()

    def count_lost_turn(self) -> None:
        """Count a turn that was answered but could not be recorded."""
        self._counters["cwg_turns_lost_total"].inc()

    def count_spans(self, result: str, count: int) -> None:
        """Count spans that were exported, or lost. May be called in any thread."""
        self._counters["cwg_spans_total"].labels(result).inc(count)

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Count a window operation with its result; raises what it raises."""
        clock = time.monotonic()
        result = "failed"
        try:
            yield
            result = "ok"
            self._histograms["cwg_verb_seconds"].labels(name).observe(time.monotonic() - clock)
        except GatewayError as error:
            result = error.code
            raise
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        finally:
            self._counters["cwg_verbs_total"].labels(result, name).inc()

    def token_totals(self) -> tuple[int, int]:
        """Prompt tokens of all turns, and how many of them were cached."""
        samples = [sample for family in self._collect() for sample in family.samples]
        prompt, cached = (
            int(sum(sample.value for sample in samples if sample.name == name))
            for name in ("cwg_prompt_tokens_total", "cwg_cached_tokens_total")
        )
        return prompt, cached

    def text(self, stored: Stored) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(_Collected(self._families(stored)))

    def rows(self, stored: Stored) -> list[dict[str, Any]]:
        """All numbers as rows for JSON."""
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

    def _families(self, stored: Stored) -> list[Any]:
        return self._collect() + _stored_families(stored)

    def _collect(self) -> list[Any]:
        self._refresh()
        source = self._registry
        if self._shared is not None:
            source = CollectorRegistry()
            MultiProcessCollector(source, str(self._shared.folder))  # type: ignore[no-untyped-call]
        families = sorted(source.collect(), key=lambda family: family.name)
        for family in families:
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
        return [family for family in families if family.samples]

    def _refresh(self) -> None:
        for gauge, value in [*self._watched, *self._addresses.values()]:
            gauge.set(value())

    async def _measure(self) -> None:
        """Measure how late the event loop is."""
        lags: deque[float] = deque(maxlen=_LAG_SAMPLES)
        while True:
            self._refresh()
            clock = time.monotonic()
            await asyncio.sleep(_EVERY_S)
            lags.append(max(0.0, time.monotonic() - clock - _EVERY_S))
            self._gauges["cwg_event_loop_lag_seconds"].set(max(lags))

    def _series_of(self, dialect: str, model: str, outcome: str) -> _Series:
        return _Series(
            self._counters["cwg_turns_total"].labels(dialect, model, outcome),
            self._histograms["cwg_turn_seconds"].labels(dialect),
            self._histograms["cwg_overhead_seconds"].labels(dialect),
            self._counters["cwg_prompt_tokens_total"].labels(model),
            self._counters["cwg_completion_tokens_total"].labels(model),
            self._counters["cwg_cached_tokens_total"].labels(model),
        )


class _Collected(Collector):
    """Families that have been collected already."""

    def __init__(self, families: Sequence[Any]) -> None:
        self._families = families

    def collect(self) -> Sequence[Any]:
        """Return them."""
        return self._families


def clear(folder: Path) -> None:
    """Delete the numbers of an earlier gateway. Raises StartError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in folder.glob("*.db"):
            file.unlink()
    except OSError as error:
        raise _unusable(folder, error) from error


def forget(folder: Path, slot: int) -> None:
    """Delete the gauges of a worker that has ended."""
    mark_process_dead(slot, str(folder))  # type: ignore[no-untyped-call]


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _in_files(shared: Shared) -> Any:
    """The value class for numbers in files, one set for each slot."""
    try:
        for kind in _FILES:
            # Now: if a page had no block later, writing to it would kill the process.
            allocate(shared.folder / f"{kind}_{shared.slot}.db", _FILE_BYTES)
    except OSError as error:
        raise _unusable(shared.folder, error) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.folder)
    return MultiProcessValue(lambda: shared.slot)  # type: ignore[no-untyped-call]


def _unusable(folder: Path, error: OSError) -> StartError:
    return StartError(f"the metrics of several workers cannot be kept in {folder}: {error.strerror}; see data_dir")


def _stored_families(stored: Stored) -> list[GaugeMetricFamily | CounterMetricFamily]:
    families = {
        m.name: (CounterMetricFamily if m.kind == "counter" else GaugeMetricFamily)(m.name, m.help, labels=m.labels)
        for m in METRICS
        if m.name in _STORED
    }
    for kv, count in sorted(stored.windows.items()):
        families["cwg_windows"].add_metric([kv], count)
    for tier, (count, total) in sorted(stored.tiers.items()):
        families["cwg_pinned_objects"].add_metric([tier], count)
        families["cwg_pinned_bytes"].add_metric([tier], total)
    families["cwg_held_byte_hours_total"].add_metric([], stored.held_byte_hours)
    for source, (tokens, seconds) in sorted(stored.saved.items()):
        families["cwg_saved_tokens_total"].add_metric([source], tokens)
        families["cwg_saved_seconds_total"].add_metric([source], seconds)
    return list(families.values())

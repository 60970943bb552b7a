"""The samples of one run of `relay_overhead`: plain records, written as JSON and read by the report."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

JSON, SSE, HISTORY = "json", "sse", "history"


@dataclass(frozen=True, slots=True)
class LoadSample:
    """One wrk run against one contender. The gateway's `per_s` and every `cpu_us` include deferred work."""

    scenario: str
    contender: str
    round: int
    p50_ms: float
    p99_ms: float
    per_s: float
    drain_s: float
    cpu_us: float
    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class GapSample:
    """Paced streams: how much the path added to the gaps between chunks; `seen` is the number of gaps."""

    contender: str
    round: int
    streams: int
    p99_ms: float
    seen: int
    failed: int


@dataclass(frozen=True, slots=True)
class Chunking:
    """Whether HTTP chunks arrived unchanged: without usage, with it, and split at arbitrary points."""

    contender: str
    plain: bool
    usage: bool
    ragged: bool


@dataclass(frozen=True, slots=True)
class CrowdSample:
    """Many concurrent streams: how many overlapped, how many failed, and the memory before and after each wave."""

    contender: str
    streams: int
    concurrent: int
    failed: int
    errors: list[str]
    before_bytes: int
    after_bytes: list[int]


@dataclass(slots=True)
class Run:
    """All samples of a run, and its circumstances."""

    machine: dict[str, str]
    versions: dict[str, str]
    missing: dict[str, str]
    seconds: int
    rounds: int = 0
    took_s: float = 0.0
    others_share: float = 0.0
    loads: list[LoadSample] = field(default_factory=list)
    gaps: list[GapSample] = field(default_factory=list)
    chunking: list[Chunking] = field(default_factory=list)
    crowds: list[CrowdSample] = field(default_factory=list)

    def values(self, scenario: str, contender: str, metric: Callable[[LoadSample], float]) -> list[float]:
        """Return one value per round, in order."""
        return [metric(sample) for sample in self.loads if (sample.scenario, sample.contender) == (scenario, contender)]

    def median(self, scenario: str, contender: str, metric: Callable[[LoadSample], float]) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.values(scenario, contender, metric))

    def gap(self, contender: str, streams: int) -> list[float]:
        """Return the p99 of the added gap, per round."""
        return [sample.p99_ms for sample in self.gaps if (sample.contender, sample.streams) == (contender, streams)]

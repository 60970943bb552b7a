"""What one run of `relay_overhead` has seen: plain records, written as JSON and read by the report."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

JSON, SSE, HISTORY = "json", "sse", "history"


@dataclass(frozen=True, slots=True)
class Loaded:
    """wrk against one contender for a few seconds. The gateway's `per_s` and every `cpu_us` include work put off."""

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
class Gaps:
    """Paced streams: what their way added to the pauses between chunks."""

    contender: str
    round: int
    streams: int
    p99_ms: float
    seen: int
    failed: int


@dataclass(frozen=True, slots=True)
class Cuts:
    """Whether HTTP chunks came through as they were: without usage, with it, and cut anywhere."""

    contender: str
    plain: bool
    usage: bool
    ragged: bool


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many streams at once: how many ran together, how many failed, memory before and after each time."""

    contender: str
    streams: int
    together: int
    failed: int
    errors: list[str]
    before_bytes: int
    after_bytes: list[int]


@dataclass(slots=True)
class Run:
    """Everything."""

    machine: dict[str, str]
    versions: dict[str, str]
    missing: dict[str, str]
    seconds: int
    rounds: int = 0
    took_s: float = 0.0
    others_share: float = 0.0
    loaded: list[Loaded] = field(default_factory=list)
    gaps: list[Gaps] = field(default_factory=list)
    cuts: list[Cuts] = field(default_factory=list)
    crowds: list[Crowd] = field(default_factory=list)

    def values(self, scenario: str, contender: str, of: Callable[[Loaded], float]) -> list[float]:
        """One number of each round, in order."""
        return [of(sample) for sample in self.loaded if (sample.scenario, sample.contender) == (scenario, contender)]

    def median(self, scenario: str, contender: str, of: Callable[[Loaded], float]) -> float:
        """The median over the rounds."""
        return statistics.median(self.values(scenario, contender, of))

    def gap(self, contender: str, streams: int) -> list[float]:
        """The added gap's p99 of each round."""
        return [sample.p99_ms for sample in self.gaps if (sample.contender, sample.streams) == (contender, streams)]

"""The samples of one run of `thaw_speed`: plain records, written as JSON and read by the report."""

from dataclasses import dataclass, field
from typing import Literal

from gateway.stack.local import Transfer

Variant = Literal["none", "cpu", "gpu"]
VARIANTS: tuple[Variant, ...] = ("none", "cpu", "gpu")


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed turn. `logprobs`: for each token its text, its log probability, and the runners-up with theirs."""

    ttft_ms: float
    total_ms: float
    prompt_tokens: int
    cached_tokens: int
    text: str
    logprobs: list[tuple[str, float, list[tuple[str, float]]]]


@dataclass(frozen=True, slots=True)
class Step:
    """A progress line of a freeze or a thaw: the stage, how far it is, and when the line arrived."""

    stage: str
    done: int
    total: int
    at_ms: float


@dataclass(frozen=True, slots=True)
class Frozen:
    """A freeze: its receipt, and the duration of a second freeze of the same state (None if not measured)."""

    window: str
    tokens: int
    chunks: int
    bytes: int
    computed: int
    duration_ms: float
    again_ms: float | None
    steps: list[Step]


@dataclass(frozen=True, slots=True)
class FrozenSession:
    """A session before the restart: its cold first turn, its hot later turns, and its freeze."""

    variant: Variant
    size: int
    cold: Answer
    hot: list[Answer]
    frozen: Frozen


@dataclass(frozen=True, slots=True)
class Thawed:
    """A thaw after the restart, and the next turn in the new session.

    `after_wipe`: it came later in the same run of the engine, after its prefix cache and LMCache's memory had been
    emptied. `loads` are the loads that LMCache logged: tokens and seconds.
    """

    variant: Variant
    size: int
    after_wipe: bool
    duration_ms: float
    chunks_expected: int
    chunks_found: int
    chunk_size: int
    receipt_cached: int | None
    prefetch_ms: float | None
    next: Answer
    loads: list[tuple[int, float]]

    @property
    def full_chunk_tokens(self) -> int:
        """Number of tokens in full chunks."""
        return self.chunks_expected * self.chunk_size

    @property
    def hit_share(self) -> float:
        """Share of the tokens in full chunks that the engine did not compute."""
        return min(self.next.cached_tokens, self.full_chunk_tokens) / self.full_chunk_tokens


@dataclass(frozen=True, slots=True)
class Control:
    """The same conversation, never frozen, in the engine of the thaws: the recomputed prompt, and the next turn."""

    size: int
    recompute: Answer
    next: Answer


@dataclass(frozen=True, slots=True)
class Files:
    """Times to read a window's files: plainly into allocated memory, and by LMCache from its disk tier."""

    size: int
    bytes: int
    files: int
    plain_ms: list[float]
    prefetch_ms: list[float]
    plain_uncached_ms: float | None
    prefetch_uncached_ms: float | None


@dataclass(frozen=True, slots=True)
class Cloned:
    """Clones of one window: the duration of each, and what they added on disk."""

    durations_ms: list[float]
    new_files: int
    new_bytes: int


@dataclass(slots=True)
class ModeRun:
    """All samples of one transfer mode, before and after a restart of the whole stack."""

    mode: Transfer
    started_s: float = 0.0
    restarted_s: float = 0.0
    others_share: list[float] = field(default_factory=list)
    before: list[FrozenSession] = field(default_factory=list)
    thawed: list[Thawed] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    files: list[Files] = field(default_factory=list)
    cloned: Cloned | None = None

    def control(self, size: int) -> Control:
        """Return the control of one prompt length."""
        return next(control for control in self.controls if control.size == size)

    def thaws(self, size: int, variant: Variant) -> list[Thawed]:
        """Return the thaws of one kind, the one right after the restart first."""
        return [thaw for thaw in self.thawed if (thaw.size, thaw.variant) == (size, variant)]

    def started(self, size: int) -> list[FrozenSession]:
        """Return the sessions of one prompt length, before the restart."""
        return [session for session in self.before if session.size == size]


@dataclass(slots=True)
class Run:
    """All samples of a run, and its circumstances."""

    machine: dict[str, str]
    versions: dict[str, str]
    model: str
    kv_bytes_per_token: int
    sizes: list[int]
    chunk_size: int
    repeats: int
    took_s: float = 0.0
    modes: list[ModeRun] = field(default_factory=list)

"""The report of a soak: what was asked, what was held at each moment, and what was left."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.soak_watch import Sample

# Growth that still counts as flat, of the memory in the second half. An hour at 10 MB more would take a machine's
# 16 GB in two months; the fragments of a heap breathe by a few MB.
_FLAT_MB_PER_H = 10.0
_JUDGED_MINUTES = 20.0  # a shorter run sees the heap grow into its shape and no more
_MAX_IDLE = 256  # connections that `gateway.engines.connection_pool` keeps at most
_SHOWN = 14  # rows of the table of samples
# Threads and pools are made when they are needed first.
_SPARE_FDS = 8


@dataclass(slots=True)
class Run:
    """Everything that was seen."""

    kind: str
    machine: dict[str, str]
    minutes: float
    took_s: float
    per_s: float
    at_once: int
    done: dict[str, int]
    answers: list[tuple[str, int, int]]
    failed: int
    failures: list[str]
    samples: list[Sample]
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold. `held` is None where the run was too short to tell."""

    text: str
    bound: str
    seen: str
    held: bool | None


def checks(run: Run) -> Iterator[Check]:
    """What must hold at the end."""
    start, end = run.samples[0], run.samples[-1]
    yield Check("requests that went wrong", "0", str(run.failed), run.failed == 0)
    yield Check("errors in the gateway's log", "0", str(len(run.log)), not run.log)
    turns = f"{end.in_flight} and {end.unrecorded}"
    yield Check("turns in flight, and unrecorded ones", "0 and 0", turns, turns == "0 and 0")
    new = {name: count for name, count in end.tasks.items() if count > start.tasks.get(name, 0)}
    yield Check("asyncio tasks beyond those at the start", "none", _named(new) or "none", not new)
    yield Check("connections of clients", "0", str(end.clients), end.clients == 0)
    yield Check("connections to the engine", f"idle ones, <= {_MAX_IDLE}", str(end.upstream), end.upstream <= _MAX_IDLE)
    bound = start.own_fds + _SPARE_FDS
    yield Check("other file descriptors", f"<= {bound}", f"{start.own_fds} -> {end.own_fds}", end.own_fds <= bound)
    left = {name: count for name, count in end.rows.items() if count}
    yield Check("rows after everything was deleted", "none", _named(left) or "none", not left)
    yield Check("pinned objects", "0", str(end.pins + end.redis_pins), end.pins + end.redis_pins == 0)
    slope = slope_mb_per_h(run.samples)
    long_enough = run.minutes >= _JUDGED_MINUTES
    seen = f"{slope:+.1f} MB an hour"
    yield Check("memory in the second half", f"<= +{_FLAT_MB_PER_H:g} MB an hour", seen,
                slope <= _FLAT_MB_PER_H if long_enough else None)  # fmt: skip


def slope_mb_per_h(samples: Sequence[Sample]) -> float:
    """Growth of the memory in the second half of the traffic, by least squares."""
    under = [sample for sample in samples if not sample.note]
    points = [(s.at_s / 3600, s.rss / 2**20) for s in under[len(under) // 2 :]]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [_head(run), _judged(run), _samples(run), _asked(run), _grown(run), _wrong(run)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(run: Run) -> str:
    facts = run.machine
    before = {"stack": "vLLM and LMCache with the demo model", "canned": "the canned engine"}[run.kind]
    return (
        f"# Soak before {before}\n\n"
        f"Written by `python -m loadtests.soak --{run.kind}`; the samples are in `soak_{run.kind}.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}\n"
        f"- {run.minutes:g} minutes, {sum(run.done.values()):,} actions ({sum(n for *_, n in run.answers):,} answers), "
        f"at most {run.per_s:g} a second and {run.at_once} at once; one process, SQLite\n"
        "- the gateway runs as `cwg serve` runs it, with a thread that counts its tasks and objects\n\n"
        f"![Memory, connections and rows](soak_{run.kind}.svg)"
    )


def _judged(run: Run) -> str:
    words = {True: "yes", False: "**no**", None: f"not judged under {_JUDGED_MINUTES:g} minutes"}
    lines = [f"| {c.text} | {c.bound} | {c.seen} | {words[c.held]} |" for c in checks(run)]
    return "## What is left\n\n| | bound | seen | held |\n| --- | ---: | ---: | --- |\n" + "\n".join(lines)


def _samples(run: Run) -> str:
    step = max(1, len(run.samples) // _SHOWN)
    chosen = [s for at, s in enumerate(run.samples) if at % step == 0 or s.note]
    names = sorted({name for sample in run.samples for name in sample.rows})
    head = ["minute", "", "actions", "MB", "objects", "fds", "to the engine", "from clients", "threads", "tasks",
            "store MB", "KV files", "KV MB", "pins", *names]  # fmt: skip
    rows = [
        [f"{s.at_s / 60:.1f}", s.note, f"{s.requests:,}", f"{s.rss / 2**20:.1f}", f"{s.objects:,}", s.own_fds,
         s.upstream, s.clients, s.threads, sum(s.tasks.values()), f"{s.store_bytes / 2**20:.1f}", s.kv_files,
         f"{s.kv_bytes / 2**20:.0f}", s.pins + s.redis_pins, *(s.rows.get(name, 0) for name in names)]
        for s in chosen
    ]  # fmt: skip
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "## Over the time\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _asked(run: Run) -> str:
    done = ", ".join(f"{count:,} {name}" for name, count in sorted(run.done.items(), key=lambda each: -each[1]))
    by_route = itertools.groupby(sorted(run.answers), key=lambda each: each[0])
    lines = [f"| {route} | {', '.join(f'{n:,} x {status}' for _, status, n in each)} |" for route, each in by_route]
    return f"## What was asked\n\n{done}\n\n| | answers |\n| --- | --- |\n" + "\n".join(lines)


def _grown(run: Run) -> str:
    """Which objects there are more of at the end than at the start: where to look when memory grows."""
    start, end = run.samples[0], run.samples[-1]
    more = {name: count - start.types.get(name, 0) for name, count in end.types.items()}
    found = sorted(((n, name) for name, n in more.items() if n > 0), reverse=True)[:8]
    text = ", ".join(f"{n:+,} {name}" for n, name in found)
    return f"## Objects more than at the start\n\n{end.objects - start.objects:+,} in all: {text or 'none'}."


def _wrong(run: Run) -> str:
    found = [f"```\n{text}\n```" for text in (*run.failures, *run.log[:20])]
    return "## What went wrong\n\n" + "\n\n".join(found) if found else ""


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def plot(run: Run, file: Path) -> None:
    """Draw memory, connections and rows over the time."""
    import matplotlib as mpl  # noqa: PLC0415 - only the plot needs it, and it takes a second

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "soak"  # the same samples give the same file
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    minutes = [s.at_s / 60 for s in run.samples]
    axes[0].plot(minutes, [s.rss / 2**20 for s in run.samples], color="#c8502a")
    axes[0].set_title(f"memory, MB ({slope_mb_per_h(run.samples):+.1f} an hour in the second half)", fontsize=10)
    axes[0].set_ylim(bottom=0)
    for name, values in (
        ("other fds", [s.own_fds for s in run.samples]),
        ("to the engine", [s.upstream for s in run.samples]),
        ("from clients", [s.clients for s in run.samples]),
        ("tasks", [sum(s.tasks.values()) for s in run.samples]),
    ):
        axes[1].plot(minutes, values, label=name)
    axes[1].set_title("connections and tasks", fontsize=10)
    for name in sorted({name for sample in run.samples for name in sample.rows}):
        axes[2].plot(minutes, [s.rows.get(name, 0) for s in run.samples], label=name)
    axes[2].set_title("rows", fontsize=10)
    for axis in axes:
        axis.set_xlabel("minutes", fontsize=8)
        axis.grid(color="#e4e7eb")
    for axis in axes[1:]:
        axis.legend(fontsize=6)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)

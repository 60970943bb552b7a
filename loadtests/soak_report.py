"""The report of a soak test: the checks, the samples over time, and the requests."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.soak_sampler import Sample

# Memory growth in the second half that still counts as flat. 10 MB an hour would fill 16 GB in two months;
# fragmentation makes the heap vary by a few MB.
_FLAT_MB_PER_H = 10.0
_JUDGED_MINUTES = 20.0  # in a shorter run the heap still grows to its working size
_MAX_IDLE = 256  # connections that `gateway.engines.connection_pool` keeps at most
_SHOWN = 14  # rows of the table of samples
# Threads and pools are created on first use.
_SPARE_FDS = 8


@dataclass(slots=True)
class Run:
    """The results of a run, and its circumstances."""

    kind: str
    machine: dict[str, str]
    minutes: float
    took_s: float
    per_s: float
    concurrency: int
    actions: dict[str, int]
    answers: list[tuple[str, int, int]]
    failed: int
    failures: list[str]
    samples: list[Sample]
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `passed` is None if the run was too short to tell."""

    text: str
    bound: str
    measured: str
    passed: bool | None


def checks(run: Run) -> Iterator[Check]:
    """Yield the checks on the state at the end."""
    start, end = run.samples[0], run.samples[-1]
    yield Check("failed requests", "0", str(run.failed), run.failed == 0)
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
    measured = f"{slope:+.1f} MB an hour"
    yield Check("memory growth in the second half", f"<= +{_FLAT_MB_PER_H:g} MB an hour", measured,
                slope <= _FLAT_MB_PER_H if long_enough else None)  # fmt: skip


def slope_mb_per_h(samples: Sequence[Sample]) -> float:
    """Return the memory growth in the second half of the traffic, by least squares."""
    under = [sample for sample in samples if not sample.note]
    points = [(s.at_s / 3600, s.rss / 2**20) for s in under[len(under) // 2 :]]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def markdown(run: Run) -> str:
    """Return the report as Markdown."""
    parts = [_head(run), _checks(run), _samples(run), _requests(run), _object_growth(run), _failures(run)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(run: Run) -> str:
    facts = run.machine
    engine = {"stack": "vLLM and LMCache with the demo model", "canned": "the canned engine"}[run.kind]
    return (
        f"# Soak test in front of {engine}\n\n"
        f"Written by `python -m loadtests.soak --{run.kind}`; the samples are in `soak_{run.kind}.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}\n"
        f"- {run.minutes:g} minutes, {sum(run.actions.values()):,} actions "
        f"({sum(n for *_, n in run.answers):,} responses), "
        f"at most {run.per_s:g} a second and {run.concurrency} concurrent; one process, SQLite\n"
        "- the gateway runs as under `cwg serve`, with a thread that counts its tasks and objects\n\n"
        f"![Memory, connections and rows](soak_{run.kind}.svg)"
    )


def _checks(run: Run) -> str:
    words = {True: "yes", False: "**no**", None: f"not judged under {_JUDGED_MINUTES:g} minutes"}
    lines = [f"| {c.text} | {c.bound} | {c.measured} | {words[c.passed]} |" for c in checks(run)]
    return "## State at the end\n\n| | limit | measured | passed |\n| --- | ---: | ---: | --- |\n" + "\n".join(lines)


def _samples(run: Run) -> str:
    step = max(1, len(run.samples) // _SHOWN)
    selected = [s for at, s in enumerate(run.samples) if at % step == 0 or s.note]
    names = sorted({name for sample in run.samples for name in sample.rows})
    head = ["minute", "", "actions", "MB", "objects", "fds", "to the engine", "from clients", "threads", "tasks",
            "store MB", "KV files", "KV MB", "pins", *names]  # fmt: skip
    rows = [
        [f"{s.at_s / 60:.1f}", s.note, f"{s.requests:,}", f"{s.rss / 2**20:.1f}", f"{s.objects:,}", s.own_fds,
         s.upstream, s.clients, s.threads, sum(s.tasks.values()), f"{s.store_bytes / 2**20:.1f}", s.kv_files,
         f"{s.kv_bytes / 2**20:.0f}", s.pins + s.redis_pins, *(s.rows.get(name, 0) for name in names)]
        for s in selected
    ]  # fmt: skip
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "## Over time\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _requests(run: Run) -> str:
    actions = ", ".join(f"{count:,} {name}" for name, count in sorted(run.actions.items(), key=lambda item: -item[1]))
    by_route = itertools.groupby(sorted(run.answers), key=lambda answer: answer[0])
    lines = [f"| {route} | {', '.join(f'{n:,} x {status}' for _, status, n in group)} |" for route, group in by_route]
    return f"## Requests\n\n{actions}\n\n| | responses |\n| --- | --- |\n" + "\n".join(lines)


def _object_growth(run: Run) -> str:
    """The types with more objects at the end than at the start: where to look when memory grows."""
    start, end = run.samples[0], run.samples[-1]
    growth = {name: count - start.types.get(name, 0) for name, count in end.types.items()}
    largest = sorted(((n, name) for name, n in growth.items() if n > 0), reverse=True)[:8]
    text = ", ".join(f"{n:+,} {name}" for n, name in largest)
    return f"## Object growth\n\n{end.objects - start.objects:+,} in all: {text or 'none'}."


def _failures(run: Run) -> str:
    failures = [f"```\n{text}\n```" for text in (*run.failures, *run.log[:20])]
    return "## Failures\n\n" + "\n\n".join(failures) if failures else ""


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def plot(run: Run, file: Path) -> None:
    """Draw memory, connections and rows over time."""
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

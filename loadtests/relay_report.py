"""The report of `relay_overhead`: a table, the targets, and a plot."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.contenders import GATEWAY, UPSTREAM
from loadtests.relay_samples import HISTORY, JSON, SSE, CrowdSample, LoadSample, Run

_FLAT = 0.10  # memory growth from the first wave of streams to the last that still counts as flat
_TITLES = {
    f"{JSON}_c1": "JSON, 1 connection: p50, ms",
    f"{JSON}_c32": "JSON, 32 connections: requests/s",
    f"{SSE}_c1": "whole stream, 1 connection: p50, ms",
    f"{SSE}_c32": "streams, 32 connections: streams/s",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A target and the measured values, one per round."""

    text: str
    limit: float
    is_upper_limit: bool
    values: Sequence[float]
    unit: str

    @property
    def value(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the target was met."""
        return self.value <= self.limit if self.is_upper_limit else self.value >= self.limit


def markdown(run: Run) -> str:
    """Return the report as Markdown."""
    parts = [_head(run), _table(run), "## Targets\n\n" + _targets(run), _streams(run), _noise(run)]
    return "\n\n".join(parts) + "\n"


def _head(run: Run) -> str:
    facts = run.machine
    versions = ", ".join(f"{name} {version}".strip() for name, version in run.versions.items() if name != UPSTREAM)
    missing = "".join(f"\n- not measured: {name} ({how})" for name, how in run.missing.items())
    return (
        "# Relay overhead\n\n"
        "Written by `python -m loadtests.relay_overhead`; the raw samples are in `relay_overhead.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}, wrk {facts['wrk']}\n"
        f"- {versions}\n"
        f"- {run.rounds} rounds of {run.seconds} s for each load and contender, alternating; medians over the rounds; "
        "ratios and differences are taken within a round, then their median\n"
        "- a body of 600 bytes, streams of 64 events and [DONE] (the gateway also requests usage and removes it "
        "again), 64 session ids in rotation; the gateway with its defaults and its SQLite store, one process\n"
        "- the gateway's rates include the time it takes to record the last turns after wrk has ended; CPU time is "
        "that of the whole process tree per answered request, and is least affected by other load on the machine"
        f"{missing}"
    )


def _table(run: Run) -> str:
    header = [
        "", "JSON c=1 p50 / p99, ms", "added", "JSON c=32 req/s", "x upstream", "SSE c=1 p50 / p99, ms", "added",
        "SSE c=32 streams/s", "x upstream", "500 KB c=1 p50, ms", "added", "CPU per request, us", "per stream, us",
    ]  # fmt: skip
    rows = [_row(run, name) for name in run.versions]
    return "\n".join([_line(header), _line(["---", *["---:"] * (len(header) - 1)]), *map(_line, rows)])


def _row(run: Run, name: str) -> list[str]:
    def latency(scenario: str) -> str:
        return f"{run.median(scenario, name, _p50):.2f} / {run.median(scenario, name, _p99):.2f}"

    def extra(scenario: str) -> str:
        return "" if name == UPSTREAM else f"+{statistics.median(added(run, scenario, name)):.2f}"

    def rate(scenario: str) -> list[str]:
        share = f"{statistics.median(ratio(run, scenario, name, UPSTREAM)):.3f}"
        return [f"{run.median(scenario, name, _rate):,.0f}", share]

    failed = sum(sample.failed for sample in run.loads if sample.contender == name)
    return [
        f"{name} ({failed} requests failed)" if failed else name, latency(f"{JSON}_c1"), extra(f"{JSON}_c1"),
        *rate(f"{JSON}_c32"), latency(f"{SSE}_c1"), extra(f"{SSE}_c1"), *rate(f"{SSE}_c32"),
        f"{run.median(f'{HISTORY}_c1', name, _p50):.2f}",
        extra(f"{HISTORY}_c1"), f"{run.median(f'{JSON}_c32', name, _cpu):.0f}",
        f"{run.median(f'{SSE}_c32', name, _cpu):.0f}",
    ]  # fmt: skip


def _targets(run: Run) -> str:
    if GATEWAY not in run.versions:
        return "the gateway was not measured"
    rows = [["target", "limit", "measured", "rounds", "met"], ["---", "---:", "---:", "---:", "---"]]
    rows += [_target_row(target) for target in _numeric_targets(run)]
    return "\n".join(map(_line, [*rows, *_yes_no_targets(run)]))


def _target_row(target: Target) -> list[str]:
    sign = "<=" if target.is_upper_limit else ">="
    if not target.values:
        return [target.text, f"{sign} {target.limit:g} {target.unit}", "", "", "not measured"]
    factor = target.value / target.limit if target.is_upper_limit else target.limit / max(target.value, 1e-9)
    verdict = "yes" if target.met else f"**no**, off by a factor of {factor:.2f}"
    if target.met and 0 < factor < 1:
        verdict = f"yes, better by a factor of {1 / factor:.2f}"
    spread = f"{min(target.values):.2f} to {max(target.values):.2f}"
    return [target.text, f"{sign} {target.limit:g} {target.unit}", f"{target.value:.2f}", spread, verdict]


def _numeric_targets(run: Run) -> Iterator[Target]:
    """Yield the targets that are numbers."""
    for text, scenario, limit in (
        ("added p50, JSON c=1", f"{JSON}_c1", 0.35),
        ("added p50, whole stream c=1", f"{SSE}_c1", 0.35),
        ("added p50, 500 KB history c=1", f"{HISTORY}_c1", 5.0),
    ):
        yield Target(text, limit, True, added(run, scenario, GATEWAY), "ms")
    for scenario, peer, limit in (
        (JSON, "vllm-router", 0.25),
        (JSON, "litellm", 60.0),
        (SSE, "vllm-router", 0.9),
        (SSE, "agentic-api", 1.05),
        (SSE, "litellm", 50.0),
    ):
        values = ratio(run, f"{scenario}_c32", GATEWAY, peer) if peer in run.versions else []
        yield Target(f"{scenario.upper()} c=32, times {peer}", limit, False, values, "x")
    for streams in sorted({sample.streams for sample in run.gaps}):
        pairs = zip(run.gap(GATEWAY, streams), run.gap(UPSTREAM, streams), strict=True)
        values = [own - alone for own, alone in pairs]
        yield Target(f"added inter-chunk gap p99, {streams} paced at 5 ms", 2.0, True, values, "ms")


def _yes_no_targets(run: Run) -> Iterator[list[str]]:
    chunking = next(c for c in run.chunking if c.contender == GATEWAY)
    unchanged = chunking.plain and chunking.usage and chunking.ragged
    yield ["HTTP chunks and their order unchanged", "same", "same" if unchanged else "changed", "", _yes_no(unchanged)]
    crowd = next((c for c in run.crowds if c.contender == GATEWAY), None)
    if crowd is not None:
        outcome = f"{crowd.failed} failed, {crowd.concurrent} overlapping"
        yield [f"{crowd.streams} concurrent streams", "none failed", outcome, "", _yes_no(crowd.failed == 0)]
        growth = crowd.after_bytes[-1] / crowd.after_bytes[0] - 1
        yield ["memory growth", f"<= {_FLAT:.0%}", f"{growth:+.1%}", _memory(crowd), _yes_no(growth <= _FLAT)]


def _streams(run: Run) -> str:
    counts = sorted({sample.streams for sample in run.gaps})
    header = ["", "chunks unchanged (plain, usage, ragged)", *(f"gap p99, {n} concurrent, ms" for n in counts),
              "concurrent streams: failed", "memory before -> after, MB"]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in run.versions:
        chunking = next(c for c in run.chunking if c.contender == name)
        crowd = next((c for c in run.crowds if c.contender == name), None)
        rows.append([
            name,
            " ".join("yes" if kept else "no" for kept in (chunking.plain, chunking.usage, chunking.ragged)),
            *(f"{statistics.median(run.gap(name, n)):.2f}" for n in counts),
            f"{crowd.failed} of {crowd.streams * len(crowd.after_bytes)}" if crowd else "",
            _memory(crowd) if crowd else "",
        ])  # fmt: skip
    return "## Streams\n\n" + "\n".join(map(_line, rows))


def _noise(run: Run) -> str:
    lines = [
        f"Other processes used {run.others_share:.0%} of the machine during the run. The range of the upstream alone "
        "over the rounds shows how far absolute numbers can be trusted:\n"
    ]
    for scenario, title in _TITLES.items():
        metric = _p50 if scenario.endswith("_c1") else _rate
        values = run.values(scenario, UPSTREAM, metric)
        lines.append(f"- {title}: {min(values):,.3g} to {max(values):,.3g}")
    return f"## Noise\n\n{chr(10).join(lines)}\n\nThe run took {run.took_s:.0f} s."


def added(run: Run, scenario: str, name: str) -> list[float]:
    """Return what a contender adds to the upstream's p50, per round."""
    pairs = zip(run.values(scenario, name, _p50), run.values(scenario, UPSTREAM, _p50), strict=True)
    return [own - alone for own, alone in pairs]


def ratio(run: Run, scenario: str, name: str, other: str) -> list[float]:
    """Return the ratio of a contender's rate to another's, per round."""
    pairs = zip(run.values(scenario, name, _rate), run.values(scenario, other, _rate), strict=True)
    return [own / other for own, other in pairs if other]


def plot(run: Run, file: Path) -> None:
    """Draw the four main numbers: a large dot for the median, a small one per round (bars need a linear axis)."""
    import matplotlib as mpl  # noqa: PLC0415 - only the plot needs it, and it takes a second

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "relay_overhead"  # the same samples give the same file
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(run.versions)
    figure, axes = plt.subplots(2, 2, figsize=(11, 0.9 + 0.9 * len(names)), layout="constrained")
    for axis, (scenario, title) in zip(axes.flat, _TITLES.items(), strict=True):
        metric = _p50 if scenario.endswith("_c1") else _rate
        for place, name in enumerate(names):
            values = run.values(scenario, name, metric)
            median = statistics.median(values)
            colour = "#c8502a" if name == GATEWAY else "#5d7186"
            axis.plot([min(values), max(values)], [place] * 2, color=colour, linewidth=1)
            axis.plot(values, [place] * len(values), "o", color=colour, markersize=3)
            axis.plot(median, place, "o", color=colour, markersize=9)
            axis.annotate(f"{median:,.3g}" if median < 100 else f"{median:,.0f}", (median, place), (0, 8),
                          textcoords="offset points", fontsize=8, ha="center")  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set_xscale("log")
        axis.grid(axis="x", color="#e4e7eb")
        axis.margins(x=0.1, y=0.2)
        axis.invert_yaxis()
        axis.set_title(f"{title} ({'less' if metric is _p50 else 'more'} is better, log scale)", fontsize=10)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _p50(sample: LoadSample) -> float:
    return sample.p50_ms


def _p99(sample: LoadSample) -> float:
    return sample.p99_ms


def _rate(sample: LoadSample) -> float:
    return sample.per_s


def _cpu(sample: LoadSample) -> float:
    return sample.cpu_us


def _memory(crowd: CrowdSample) -> str:
    return " -> ".join(f"{size / 2**20:.0f}" for size in (crowd.before_bytes, *crowd.after_bytes))


def _yes_no(good: bool) -> str:
    return "yes" if good else "**no**"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""The report of `relay_overhead`: a table for people, what became of each target, and a plot."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.contenders import GATEWAY, UPSTREAM
from loadtests.relay_samples import HISTORY, JSON, SSE, Crowd, Loaded, Run

_FLAT = 0.10  # growth from the first crowd of streams to the last that still counts as flat: an allocator breathes
_TITLES = {
    f"{JSON}_c1": "JSON, 1 connection: p50, ms",
    f"{JSON}_c32": "JSON, 32 connections: requests/s",
    f"{SSE}_c1": "whole stream, 1 connection: p50, ms",
    f"{SSE}_c32": "streams, 32 connections: streams/s",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked for and what was seen, over the rounds; `most` tells whether the limit is an upper one."""

    text: str
    limit: float
    most: bool
    seen: Sequence[float]
    unit: str

    @property
    def value(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seen)

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.value <= self.limit if self.most else self.value >= self.limit


def markdown(run: Run) -> str:
    """The whole report."""
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
        f"- {run.rounds} rounds of {run.seconds} s for each load and contender, in turns; medians over the rounds; "
        "ratios and differences are taken inside a round, then their median\n"
        "- a body of 600 bytes, streams of 64 events and [DONE] (the gateway also asks for usage and takes it out "
        "again), 64 session ids in turn; the gateway with its defaults and its SQLite store, one process\n"
        "- the gateway's rates include the time in which it records the last turns after wrk has ended; processor time "
        "is of the whole process tree, by what was answered, and depends least on what else the machine does"
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

    failed = sum(sample.failed for sample in run.loaded if sample.contender == name)
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
    rows = [["target", "asked", "seen", "rounds", "met"], ["---", "---:", "---:", "---:", "---"]]
    rows += [_judged(target) for target in _measured(run)]
    return "\n".join(map(_line, [*rows, *_yes_or_no(run)]))


def _judged(target: Target) -> list[str]:
    sign = "<=" if target.most else ">="
    if not target.seen:
        return [target.text, f"{sign} {target.limit:g} {target.unit}", "", "", "not measured"]
    factor = target.value / target.limit if target.most else target.limit / max(target.value, 1e-9)
    verdict = "yes" if target.met else f"**no**, {factor:.2f} times off"
    if target.met and 0 < factor < 1:
        verdict = f"yes, {1 / factor:.2f} times better"
    spread = f"{min(target.seen):.2f} to {max(target.seen):.2f}"
    return [target.text, f"{sign} {target.limit:g} {target.unit}", f"{target.value:.2f}", spread, verdict]


def _measured(run: Run) -> Iterator[Target]:
    """The targets that are numbers."""
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
        seen = ratio(run, f"{scenario}_c32", GATEWAY, peer) if peer in run.versions else []
        yield Target(f"{scenario.upper()} c=32, times {peer}", limit, False, seen, "x")
    for streams in sorted({sample.streams for sample in run.gaps}):
        pairs = zip(run.gap(GATEWAY, streams), run.gap(UPSTREAM, streams), strict=True)
        seen = [mine - alone for mine, alone in pairs]
        yield Target(f"added inter-chunk gap p99, {streams} paced at 5 ms", 2.0, True, seen, "ms")


def _yes_or_no(run: Run) -> Iterator[list[str]]:
    cuts = next(c for c in run.cuts if c.contender == GATEWAY)
    whole = cuts.plain and cuts.usage and cuts.ragged
    yield ["HTTP chunks and their order untouched", "same", "same" if whole else "changed", "", _word(whole)]
    crowd = next((c for c in run.crowds if c.contender == GATEWAY), None)
    if crowd is not None:
        seen = f"{crowd.failed} failed, {crowd.together} under way together"
        yield [f"{crowd.streams} concurrent streams", "none failed", seen, "", _word(crowd.failed == 0)]
        growth = crowd.after_bytes[-1] / crowd.after_bytes[0] - 1
        yield ["memory over them", f"<= {_FLAT:.0%}", f"{growth:+.1%}", _memory(crowd), _word(growth <= _FLAT)]


def _streams(run: Run) -> str:
    header = ["", "chunks kept (plain, usage, ragged)", *(f"gap p99, {n} at once, ms" for n in _gap_counts(run)),
              "concurrent streams: failed", "memory before -> after, MB"]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in run.versions:
        cuts = next(c for c in run.cuts if c.contender == name)
        crowd = next((c for c in run.crowds if c.contender == name), None)
        rows.append([
            name,
            " ".join("yes" if kept else "no" for kept in (cuts.plain, cuts.usage, cuts.ragged)),
            *(f"{statistics.median(run.gap(name, n)):.2f}" for n in _gap_counts(run)),
            f"{crowd.failed} of {crowd.streams * len(crowd.after_bytes)}" if crowd else "",
            _memory(crowd) if crowd else "",
        ])  # fmt: skip
    return "## Streams\n\n" + "\n".join(map(_line, rows))


def _noise(run: Run) -> str:
    lines = [
        f"Other processes used {run.others_share:.0%} of the machine meanwhile. What the upstream alone did from "
        "round to round, lowest to highest, tells how far absolute numbers can be trusted:\n"
    ]
    for scenario, title in _TITLES.items():
        of = _p50 if scenario.endswith("_c1") else _rate
        values = run.values(scenario, UPSTREAM, of)
        lines.append(f"- {title}: {min(values):,.3g} to {max(values):,.3g}")
    return f"## How noisy it was\n\n{chr(10).join(lines)}\n\nThe run took {run.took_s:.0f} s."


def added(run: Run, scenario: str, name: str) -> list[float]:
    """What a contender adds to the upstream's p50, of each round."""
    pairs = zip(run.values(scenario, name, _p50), run.values(scenario, UPSTREAM, _p50), strict=True)
    return [mine - alone for mine, alone in pairs]


def ratio(run: Run, scenario: str, name: str, other: str) -> list[float]:
    """A contender's rate over another's, of each round."""
    pairs = zip(run.values(scenario, name, _rate), run.values(scenario, other, _rate), strict=True)
    return [mine / theirs for mine, theirs in pairs if theirs]


def plot(run: Run, file: Path) -> None:
    """Draw the four main numbers: a large dot for the median, a small one for each round. A log axis allows no bars."""
    import matplotlib as mpl  # noqa: PLC0415 - only the plot needs it, and it takes a second

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "relay_overhead"  # the same samples give the same file
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(run.versions)
    figure, axes = plt.subplots(2, 2, figsize=(11, 0.9 + 0.9 * len(names)), layout="constrained")
    for axis, (scenario, title) in zip(axes.flat, _TITLES.items(), strict=True):
        of = _p50 if scenario.endswith("_c1") else _rate
        for place, name in enumerate(names):
            values = run.values(scenario, name, of)
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
        axis.set_title(f"{title} ({'less' if of is _p50 else 'more'} is better, log scale)", fontsize=10)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _p50(sample: Loaded) -> float:
    return sample.p50_ms


def _p99(sample: Loaded) -> float:
    return sample.p99_ms


def _rate(sample: Loaded) -> float:
    return sample.per_s


def _cpu(sample: Loaded) -> float:
    return sample.cpu_us


def _gap_counts(run: Run) -> list[int]:
    return sorted({sample.streams for sample in run.gaps})


def _memory(crowd: Crowd) -> str:
    return " -> ".join(f"{size / 2**20:.0f}" for size in (crowd.before_bytes, *crowd.after_bytes))


def _word(good: bool) -> str:
    return "yes" if good else "**no**"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

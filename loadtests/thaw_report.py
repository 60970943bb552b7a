"""What a run of `thaw_speed` says, as Markdown and as a plot."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests import thaw_files
from loadtests.thaw_samples import VARIANTS, Answer, Files, ModeRun, Run, Thawed, Variant

_FREEZE_TOKENS = 32_000
_WARMED = {"none": "thawed", "cpu": "thawed, prefetched", "gpu": "thawed, through the engine"}


@dataclass(frozen=True, slots=True)
class Target:
    """A number that was promised, beside the one that was seen."""

    text: str
    limit: float
    unit: str
    seen: float | None
    most: bool = False

    @property
    def verdict(self) -> str:
        """Met or not, and by how much."""
        if self.seen is None:
            return "not measured"
        if (self.seen <= self.limit) if self.most else (self.seen >= self.limit):
            if not self.limit or not self.seen:
                return "met"
            return f"met, {self.limit / self.seen if self.most else self.seen / self.limit:.2f} times over"
        if not self.limit or not self.seen:
            return "**not met**"
        return f"**not met**, {self.seen / self.limit if self.most else self.limit / self.seen:.2f} times off"


def markdown(run: Run) -> str:
    """Everything, in sections."""
    parts = [_head(run), *(_targets(run, mode) for mode in run.modes[:1]), _first_bytes(run), _verbs(run), _files(run),
             _equality(run), _noise(run)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _head(run: Run) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in run.versions.items())
    return (
        "# How fast a frozen conversation comes back\n\n"
        f"{machine}.\n{versions}.\nModel: {run.model}, {run.kv_bytes_per_token:,} bytes of KV per token, bfloat16; "
        f"LMCache chunks of {run.chunk_size} tokens, disk tier only; random weights, real sizes.\n\n"
        "Between what is called cold or hot and what is called thawed, gateway, vLLM and LMCache were stopped and "
        "started again. *Recomputed* is the same length under a new salt in the same run of the engine as the thaws. "
        "TTFT: from before the request is sent to the first text of the streamed reply, at the client, through the "
        f"gateway. Made by `python -m loadtests.thaw_speed` in {run.took_s / 60:.0f} minutes."
    )


def _targets(run: Run, mode: ModeRun) -> str:
    size = run.sizes[-1]
    rows = [["target", "asked", "seen", ""], ["---", "---:", "---:", "---"]]
    for target in targets(run, mode):
        sign = "<=" if target.most else ">="
        seen = "" if target.seen is None else f"{_short(target.seen)} {target.unit}"
        rows.append([target.text, f"{sign} {target.limit:g} {target.unit}", seen, target.verdict])
    return (
        f"## Targets, {mode.mode}, {size:,} tokens\n\n{_table(rows)}\n\n"
        "The thaws judged here are those right after the restart."
    )


def targets(run: Run, mode: ModeRun) -> Iterator[Target]:
    """The promises, judged on the longest prompt and on the thaws right after the restart."""
    size = run.sizes[-1]
    cold = mode.control(size).recompute.ttft_ms
    yield Target("recompute / thawed, TTFT", 40, "x", cold / mode.thaws(size, "none")[0].next.ttft_ms)
    yield Target("recompute / thawed and prefetched, TTFT", 80, "x", cold / mode.thaws(size, "cpu")[0].next.ttft_ms)
    yield Target("whole chunks hit, every thaw", 99, "%", 100 * min(thaw.hit_share for thaw in mode.thawed))
    yield from _throughput(next(files for files in mode.files if files.size == size))
    freezes = [session.frozen for session in mode.started(size)]
    slowest = max(frozen.duration_ms / frozen.tokens for frozen in freezes) * _FREEZE_TOKENS / 1000
    yield Target("freeze, of 32k tokens at the pace of the slowest", 2, "s", slowest, most=True)
    if mode.cloned:
        yield Target("clone", 10, "ms", statistics.median(mode.cloned.durations_ms), most=True)
        yield Target("clone, new files", 0, "files", mode.cloned.new_files, most=True)


def _throughput(files: Files) -> Iterator[Target]:
    share = 100 * statistics.median(files.plain_ms) / statistics.median(files.prefetch_ms)
    yield Target("disk tier to LMCache's memory, of a plain copy, from the page cache", 50, "%", share)
    if files.plain_uncached_ms and files.prefetch_uncached_ms:
        share = 100 * files.plain_uncached_ms / files.prefetch_uncached_ms
        yield Target("the same, from the disk itself", 50, "%", share)


def _first_bytes(run: Run) -> str:
    header = ["mode", "tokens", "cold", "recomputed", *_WARMED.values(), "hot",
              *(f"recomputed / {word}" for word in _WARMED.values())]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for mode in run.modes:
        for size in run.sizes:
            recomputed = mode.control(size).recompute.ttft_ms
            first = [mode.thaws(size, variant)[0].next.ttft_ms for variant in VARIANTS]
            rows.append([
                mode.mode,
                f"{mode.control(size).recompute.prompt_tokens:,}",
                _spread(session.cold.ttft_ms for session in mode.started(size)),
                f"{recomputed:,.0f}",
                *(_spread((thaw.next.ttft_ms for thaw in mode.thaws(size, v)), first=True) for v in VARIANTS),
                _spread(turn.ttft_ms for session in mode.started(size) for turn in session.hot),
                *(f"{recomputed / ms:.1f}x" for ms in first),
            ])  # fmt: skip
    return (
        "## Time to the first text of the next turn, ms\n\n" + _table(rows) + "\n\n"
        "Cold, hot: median (lowest to highest). Thawed: right after the restart (and again, after the engine's prefix "
        "cache and LMCache's memory were emptied). The ratios are of the thaws right after the restart."
    )


def _verbs(run: Run) -> str:
    header = ["mode", "window, tokens", "freeze, ms", "tokens it computed", "freeze again, ms", "thaw, ms",
              "thaw and prefetch, ms", "of it the prefetch", "thaw through the engine, ms", "chunks hit, lowest",
              "LMCache to vLLM, MB/s"]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for mode in run.modes:
        for size in run.sizes:
            frozen = [session.frozen for session in mode.started(size)]
            thaws = [thaw for variant in VARIANTS for thaw in mode.thaws(size, variant)]
            rows.append([
                mode.mode,
                f"{max(one.tokens for one in frozen):,}",
                _spread(one.duration_ms for one in frozen),
                f"{max(one.computed for one in frozen)}",
                _spread(one.again_ms for one in frozen if one.again_ms is not None),
                *_thaw_times(mode, size),
                f"{100 * min(thaw.hit_share for thaw in thaws):.1f} %",
                _load_rate(thaws, run.kv_bytes_per_token),
            ])  # fmt: skip
    return "## The verbs\n\n" + _table(rows)


def _thaw_times(mode: ModeRun, size: int) -> Iterator[str]:
    for variant in VARIANTS:
        thaws = mode.thaws(size, variant)
        yield _spread((thaw.duration_ms for thaw in thaws), first=True)
        if variant == "cpu":
            yield _spread((thaw.prefetch_ms for thaw in thaws if thaw.prefetch_ms is not None), first=True)


def _load_rate(thaws: Iterable[Thawed], kv_bytes: int) -> str:
    rates = [tokens * kv_bytes / seconds / 1e6 for thaw in thaws for tokens, seconds in thaw.loads if seconds]
    return f"{statistics.median(rates):,.0f}" if rates else ""


def _files(run: Run) -> str:
    header = ["mode", "bytes", "files", "plain copy, MB/s", "LMCache's load, MB/s", "share", "from the disk: plain",
              "LMCache", "share"]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for mode in run.modes:
        for files in mode.files:
            plain, load = (thaw_files.rate(files.bytes, ms) / 1e6 for ms in (files.plain_ms, files.prefetch_ms))
            rows.append([mode.mode, f"{files.bytes:,}", str(files.files), f"{plain:,.0f}", f"{load:,.0f}",
                         f"{load / plain:.0%}", *_uncached(files)])  # fmt: skip
    return (
        "## From the disk tier into LMCache's memory\n\n" + _table(rows) + "\n\n"
        "Plain copy: each file read into memory that is there already, one after the other. LMCache's load: "
        "`POST /cache/prefetches` until it is completed. From the disk: after these files were taken out of the page "
        "cache, once."
    )


def _uncached(files: Files) -> Iterator[str]:
    if not files.plain_uncached_ms or not files.prefetch_uncached_ms:
        yield from ("", "", "")
        return
    plain, load = (files.bytes / ms / 1e3 for ms in (files.plain_uncached_ms, files.prefetch_uncached_ms))
    yield from (f"{plain:,.0f}", f"{load:,.0f}", f"{load / plain:.0%}")


def _equality(run: Run) -> str:
    rows = [["mode", "tokens", "cached: thawed, control", "tokens of the reply", "same", "largest difference of a log "
             "probability"], ["---", "---:", "---:", "---:", "---", "---:"]]  # fmt: skip
    for mode in run.modes:
        for size in run.sizes:
            thawed, control = mode.thaws(size, "none")[0].next, mode.control(size).next
            rows.append([
                mode.mode,
                f"{thawed.prompt_tokens:,}",
                f"{thawed.cached_tokens:,}, {control.cached_tokens:,}",
                str(len(thawed.logprobs)),
                "yes" if thawed.text == control.text else "**no**",
                f"{difference(thawed, control):g}",
            ])  # fmt: skip
    return (
        "## Is it the same conversation?\n\n" + _table(rows) + "\n\n"
        "The next turn, greedy, with the log probabilities of each token and of three runners-up: in the session "
        "thawed from the disk, and in one with the same words that was never frozen, in the same run of the engine."
    )


def difference(one: Answer, other: Answer) -> float:
    """The largest difference between the log probabilities of two replies; infinite where the tokens differ."""
    if [token for token, _, _ in one.logprobs] != [token for token, _, _ in other.logprobs]:
        return float("inf")
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return max(abs(mine - theirs) for mine, theirs in pairs)


def _numbers(answer: Answer) -> list[float]:
    return [number for _, own, rest in answer.logprobs for number in (own, *(value for _, value in rest))]


def _noise(run: Run) -> str:
    lines = [
        f"- {mode.mode}: started in {mode.started_s:.0f} s, restarted in {mode.restarted_s:.0f} s; others used "
        f"{' and '.join(f'{share:.0%}' for share in mode.others_share)} of the machine before and after the restart"
        for mode in run.modes
    ]
    return "## How noisy it was\n\n" + "\n".join(lines)


def plot(run: Run, file: Path) -> None:
    """Draw TTFT by length, one panel for each mode."""
    import matplotlib as mpl  # noqa: PLC0415 - only the plot needs it, and it takes a second

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "thaw_speed"  # the same samples give the same file
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(run.modes), figsize=(1 + 4.5 * len(run.modes), 4.5), layout="constrained",
                                sharey=True, squeeze=False)  # fmt: skip
    for axis, mode in zip(axes.flat, run.modes, strict=True):
        bars = list(_bars(run, mode))
        for place, (label, colour, values) in enumerate(bars):
            width = 0.85 / len(bars)
            at = [x + (place - (len(bars) - 1) / 2) * width for x in range(len(run.sizes))]
            axis.bar(at, values, width, label=label, color=colour)
            for x, value in zip(at, values, strict=True):
                axis.annotate(_short(value), (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=6)
        axis.set_yscale("log")
        axis.set_xticks(range(len(run.sizes)), [f"{size:,}" for size in run.sizes])
        axis.set_xlabel("prompt, tokens")
        axis.set_title(mode.mode, fontsize=10)
    axes.flat[0].set_ylabel("time to the first text, ms")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _bars(run: Run, mode: ModeRun) -> Iterator[tuple[str, str, list[float]]]:
    colours: dict[Variant, str] = {"none": "#d2603a", "cpu": "#e59b6c", "gpu": "#f2cdb0"}
    yield "recomputed", "#5a6b7d", [mode.control(size).recompute.ttft_ms for size in run.sizes]
    for variant in VARIANTS:
        yield _WARMED[variant], colours[variant], [mode.thaws(size, variant)[0].next.ttft_ms for size in run.sizes]
    hot = [statistics.median(t.ttft_ms for s in mode.started(size) for t in s.hot) for size in run.sizes]
    yield "hot", "#9aa7b5", hot


def _spread(values: Iterable[float], *, first: bool = False) -> str:
    """The median and the range; or the first value, and the others behind it."""
    seen = list(values)
    if not seen:
        return ""
    if first:
        return _short(seen[0]) + (f" ({', '.join(map(_short, seen[1:]))})" if seen[1:] else "")
    if len(seen) == 1:
        return _short(seen[0])
    return f"{_short(statistics.median(seen))} ({_short(min(seen))} to {_short(max(seen))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

"""The report of `thaw_speed`, as Markdown and as a plot."""

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
    """A target and the measured value."""

    text: str
    limit: float
    unit: str
    measured: float | None
    is_upper_limit: bool = False

    @property
    def verdict(self) -> str:
        """Whether the target was met, and by which factor."""
        if self.measured is None:
            return "not measured"
        met = (self.measured <= self.limit) if self.is_upper_limit else (self.measured >= self.limit)
        if not self.limit or not self.measured:
            return "met" if met else "**not met**"
        margin = self.limit / self.measured if self.is_upper_limit else self.measured / self.limit
        return f"met by a factor of {margin:.2f}" if met else f"**not met**, off by a factor of {1 / margin:.2f}"


def markdown(run: Run) -> str:
    """Return the report as Markdown."""
    parts = [_head(run), *(_targets(run, mode) for mode in run.modes[:1]), _ttft(run), _operations(run), _files(run),
             _equality(run), _noise(run)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _head(run: Run) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in run.versions.items())
    return (
        "# How fast a frozen conversation is restored\n\n"
        f"{machine}.\n{versions}.\nModel: {run.model}, {run.kv_bytes_per_token:,} bytes of KV per token, bfloat16; "
        f"LMCache chunks of {run.chunk_size} tokens, disk tier only; random weights, real sizes.\n\n"
        "Between the cold and hot turns and the thaws, the gateway, vLLM and LMCache were restarted. *Recomputed* is a "
        "prompt of the same length under a new salt in the same run of the engine as the thaws. TTFT is measured at "
        "the client, through the gateway, from before the request is sent to the first text of the streamed reply. "
        f"Written by `python -m loadtests.thaw_speed` in {run.took_s / 60:.0f} minutes."
    )


def _targets(run: Run, mode: ModeRun) -> str:
    size = run.sizes[-1]
    rows = [["target", "limit", "measured", ""], ["---", "---:", "---:", "---"]]
    for target in targets(run, mode):
        sign = "<=" if target.is_upper_limit else ">="
        measured = "" if target.measured is None else f"{_short(target.measured)} {target.unit}"
        rows.append([target.text, f"{sign} {target.limit:g} {target.unit}", measured, target.verdict])
    return (
        f"## Targets, {mode.mode}, {size:,} tokens\n\n{_table(rows)}\n\n"
        "The targets apply to the thaws right after the restart."
    )


def targets(run: Run, mode: ModeRun) -> Iterator[Target]:
    """Yield the targets, for the longest prompt and the thaws right after the restart."""
    size = run.sizes[-1]
    cold = mode.control(size).recompute.ttft_ms
    yield Target("recompute / thawed, TTFT", 40, "x", cold / mode.thaws(size, "none")[0].next.ttft_ms)
    yield Target("recompute / thawed and prefetched, TTFT", 80, "x", cold / mode.thaws(size, "cpu")[0].next.ttft_ms)
    yield Target("full chunks hit, every thaw", 99, "%", 100 * min(thaw.hit_share for thaw in mode.thawed))
    yield from _throughput(next(files for files in mode.files if files.size == size))
    freezes = [session.frozen for session in mode.started(size)]
    slowest = max(frozen.duration_ms / frozen.tokens for frozen in freezes) * _FREEZE_TOKENS / 1000
    yield Target("freeze of 32k tokens, at the rate of the slowest", 2, "s", slowest, is_upper_limit=True)
    if mode.cloned:
        yield Target("clone", 10, "ms", statistics.median(mode.cloned.durations_ms), is_upper_limit=True)
        yield Target("clone, new files", 0, "files", mode.cloned.new_files, is_upper_limit=True)


def _throughput(files: Files) -> Iterator[Target]:
    share = 100 * statistics.median(files.plain_ms) / statistics.median(files.prefetch_ms)
    yield Target("disk tier to LMCache's memory, relative to a plain copy, from the page cache", 50, "%", share)
    if files.plain_uncached_ms and files.prefetch_uncached_ms:
        share = 100 * files.plain_uncached_ms / files.prefetch_uncached_ms
        yield Target("the same, from the disk", 50, "%", share)


def _ttft(run: Run) -> str:
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
        "Cold, hot: median (minimum to maximum). Thawed: right after the restart (and repeated, after the engine's "
        "prefix cache and LMCache's memory were emptied). The ratios are for the thaws right after the restart."
    )


def _operations(run: Run) -> str:
    header = ["mode", "window, tokens", "freeze, ms", "tokens computed", "second freeze, ms", "thaw, ms",
              "thaw and prefetch, ms", "prefetch alone", "thaw through the engine, ms", "chunks hit, minimum",
              "LMCache to vLLM, MB/s"]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for mode in run.modes:
        for size in run.sizes:
            frozen = [session.frozen for session in mode.started(size)]
            thaws = [thaw for variant in VARIANTS for thaw in mode.thaws(size, variant)]
            rows.append([
                mode.mode,
                f"{max(f.tokens for f in frozen):,}",
                _spread(f.duration_ms for f in frozen),
                f"{max(f.computed for f in frozen)}",
                _spread(f.again_ms for f in frozen if f.again_ms is not None),
                *_thaw_times(mode, size),
                f"{100 * min(thaw.hit_share for thaw in thaws):.1f} %",
                _load_rate(thaws, run.kv_bytes_per_token),
            ])  # fmt: skip
    return "## Operations\n\n" + _table(rows)


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
        "Plain copy: the files are read one after the other into allocated memory. LMCache's load: "
        "`POST /cache/prefetches` until it is completed. From the disk: once, after these files were evicted from the "
        "page cache."
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
        "## Equality of the restored conversation\n\n" + _table(rows) + "\n\n"
        "The next turn, greedy, with the log probabilities of each token and of three runners-up: in the session "
        "thawed from the disk, and in a session with the same words that was never frozen, in the same engine."
    )


def difference(one: Answer, other: Answer) -> float:
    """Return the largest difference between the log probabilities of two replies; infinite if the tokens differ."""
    if [token for token, _, _ in one.logprobs] != [token for token, _, _ in other.logprobs]:
        return float("inf")
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return max(abs(own - other_value) for own, other_value in pairs)


def _numbers(answer: Answer) -> list[float]:
    return [number for _, own, rest in answer.logprobs for number in (own, *(value for _, value in rest))]


def _noise(run: Run) -> str:
    lines = [
        f"- {mode.mode}: started in {mode.started_s:.0f} s, restarted in {mode.restarted_s:.0f} s; other processes "
        f"used {' and '.join(f'{share:.0%}' for share in mode.others_share)} of the machine before and after the "
        "restart"
        for mode in run.modes
    ]
    return "## Noise\n\n" + "\n".join(lines)


def plot(run: Run, file: Path) -> None:
    """Draw TTFT by prompt length, one panel per mode."""
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
    """Format the median and the range, or with `first` the first value and then the others."""
    numbers = list(values)
    if not numbers:
        return ""
    if first:
        return _short(numbers[0]) + (f" ({', '.join(map(_short, numbers[1:]))})" if numbers[1:] else "")
    if len(numbers) == 1:
        return _short(numbers[0])
    return f"{_short(statistics.median(numbers))} ({_short(min(numbers))} to {_short(max(numbers))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

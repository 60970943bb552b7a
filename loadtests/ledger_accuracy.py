"""How right the ledger is: what it says that a thaw has saved, beside what computing the same window takes.

`python -m loadtests.ledger_accuracy` starts LMCache, vLLM with the demo model and the gateway. Conversations of several
lengths are begun, which the ledger learns from, each three times, and some of them are frozen. Then, in turn for each
window and several times over: the engine's own cache is emptied and the window is thawed through the engine, which says
what that saved; and the engine computes the window's very tokens under a salt that nothing is stored under. Prints a
table.
"""

import argparse
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.stack import local
from loadtests import machine, thaw_stack
from loadtests.thaw_stack import Stack, Writer

_CHUNK = 32  # tokens, as `cwg up` has it for the demo model
_REPLY_TOKENS = 8
_LEARNED = (150, 400, 1000, 2500, 4500)
_LEARNED_TIMES = 3  # a curve of one prompt of each length is that of a machine's hiccups
_MOST_WRONG = 0.25


@dataclass
class _Window:
    """What was measured of one window: seconds estimated, recomputed and thawed."""

    name: str
    tokens: int
    cached: int = 0
    estimated: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    thawed: list[float] = field(default_factory=list)
    error_share: float | None = None

    @property
    def off(self) -> float:
        """How far the estimate is from what was measured, as a share of that."""
        return statistics.median(self.estimated) / statistics.median(self.computed) - 1

    def line(self) -> str:
        """A row of the table."""
        said = "?" if self.error_share is None else f"{self.error_share:.0%}"
        low, high = min(self.computed), max(self.computed)
        return (
            f"| {self.tokens:,} | {self.cached:,} | {statistics.median(self.thawed):.2f} s | "
            f"{statistics.median(self.estimated):.2f} s (± {said}) | {statistics.median(self.computed):.2f} s "
            f"({low:.2f} to {high:.2f}) | {self.off:+.0%} |"
        )


def main() -> None:
    """Measure and print; exit code 1 if an estimate is off by more than a quarter."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are stopped
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # enables the route that empties vLLM's prefix cache
    directory = Path(tempfile.mkdtemp(prefix="ledger-accuracy-", dir=options.work_dir))
    try:
        stack_options = local.LocalStack(
            data_dir=directory, port=local.free_ports(1)[0], chunk_size=_CHUNK, cpu_cache_gb=1.5, engine_kv_gb=1.0,
            max_model_len=8192, demo=options.demo,
        )  # fmt: skip
        with thaw_stack.running(stack_options) as stack:
            windows = _measure(stack, options.sizes, options.repeats)
            curves = stack.get("/admin/ledger")["curves"]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _report(windows, curves)
    sys.exit(any(abs(window.off) > _MOST_WRONG for window in windows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default=[1000, 3000, 6000], help="lengths of the windows, in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="thaws, and recomputations, of each (default 3)")
    parser.add_argument("--demo", choices=("smollm2", "random"), default="smollm2")
    parser.add_argument("--work-dir", type=Path, help="directory for the stack's files; default: temporary")
    return parser.parse_args()


def _sizes(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def _measure(stack: Stack, sizes: Sequence[int], repeats: int) -> list[_Window]:
    writer = Writer(stack)
    for size, again in itertools.product(_LEARNED, range(_LEARNED_TIMES)):
        stack.ask(f"learned-{size}-{again}", writer.question(f"learned {size} {again}", size), _REPLY_TOKENS)
    windows = []
    for size in sizes:
        name = f"window-{size}"
        stack.ask(name, writer.question(name, size), _REPLY_TOKENS)
        windows.append(_Window(name, stack.freeze(name, name, again=False).tokens))
    for again in range(repeats):
        for window in windows:
            _thaw(stack, window, again)
            ids = stack.window_ids(window.name)
            window.computed.append(stack.compute_s(ids, f"{window.name}-{again}"))
            print(f"{time.strftime('%H:%M:%S')} {window.line()}", flush=True)
    return windows


def _thaw(stack: Stack, window: _Window, again: int) -> None:
    """Thaw a window from LMCache, and take what the ledger says of it."""
    stack.wipe()
    result, _ = stack.thaw(window.name, f"{window.name}.{again}", "gpu")
    saved: dict[str, Any] = result["receipt"]["saved"]
    if saved["seconds_estimated"] is None:
        raise RuntimeError(f"nothing is estimated: {saved['reason']}")
    window.cached, window.error_share = saved["tokens"], saved["error_share"]
    window.estimated.append(saved["seconds_estimated"])
    window.thawed.append(result["receipt"]["duration_ms"] / 1000)


def _report(windows: Sequence[_Window], curves: Sequence[dict[str, Any]]) -> None:
    print(f"\n{machine.describe()}\n")
    print("| window | from the cache | thawed in | computing that takes, estimated | computed again | off by |")
    print("|---|---|---|---|---|---|")
    for window in windows:
        print(window.line())
    for curve in curves:
        print(f"\nlearned from {curve['samples']} prompts: {curve['seconds_by_tokens']}, error {curve['error_share']}")


if __name__ == "__main__":
    main()

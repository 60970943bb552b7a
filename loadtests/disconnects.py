"""How soon the engine is free when a client leaves: through the gateway and at the engine itself, in one run.

`python -m loadtests.disconnects` starts the whole stack with the demo model in a directory of its own; the report goes
to loadtests/results/disconnects.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from gateway.stack import local
from loadtests import contenders, machine, thaw_stack
from loadtests.leaving import WAYS, Gauge, leave, question

GATEWAY, ALONE = "through the gateway", "engine alone"
_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Left:
    """One client that left: where, how, and the seconds until the engine was idle."""

    where: str
    way: str
    free_s: float


def main() -> int:
    """Run, write the report, and return 1 if one took longer than a second."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="cwg-disconnects-") as folder:
        stack = local.LocalStack(data_dir=Path(folder), port=contenders.free_port(), max_model_len=8192)
        with thaw_stack.running(stack) as running, Gauge(running.plan.engine_url) as gauge:
            began = time.monotonic()
            urls = {GATEWAY: running.plan.url, ALONE: running.plan.engine_url}
            left = _all(urls, gauge, options.count, options.alone)
            outcomes = _outcomes(running.plan.url)
            long = running.prompt_tokens(question("left-100", WAYS[0])["messages"])
            took = time.monotonic() - began
    text = _report(left, outcomes, took, long)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "disconnects.md").write_text(text)
    (options.out / "disconnects.json").write_text(json.dumps([asdict(one) for one in left]) + "\n")
    print(text)
    through = [one for one in left if one.where == GATEWAY]
    return int(any(one.free_s > _LIMIT_S for one in through) or outcomes != Counter(client_gone=len(through)))


def _all(urls: dict[str, str], gauge: Gauge, count: int, alone: int) -> list[Left]:
    """Leave so many times at each place, in turns, in every way."""
    left: list[Left] = []
    due = {GATEWAY: count, ALONE: alone}
    for number in range(max(due.values())):
        for where, times in due.items():
            # Spread over the run, so that what else the machine does meets both.
            if number * times // count == (number + 1) * times // count:
                continue
            way = WAYS[sum(one.where == where for one in left) % len(WAYS)]
            left.append(Left(where, str(way), round(leave(urls[where], f"left-{number}", way, gauge), 4)))
            print(f"{number}: {where}: {way}: {left[-1].free_s * 1000:.0f} ms", file=sys.stderr, flush=True)
    return left


def _outcomes(url: str) -> "Counter[str]":
    """How the gateway's turns ended, by its own account."""
    found: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=30) as http:
        offset, more = 0, True
        while more:
            page = http.get("/admin/sessions", params={"limit": 100, "offset": offset}).raise_for_status().json()
            # Those with a dot had their answer before they could leave.
            for session in (each for each in page["sessions"] if "." not in each["id"]):
                turns = http.get(f"/admin/sessions/{session['id']}").raise_for_status().json()["turns"]
                found.update(turn["outcome"] for turn in turns)
            offset, more = offset + 100, page["has_more"]
    return found


def _report(left: Sequence[Left], outcomes: "Counter[str]", took_s: float, long: int) -> str:
    facts = machine.describe()
    rows = [_row(title, [one for one in left if one.where == where and way in ("", one.way)])
            for where in (GATEWAY, ALONE)
            for title, way in [(f"**{where}**", ""), *((str(way), str(way)) for way in WAYS)]]  # fmt: skip
    ended = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return (
        "# Clients that leave\n\n"
        "Written by `python -m loadtests.disconnects`; the samples are in `disconnects.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}\n"
        f"- vLLM and LMCache with the demo model; each prompt is new, a long one is {long:,} tokens\n"
        "- the time from the close of the client's socket until vLLM's own metrics show no running and no waiting "
        "request (`vllm:num_requests_running`, `vllm:num_requests_waiting`), asked for all the while; vLLM drops a "
        "request between two of its steps, so a part of it is a step of prefill\n"
        f"- turns as the gateway recorded them: {ended}\n\n"
        "| ms until the engine is idle | times | p50 | p99 | longest | over 1 s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(rows) + f"\n\nThe run took {took_s:.0f} s.\n"
    )  # fmt: skip


def _row(title: str, left: Sequence[Left]) -> str:
    if not left:
        return f"| {title} | 0 | | | | |"
    times = sorted(one.free_s * 1000 for one in left)
    p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
    over = sum(time > _LIMIT_S * 1000 for time in times)
    return f"| {title} | {len(times)} | {statistics.median(times):.0f} | {p99:.0f} | {times[-1]:.0f} | {over} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="clients that leave through the gateway")
    parser.add_argument("--alone", type=int, default=64, help="clients that leave at the engine itself; at most COUNT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

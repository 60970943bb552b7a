"""How soon the engine is idle after a client disconnects: through the gateway and directly, in one run.

`python -m loadtests.disconnects` starts the whole stack with the demo model in a temporary directory; the report goes
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
from loadtests.disconnect_probe import WAYS, Gauge, disconnect, question

GATEWAY, ALONE = "through the gateway", "engine alone"
_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Disconnect:
    """One client that disconnected: where, how, and the seconds until the engine was idle."""

    where: str
    way: str
    idle_after_s: float


def main() -> int:
    """Run, write the report, and return 1 if any disconnect through the gateway took longer than a second."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="cwg-disconnects-") as folder:
        stack = local.LocalStack(data_dir=Path(folder), demo="random", port=contenders.free_port(), max_model_len=8192)
        with thaw_stack.running(stack) as running, Gauge(running.plan.engine_url) as gauge:
            began = time.monotonic()
            urls = {GATEWAY: running.plan.url, ALONE: running.plan.engine_url}
            samples = _measure(urls, gauge, options.count, options.alone)
            outcomes = _outcomes(running.plan.url)
            long = running.prompt_tokens(question("left-100", WAYS[0])["messages"])
            took = time.monotonic() - began
    text = _report(samples, outcomes, took, long)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "disconnects.md").write_text(text)
    (options.out / "disconnects.json").write_text(json.dumps([asdict(sample) for sample in samples]) + "\n")
    print(text)
    gateway = [sample for sample in samples if sample.where == GATEWAY]
    return int(any(s.idle_after_s > _LIMIT_S for s in gateway) or outcomes != Counter(client_gone=len(gateway)))


def _measure(urls: dict[str, str], gauge: Gauge, count: int, alone: int) -> list[Disconnect]:
    """Disconnect `count` times from the gateway and `alone` times from the engine, alternating, in every way."""
    samples: list[Disconnect] = []
    due = {GATEWAY: count, ALONE: alone}
    for number in range(max(due.values())):
        for where, times in due.items():
            # Spread over the run, so that other load on the machine affects both alike.
            if number * times // count == (number + 1) * times // count:
                continue
            way = WAYS[sum(sample.where == where for sample in samples) % len(WAYS)]
            idle_after_s = disconnect(urls[where], f"left-{number}", way, gauge)
            samples.append(Disconnect(where, str(way), round(idle_after_s, 4)))
            print(f"{number}: {where}: {way}: {idle_after_s * 1000:.0f} ms", file=sys.stderr, flush=True)
    return samples


def _outcomes(url: str) -> "Counter[str]":
    """Return the outcomes of the turns that the gateway has recorded."""
    outcomes: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=30) as http:
        offset, more = 0, True
        while more:
            page = http.get("/admin/sessions", params={"limit": 100, "offset": offset}).raise_for_status().json()
            # Clients with a dot in their name had their response before they could disconnect.
            for session in (each for each in page["sessions"] if "." not in each["id"]):
                turns = http.get(f"/admin/sessions/{session['id']}").raise_for_status().json()["turns"]
                outcomes.update(turn["outcome"] for turn in turns)
            offset, more = offset + 100, page["has_more"]
    return outcomes


def _report(samples: Sequence[Disconnect], outcomes: "Counter[str]", took_s: float, long: int) -> str:
    facts = machine.describe()
    rows = [_row(title, [sample for sample in samples if sample.where == where and way in ("", sample.way)])
            for where in (GATEWAY, ALONE)
            for title, way in [(f"**{where}**", ""), *((str(way), str(way)) for way in WAYS)]]  # fmt: skip
    ended = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return (
        "# Clients that disconnect\n\n"
        "Written by `python -m loadtests.disconnects`; the samples are in `disconnects.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}\n"
        f"- vLLM and LMCache with the demo model; each prompt is new, a long one is {long:,} tokens\n"
        "- the time from the close of the client's socket until vLLM's own metrics show no running and no waiting "
        "request (`vllm:num_requests_running`, `vllm:num_requests_waiting`), polled continuously; vLLM aborts a "
        "request between two steps, so part of the time may be a prefill step\n"
        f"- turns as the gateway recorded them: {ended}\n\n"
        "| ms until the engine is idle | clients | p50 | p99 | longest | over 1 s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(rows) + f"\n\nThe run took {took_s:.0f} s.\n"
    )  # fmt: skip


def _row(title: str, samples: Sequence[Disconnect]) -> str:
    if not samples:
        return f"| {title} | 0 | | | | |"
    times = sorted(sample.idle_after_s * 1000 for sample in samples)
    p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
    over = sum(time > _LIMIT_S * 1000 for time in times)
    return f"| {title} | {len(times)} | {statistics.median(times):.0f} | {p99:.0f} | {times[-1]:.0f} | {over} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="clients that disconnect from the gateway")
    parser.add_argument("--alone", type=int, default=64, help="clients that disconnect from the engine; at most COUNT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

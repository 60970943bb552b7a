"""What tracing costs: gateways that record nothing, no request and every request, in front of one canned engine.

`python -m loadtests.tracing_cost [--starts 6] [--rounds 3]` sends the same requests to gateways of this tree that
differ in their environment only, alternating within each round, and measures the CPU time of their threads and the
time that a client waits. `off` runs twice, which shows the noise. `100 %` includes the exporting thread; the collector
is a process of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loadtests import contenders
from loadtests.relay_compare import HERE, PER_ROUND, Gateway, body

_VARIANTS = {"off": None, "off-again": None, "sampled-0": "0", "sampled-100": "1"}


@contextmanager
def collector() -> Iterator[str]:
    """Run a collector that reads and forgets; its address."""
    with subprocess.Popen(
        [sys.executable, "-m", "loadtests.tracing_collector"], cwd=HERE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(run.stdout.readline())}"
        finally:
            run.terminate()


@contextmanager
def gateways() -> Iterator[dict[str, Gateway]]:
    """Run one gateway of each variant."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        spans = stack.enter_context(collector())
        engine = stack.enter_context(contenders.upstream(work))
        running = {}
        for name, share in _VARIANTS.items():
            port = contenders.free_port()
            settings = {"PORT": port, "ENGINE_URLS": engine.url(""), "DATA_DIR": work / name, "AUTO_FREEZE": "false"}
            environment = {f"CWG_{key}": str(value) for key, value in settings.items()}
            if share is not None:
                environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = spans
                environment["OTEL_BSP_SCHEDULE_DELAY"] = "50"  # so that a round pays for its own export
                environment["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
                environment["OTEL_TRACES_SAMPLER_ARG"] = share
            launch = contenders.Launch([sys.executable, "-m", "gateway", "serve"], "/readyz", environment, HERE)
            running[name] = Gateway(stack.enter_context(contenders.run(name, "", port, launch, work)))
        yield running


def measure(starts: int, rounds: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """CPU seconds and seconds per request, by variant and kind, one for each round."""
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for start in range(starts):
        with gateways() as running:
            for number in range(rounds + 1):
                turn = [*running.items()]
                turn = turn[number % len(turn) :] + turn[: number % len(turn)]
                for kind, count in PER_ROUND.items():
                    payloads = [body(kind, (start * rounds + number) * count + i) for i in range(count)]
                    for name, gateway in turn:
                        took = _round(gateway, kind, payloads)
                        if number:  # the first round warms up
                            spent.setdefault((name, kind), []).append(took)
    return spent


def _round(gateway: Gateway, kind: str, payloads: list[bytes]) -> tuple[float, float]:
    waits: list[float] = []
    cpu_s = gateway.cpu_s_per_request(kind, payloads, waits)
    return cpu_s, statistics.median(waits)


def table(spent: dict[tuple[str, str], list[tuple[float, float]]]) -> str:
    """Medians of the rounds: what a variant costs more than `off` in the same round."""
    rows = ["| request | off: CPU, latency | off again | 0 % sampled | 100 % sampled |", "|---|---:|---:|---:|---:|"]
    for kind in PER_ROUND:
        base = spent["off", kind]
        cells = [f"{_ms(base, 0):.2f} ms, {_ms(base, 1):.2f} ms"]
        for name in list(_VARIANTS)[1:]:
            more = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(spent[name, kind], base, strict=True)]
            cells.append(f"{_ms(more, 0) * 1000:+.0f} us, {_ms(more, 1) * 1000:+.0f} us")
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _ms(values: list[tuple[float, float]], part: int) -> float:
    return statistics.median(value[part] for value in values) * 1000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=6, help="how often every gateway is started (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds for each start (default 3)")
    options = parser.parse_args()
    began = time.monotonic()
    print(table(measure(options.starts, options.rounds)))
    print(f"\nload {os.getloadavg()[0]:.1f} at the end, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

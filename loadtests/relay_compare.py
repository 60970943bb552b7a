"""The cost of a change on the request path: two checkouts of the gateway in front of one canned engine, interleaved.

`python -m loadtests.relay_compare OTHER_CHECKOUT [--starts 10] [--rounds 3]` compares this tree with another one. Each
round sends the same requests to every gateway, alternating, and measures the CPU time of its threads (from /proc),
which other load on the machine affects far less than latency. A second gateway of the other checkout shows the noise.
Two processes of the same code differ by several percent for as long as they run (where their memory lies, the seed of
their hashes), so all are restarted several times. Prints the median of the ratios over all rounds, with their
quartiles.
"""

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from loadtests import contenders

T = TypeVar("T")
HERE = Path(__file__).parents[1]
_INDEXED_AFTER_S = 1.2  # turns are gathered for a second before they are indexed
_IDLE_S, _IDLE_WITHIN = 0.2, 300
_IDLE_SHARE = 0.03  # of a core; an idle gateway takes 0.006
PER_ROUND = {"json": 100, "stream": 50, "500 KB": 30, "session": 100}


def body(kind: str, number: int) -> bytes:
    """Return a request of that kind; each starts a new conversation, except those of the kind `session`."""
    texts = (
        [f"Tell me about window {number}."]
        if kind != "500 KB"
        else [f"line {number} {i}: " + "lorem ipsum " * 80 for i in range(500)]
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if len(messages) % 2 == 0:
        messages.append({"role": "user", "content": "and then?"})
    return json.dumps({"model": "canned", "messages": messages, "stream": kind == "stream"}).encode()


class Gateway:
    """A running gateway of one checkout, and a connection to it."""

    def __init__(self, gateway: contenders.Contender) -> None:
        self._pid = gateway.pid
        self.http = http.client.HTTPConnection("127.0.0.1", gateway.port)

    def cpu_s_per_request(self, kind: str, payloads: list[bytes], waits: list[float] | None = None) -> float:
        """Send a round of requests; return the CPU seconds per request. `waits` gets the seconds that each took."""
        path = "/s/one/v1/chat/completions" if kind == "session" else "/v1/chat/completions"
        before = self._cpu_s()
        for payload in payloads:
            began = time.perf_counter()
            self.http.request("POST", path, payload, {"content-type": "application/json"})
            answer = self.http.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            if waits is not None:
                waits.append(time.perf_counter() - began)
        time.sleep(0.1)  # turns are recorded after the response
        return (self._cpu_s() - before) / len(payloads)

    def wait_until_idle(self) -> None:
        """Wait until nothing is left of what follows a turn in the background: its words are indexed for the search."""
        last = self._cpu_s()
        for _ in range(_IDLE_WITHIN):
            time.sleep(_IDLE_S)
            now = self._cpu_s()
            if now - last < _IDLE_S * _IDLE_SHARE:
                return
            last = now
        raise RuntimeError("the gateway does not become idle")

    def _cpu_s(self) -> float:
        threads = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


@contextmanager
def gateways(sources: dict[str, Path]) -> Iterator[dict[str, Gateway]]:
    """Run a gateway of each checkout, in front of one engine."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        engine = stack.enter_context(contenders.upstream(work))
        yield {name: Gateway(stack.enter_context(_run(name, source, work, engine))) for name, source in sources.items()}


def _run(
    name: str, source: Path, work: Path, engine: contenders.Contender
) -> AbstractContextManager[contenders.Contender]:
    port = contenders.free_port()
    settings = {"PORT": port, "ENGINE_URLS": engine.url(""), "DATA_DIR": work / name, "AUTO_FREEZE": "false"}
    environment = {f"CWG_{key}": str(value) for key, value in settings.items()} | {"PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "gateway", "serve"]
    return contenders.run(name, "", port, contenders.Launch(command, "/readyz", environment, source), work)


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the tree to compare with")
    parser.add_argument("--starts", type=int, default=10, help="how often every gateway is started (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds for each start (default 3)")
    options = parser.parse_args()
    sources = {"other": options.other.resolve(), "again": options.other.resolve(), "this": HERE}
    spent: dict[tuple[str, str], list[float]] = {}
    for start in range(options.starts):
        with gateways(_rotated(sources, start)) as running:
            for number in range(options.rounds + 1):
                for name, kind, took in _round(_rotated(running, start + number), start * options.rounds + number):
                    if number:  # the first round warms up
                        spent.setdefault((name, kind), []).append(took)
    print(f"| request | other, ms | this / other | other / other |\n|---|---:|---:|---:|\n{_rows(spent)}")


def _rotated(of: dict[str, T], by: int) -> dict[str, T]:
    items = list(of.items())
    return dict(items[by % len(items) :] + items[: by % len(items)])


def _round(running: dict[str, Gateway], number: int) -> Iterator[tuple[str, str, float]]:
    """Send one round of requests to each; yield the name, the kind and the CPU seconds per request.

    Indexing for the search is not counted: it begins later, and would be charged to another kind.
    """
    for kind, count in PER_ROUND.items():
        payloads = [body(kind, number * count + i) for i in range(count)]
        for name, gateway in running.items():
            yield name, kind, gateway.cpu_s_per_request(kind, payloads)
        time.sleep(_INDEXED_AFTER_S)
        for gateway in running.values():
            gateway.wait_until_idle()


def _rows(spent: dict[tuple[str, str], list[float]]) -> str:
    rows = []
    for kind in PER_ROUND:
        base = spent["other", kind]
        cells = [_ratio(spent[name, kind], base) for name in ("this", "again")]
        rows.append(f"| {kind} | {statistics.median(base) * 1000:.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _ratio(values: list[float], other: list[float]) -> str:
    ratios = [a / b for a, b in zip(values, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()

"""What a store on PostgreSQL costs beside one on SQLite, with 10,000 windows and 1,000,000 messages in each.

    python -m loadtests.store_speed [--windows 10000] [--rounds 5] [--out FILE]

Fills both (`loadtests.store_data`, some two minutes), starts a gateway on each in front of a canned engine, and
measures in rounds, in each of them one store right after the other:

- added latency: chat completions one after another, sent in turn to the engine and to either gateway;
- lists, statuses and searches over HTTP, likewise in turn;
- recorded turns per second, by one process and by two at once, in batches as the recorder of a busy gateway has them.

PostgreSQL is the wheel's, on loopback, and syncs each commit (`fsync=on`), as SQLite does.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gateway.store.postgres.connections import Server
from gateway.store.postgres.store import PostgresStore
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Store
from loadtests import contenders, machine, store_data
from loadtests.contenders import Contender, Launch
from loadtests.store_data import MODEL, Texts, name_of
from tests.support.postgres import PostgresServer

_SERVER = ("fsync=on", "shared_buffers=512MB", "max_wal_size=4GB")
_LIMIT_ADDED_MS, _LIMIT_TURNS, _LIMIT_READ_MS = 0.25, 1500.0, 30.0
_REQUESTS = 150  # of a kind and a round
_READS = 5  # likewise
_BATCH, _RECORD_S, _SESSIONS = 64, 3.0, 512
_TURNS = 20  # of a conversation


@dataclass(slots=True)
class Samples:
    """Milliseconds, or turns per second, by what was measured and by the store."""

    requests: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    added: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # medians of the rounds
    reads: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    turns: dict[str, dict[str, list[float]]] = field(default_factory=dict)


class Client:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, path: str, body: object = None, session: str = "") -> tuple[float, Any]:
        """Send a request; return the milliseconds until its answer was read, and that."""
        raw = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"} | ({"x-session-id": session} if session else {})
        began = time.perf_counter()
        self._http.request("GET" if raw is None else "POST", path, raw, headers)
        response = self._http.getresponse()
        data = response.read()
        took = (time.perf_counter() - began) * 1000
        if response.status != 200:
            raise RuntimeError(f"{path} was answered {response.status}: {data.decode()}")
        return took, json.loads(data)


def main() -> None:
    """Measure, and print the report; exit code 1 if a limit is exceeded."""
    options = _options()
    with TemporaryDirectory(prefix="store-speed-") as folder, PostgresServer(options=_SERVER) as server:
        sqlite, postgres = Path(folder) / "gateway.db", server.new_database()
        began = time.monotonic()
        asyncio.run(_fill(sqlite, postgres, options.windows))
        filled_s = time.monotonic() - began
        text, good = measure(sqlite, postgres, Path(folder), options, filled_s)
    print(text)
    if options.out:
        options.out.write_text(text)
    raise SystemExit(0 if good else 1)


def measure(
    sqlite: Path, postgres: str, work: Path, options: argparse.Namespace, filled_s: float = 0.0
) -> tuple[str, bool]:
    """Measure on two stores that are filled."""
    samples = Samples()
    urls = {"sqlite": f"sqlite:///{sqlite}", "postgres": postgres}
    began, busy = time.monotonic(), machine.busy_s()
    with ExitStack() as stack:
        engine = stack.enter_context(contenders.upstream(work))
        gateways = {name: stack.enter_context(_gateway(work, name, engine, url)) for name, url in urls.items()}
        ports = {"engine": engine.port} | {name: one.port for name, one in gateways.items()}
        for number in range(options.rounds):
            _measure_requests(samples, {name: Client(port) for name, port in ports.items()}, number)
            _measure_reads(samples, {name: Client(one.port) for name, one in gateways.items()}, options.windows, number)
    for number in range(options.rounds):
        for name, url in urls.items():
            for processes in (1, 2):
                rate = _recorded_per_s(name, url, processes, number)
                samples.turns.setdefault(f"{processes} gateway{'s' * (processes > 1)}", {}).setdefault(name, []).append(
                    rate
                )
    load = (machine.busy_s() - busy) / ((time.monotonic() - began) * (os.cpu_count() or 1))
    return _report(samples, options, filled_s, load)


async def _fill(sqlite: Path, postgres: str, windows: int) -> None:
    async with AsyncExitStack() as stack:
        stores = {name: await stack.enter_async_context(_store(name, url)) for name, url in
                  (("sqlite", str(sqlite)), ("postgres", postgres))}  # fmt: skip
        await store_data.fill(stores, sqlite, postgres, windows)


def _store(name: str, url: str) -> Store:
    if name == "sqlite":
        return SqliteStore(Path(url.removeprefix("sqlite:///")), turns_kept=200)
    return PostgresStore(Server(url), turns_kept=200)


@contextmanager
def _gateway(work: Path, name: str, engine: Contender, url: str) -> Iterator[Contender]:
    port = contenders.free_port()
    environment = {
        "CWG_PORT": str(port), "CWG_ENGINE_URLS": engine.url(""), "CWG_DATA_DIR": str(work / f"{name}-data"),
        "CWG_STORE_URL": url, "CWG_AUTO_FREEZE": "false", "CWG_ACCEPT_NEW_SECRET": "true",
    }  # fmt: skip
    command = sys.executable, "-m", "gateway", "serve"
    with contenders.run(name, "", port, Launch(command, "/readyz", environment), work) as running:
        yield running


def _measure_requests(samples: Samples, clients: dict[str, Client], number: int) -> None:
    """Conversations that are recognised by a header, or by what was said; each message goes to all in turn.

    The conversations take turns too: a client that asks on at once waits until its last turn is recorded.
    """
    for kind in ("a session's id in a header", "recognised by its text"):
        times: dict[str, list[float]] = {name: [] for name in clients}
        order = list(clients)
        talks: list[list[Any]] = [[] for _ in range(_REQUESTS // _TURNS)]
        for turn, (which, messages) in itertools.product(range(_TURNS), enumerate(talks)):
            session = f"{number}-{which}" if "header" in kind else ""
            messages.append({"role": "user", "content": f"{kind} {number} {which}, turn {turn} " + "why? " * 20})
            order.append(order.pop(0))
            for name in order:
                body = {"model": MODEL, "messages": messages}
                took, answer = clients[name].call("/v1/chat/completions", body, session)
                times[name].append(took)
            messages.append(answer["choices"][0]["message"])
        alone = statistics.median(times.pop("engine"))
        for name, values in times.items():
            samples.added.setdefault(kind, {}).setdefault(name, []).append(statistics.median(values) - alone)


def _measure_reads(samples: Samples, clients: dict[str, Client], windows: int, number: int) -> None:
    words = Texts().words
    for turn in range(_READS):
        which = (number * _READS + turn) * 31 % windows
        paths = {
            "list": "/admin/windows",
            "list, the last page": f"/admin/windows?offset={windows - 20}",
            "list by name": "/admin/windows?sort_by=name",
            "list by tokens": "/admin/windows?sort_by=token_count",
            "list by tag": "/admin/windows?tags=team-3",
            "list of a session": f"/admin/windows?session_id={name_of(which)}",
            "list of sessions": "/admin/sessions",
            "list of sessions, frozen": "/admin/sessions?state=frozen",
            "status": f"/admin/windows/{name_of(which)}",
            "status with lineage": f"/admin/windows/{name_of(which)}?include_lineage=true",
            "status of a session": f"/admin/sessions/{name_of(which)}",
            "list, one window's word": f"/admin/windows?search={name_of(which)}",
            "list, rare word": f"/admin/windows?search={words[2000 + which]}",
            "list, common word": f"/admin/windows?search={words[which % 20]}",
            "list, a description": "/admin/windows?search=migration",
            "search, one window's word": f"/admin/search?q={name_of(which)}",
            "search, rare word": f"/admin/search?q={words[2000 + which]}",
            "search, common word": f"/admin/search?q={words[which % 20]}",
            "search, three words": f"/admin/search?q={words[100 + which % 50]}+{words[200]}+{words[300]}",
            "search, nothing": "/admin/search?q=zzzzzzzzzz",
        }
        for kind, path in paths.items():
            for name, client in clients.items():
                samples.reads.setdefault(kind, {}).setdefault(name, []).append(client.call(path)[0])


def _recorded_per_s(name: str, url: str, processes: int, number: int) -> float:
    """The turns that so many processes record together."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    started = [
        context.Process(target=_record, args=(name, url, f"{number}-{processes}-{which}", barrier, results))
        for which in range(processes)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join()
    return sum(results.get() for _ in started)


def _record(name: str, url: str, prefix: str, barrier: Any, results: Any) -> None:
    asyncio.run(_record_some(_store(name, url), prefix, barrier, results))


async def _record_some(store: Store, prefix: str, barrier: Any, results: Any) -> None:
    batches = _batches(prefix)
    async with store:
        await store.record(next(batches))
        ahead = list(itertools.islice(batches, 400))  # what makes them is not to be measured
        barrier.wait()
        began, count = time.monotonic(), 0
        for batch in ahead:
            await store.record(batch)
            count += len(batch)
            if time.monotonic() - began > _RECORD_S:
                break
        results.put(count / (time.monotonic() - began))


def _batches(prefix: str) -> Iterator[list[Any]]:
    """Batches of turns, each of another session, that grow to so many turns; then others begin."""
    texts = Texts()
    for generation in itertools.count():
        conversations = [texts.conversation(n) for n in range(_SESSIONS)]
        for n, messages in enumerate(conversations):
            for message in messages:
                message["content"] = f"{prefix} {generation} {n} {message['content']}"
        for turn in range(1, _TURNS + 1):
            for start in range(0, _SESSIONS, _BATCH):
                yield [
                    store_data.record(f"r{prefix}-{generation}-{n}", conversations[n][: 2 * turn])
                    for n in range(start, start + _BATCH)
                ]


def _report(samples: Samples, options: argparse.Namespace, filled_s: float, load: float) -> tuple[str, bool]:
    facts = machine.describe()
    rows, good = [], True
    for kind, by_store in samples.added.items():
        more = statistics.median(by_store["postgres"]) - statistics.median(by_store["sqlite"])
        good &= more <= _LIMIT_ADDED_MS
        rows.append(f"| added ms: {kind} | {_cells(by_store)} | {more:+.2f} (at most +{_LIMIT_ADDED_MS}) |")
    for kind, by_store in samples.turns.items():
        least = f"(at least {_LIMIT_TURNS:,.0f})" if kind.startswith("2") else ""
        good &= not least or statistics.median(by_store["postgres"]) >= _LIMIT_TURNS
        rows.append(f"| recorded turns/s: {kind} | {_cells(by_store, 0)} | {least} |")
    for kind, by_store in samples.reads.items():
        p50, p99 = statistics.median(by_store["postgres"]), _p99(by_store["postgres"])
        good &= p50 <= _LIMIT_READ_MS
        rows.append(
            f"| ms: {kind} | {_cells(by_store)} | {'' if p50 <= _LIMIT_READ_MS else '**too slow**; '}p99 {p99:.1f} |"
        )
    lines = [
        "# The store on PostgreSQL and on SQLite\n",
        "Written by `python -m loadtests.store_speed`.\n",
        f"- {', '.join(facts.values())}; {load:.0%} of the cores busy, this included",
        f"- {options.windows:,} windows, {options.windows * store_data.LENGTH:,} messages, filled in {filled_s:.0f} s; "
        f"{options.rounds} rounds, smallest and median of all (of latency: of the rounds' medians)\n",
        "| | SQLite: min, median | PostgreSQL: min, median | |\n| --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n", good


def _cells(by_store: dict[str, list[float]], digits: int = 2) -> str:
    return " | ".join(
        f"{min(by_store[name]):.{digits}f}, {statistics.median(by_store[name]):.{digits}f}"
        for name in ("sqlite", "postgres")
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000, help="a multiple of 250")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

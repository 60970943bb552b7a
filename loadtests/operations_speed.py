"""The latency of clone, fanout and isolate at a thousand chunks, and of list and status with ten thousand windows.

`python -m loadtests.operations_speed` starts LMCache, an engine that serves a model's name and computes nothing, and
the gateway, fills them (`loadtests.operations_data`) and sends requests over HTTP, one after the other, alternating
between the kinds. `--redis-server BIN` adds the Redis tier. The report goes to loadtests/results/operations_speed.md.
"""

import argparse
import asyncio
import http.client
import json
import math
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.settings import Settings
from gateway.stack import commands, local
from loadtests import contenders, machine
from loadtests.operations_data import LARGE, fill, name_of
from loadtests.scripted_engine import ScriptedEngine
from tests.support.local_stack import CACHE_WITHIN, wait_ready

_CHUNK_SIZE = 256
_OPERATION_MS = 10.0
_READ_MS = 20.0
_READY_WITHIN_S = 60.0
_FANOUT = 3


@dataclass(slots=True)
class Measurements:
    """The measured milliseconds by kind of request, facts for the report, and the growth of the tiers."""

    times: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    growth: dict[str, int] = field(default_factory=dict)


class Client:
    """One connection to the gateway; the client itself adds a tenth of a millisecond to each measurement."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[float, Any]:
        """Send a request; return the milliseconds until the response was read, and its JSON."""
        raw = json.dumps(body) if body is not None else None
        began = time.perf_counter()
        self._http.request(method, path, raw, {"content-type": "application/json"} if raw else {})
        response = self._http.getresponse()
        data = response.read()
        took = (time.perf_counter() - began) * 1000
        if response.status >= 400:
            raise RuntimeError(f"{method} {path} was answered {response.status}: {data.decode()}")
        return took, json.loads(data)


def main() -> int:
    """Run, write the report, and return 1 if a target is missed."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="cwg-operations-") as folder, ExitStack() as stack:
        redis = stack.enter_context(_redis(options.redis_server, Path(folder))) if options.redis_server else None
        measured = _run(options, Path(folder), redis, stack)
    text, met = _report(options, measured)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "operations_speed.md").write_text(text)
    print(text)
    return int(not met)


def _run(options: argparse.Namespace, folder: Path, redis: str | None, stack: ExitStack) -> Measurements:
    plan = local.plan(
        local.LocalStack(
            data_dir=folder / "data",
            demo="random",
            port=contenders.free_port(),
            chunk_size=_CHUNK_SIZE,
            redis_url=redis,
            cpu_cache_gb=1.0,
            engine_kv_gb=1.0,
        )
    )
    processes = commands.processes(plan)
    for process in (processes.cache, processes.gateway):
        stack.callback(process.stop)
    stack.callback((engine := ScriptedEngine(plan.engine_port)).shutdown)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    processes.cache.start()
    wait_ready(processes.cache, CACHE_WITHIN)
    measured = Measurements()
    settings = Settings(
        engine_urls=(plan.engine_url,), cache_url=plan.cache_url, kv_dir=str(plan.kv_dir), kv_redis_url=redis or "",
        data_dir=str(plan.data_dir), model_fingerprint=plan.model.fingerprint,
    )  # fmt: skip
    size = asyncio.run(fill(
        settings, "demo", chunks=options.chunks, chunk_size=_CHUNK_SIZE, object_bytes=options.object_bytes,
        windows=options.windows,
    ))  # fmt: skip
    measured.facts["objects"] = f"{options.chunks:,} chunks, {size:,} bytes on disk"
    processes.gateway.start()
    _wait(plan.options.port)
    client = Client(plan.options.port)
    began, busy, own = time.monotonic(), machine.busy_s(), _own_cpu_s(processes)
    _measure_operations(options, client, plan, measured)
    _measure_reads(options, client, measured)
    _measure_baselines(options, plan, measured)
    others = (machine.busy_s() - busy) - (_own_cpu_s(processes) - own)
    share = others / ((time.monotonic() - began) * (os.cpu_count() or 1))
    measured.facts["share of the machine used by other processes"] = f"{share:.0%}"
    return measured


def _own_cpu_s(parts: commands.Processes) -> float:
    """Return the CPU time of this process, the gateway and LMCache."""
    return machine.own_cpu_s() + machine.cpu_s(parts.gateway.pid) + machine.cpu_s(parts.cache.pid)


def _measure_operations(options: argparse.Namespace, client: Client, plan: local.Plan, measured: Measurements) -> None:
    before = _tiers(client, plan)
    for number in range(options.times):
        requests = {
            "clone": ("clone", {"target_window": f"clone-{number}"}),
            "isolate": ("clone", {"target_window": f"isolated-{number}", "isolate": True}),
            f"fanout, {_FANOUT} sessions": ("fanout", {"count": _FANOUT, "prefix": f"branch-{number}"}),
        }
        for kind, (operation, body) in requests.items():
            took, answer = client.call("POST", f"/admin/windows/{LARGE}/{operation}", body)
            if answer["kv"] != "complete":
                raise RuntimeError(f"{kind} was not complete: {answer}")
            measured.times.setdefault(kind, []).append(took)
    measured.growth = {name: value - before[name] for name, value in _tiers(client, plan).items()}
    took, answer = client.call("POST", "/admin/windows/isolated-0/thaw", {})
    receipt = answer["receipt"]
    measured.facts["first thaw of an isolated clone"] = (
        f"{took:.0f} ms: {receipt['chunks_relinked']:,} of {receipt['chunks_expected']:,} chunks linked, "
        "every byte checked"
    )


def _measure_reads(options: argparse.Namespace, client: Client, measured: Measurements) -> None:
    middle = name_of(options.windows // 2)
    paths = {
        "list": "/admin/windows",
        "list, 100 per page": "/admin/windows?limit=100",
        "list, the last page": f"/admin/windows?offset={options.windows - 20}",
        "list by name": "/admin/windows?sort_by=name",
        "list by token_count": "/admin/windows?sort_by=token_count",
        "list by size": "/admin/windows?sort_by=size&sort_order=asc",
        "list by tag": "/admin/windows?tags=team-3",
        "list by two tags": "/admin/windows?tags=auto,team-3",
        "list by session": f"/admin/windows?session_id=of-{middle}",
        "list by search": "/admin/windows?search=migration",
        "status": f"/admin/windows/{middle}",
        "status, with lineage": f"/admin/windows/{middle}?include_lineage=true",
        "status of the large window": f"/admin/windows/{LARGE}",
    }
    for _ in range(options.times):
        for kind, path in paths.items():
            measured.times.setdefault(kind, []).append(client.call("GET", path)[0])


def _measure_baselines(options: argparse.Namespace, plan: local.Plan, measured: Measurements) -> None:
    """Measure what the file system and SQLite alone take for the same work, as a lower bound."""
    folder = plan.data_dir / "baseline"
    folder.mkdir()
    files = [entry for entry in plan.kv_dir.iterdir() if entry.name.endswith(".data")][: options.chunks]
    links: list[float] = []
    for number in range(3):
        began = time.perf_counter()
        for index, file in enumerate(files):
            os.link(file, f"{folder}/{number}-{index}")
        links.append((time.perf_counter() - began) * 1000)
    measured.facts[f"{len(files):,} hard links alone"] = f"{statistics.median(links):.1f} ms"
    stats: list[float] = []
    names = [str(file) for file in files]
    for _ in range(options.times):
        began = time.perf_counter()
        for name in names:
            os.stat(name)  # noqa: PTH116 - without the overhead of pathlib
        stats.append((time.perf_counter() - began) * 1000)
    measured.facts[f"{len(files):,} stat calls alone"] = f"{statistics.median(stats):.1f} ms"
    db = sqlite3.connect(folder / "baseline.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE t (x)")
    commits: list[float] = []
    for _ in range(options.times):
        began = time.perf_counter()
        db.execute("INSERT INTO t VALUES (1)")
        commits.append((time.perf_counter() - began) * 1000)
    measured.facts["one committed row alone"] = f"{statistics.median(commits):.2f} ms"
    db.close()
    shutil.rmtree(folder)


def _tiers(client: Client, plan: local.Plan) -> dict[str, int]:
    """Return the contents of the tiers: files and bytes on disk, and the gateway's count of the bytes in Redis."""
    files = [entry.stat() for folder in (plan.kv_dir, *(plan.data_dir / "kv-pins").iterdir())
             for entry in os.scandir(folder)]  # fmt: skip
    contents = {
        "names in the disk tier": len(files),
        "bytes in the disk tier": sum({stat.st_ino: stat.st_blocks * 512 for stat in files}.values()),
    }
    redis = client.call("GET", "/admin/cache")[1]["tiers"].get("redis")
    if redis is not None:
        contents["bytes in Redis"] = redis["bytes"]
    return contents


def _report(options: argparse.Namespace, measured: Measurements) -> tuple[str, bool]:
    facts = machine.describe()
    rows, met = [], True
    for kind, times in measured.times.items():
        limit = _READ_MS if kind.startswith(("list", "status")) else _OPERATION_MS
        ordered = sorted(times)
        p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
        within_limit = p99 <= limit
        met = met and within_limit
        rows.append(
            f"| {kind} | {len(times)} | {statistics.median(times):.2f} | {p99:.2f} | {ordered[-1]:.2f} "
            f"| {limit:g} | {'met' if within_limit else '**not met**'} |"
        )
    met = met and not any(measured.growth.values())
    tiers = "disk and Redis tiers" if options.redis_server else "disk tier only"
    lines = [
        "# Latency of the window operations\n",
        "Written by `python -m loadtests.operations_speed`.\n",
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}",
        f"- {tiers}; a window of {measured.facts.pop('objects')}; {options.windows:,} other windows in the store",
        "- over HTTP, one connection, one request after the other, until the response is read; targets are for the p99",
        *(f"- {name}: {value}" for name, value in measured.facts.items()),
        "- all clones, isolated clones and fanouts together added "
        + ", ".join(f"{value:+,} {name}" for name, value in measured.growth.items()),
        "\n| ms | requests | p50 | p99 | longest | target | |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n", met


@contextmanager
def _redis(binary: str, folder: Path) -> Iterator[str]:
    port = contenders.free_port()
    argv = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait(port: int) -> None:
    end = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            Client(port).call("GET", "/readyz")
        except (OSError, RuntimeError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1000, help="chunks of the large window")
    parser.add_argument("--object-bytes", type=int, default=65_536, help="size of one KV object")
    parser.add_argument("--windows", type=int, default=10_000, help="number of other windows, a multiple of 500")
    parser.add_argument("--times", type=int, default=100, help="requests of each kind")
    parser.add_argument("--redis-server", help="a redis-server binary; adds the Redis tier")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

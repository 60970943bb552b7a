"""What clone, fanout and isolate cost at a thousand chunks, and list and status with ten thousand windows in the store.

`python -m loadtests.verbs_speed` starts LMCache, an engine that serves a model's name and computes nothing, and the
gateway, fills them (`loadtests.verbs_stock`) and asks over HTTP, one request after the other, each kind in turns. With
`--redis-server BIN` the Redis tier is there too. The report goes to loadtests/results/verbs_speed.md.
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
from gateway.stack import local
from loadtests import contenders, machine
from loadtests.scripted_engine import ScriptedEngine
from loadtests.verbs_stock import LARGE, fill, name_of

_CHUNK_SIZE = 256
_VERB_MS = 10.0
_LOOK_MS = 20.0
_GATEWAY_WITHIN = 60.0
_FANOUT = 3


@dataclass(slots=True)
class Seen:
    """What was measured: milliseconds by what was asked, and facts for the report."""

    times: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)


class Client:
    """One connection to the gateway; the client's own share of a measurement is a tenth of a millisecond."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[float, Any]:
        """Return the milliseconds until the answer was read, and the answer."""
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
    """Run, write the report, and return 1 where a target is missed."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="cwg-verbs-") as folder, ExitStack() as stack:
        redis = stack.enter_context(_redis(options.redis_server, Path(folder))) if options.redis_server else None
        seen = _run(options, Path(folder), redis, stack)
    text, met = _report(options, seen)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "verbs_speed.md").write_text(text)
    print(text)
    return int(not met)


def _run(options: argparse.Namespace, folder: Path, redis: str | None, stack: ExitStack) -> Seen:
    plan = local.plan(
        local.LocalStack(data_dir=folder / "data", port=contenders.free_port(), chunk_size=_CHUNK_SIZE, redis_url=redis)
    )
    parts = local.parts(plan)
    for part in (parts.cache, parts.gateway):
        stack.callback(part.stop)
    stack.callback((engine := ScriptedEngine(plan.engine_port)).shutdown)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    parts.cache.start()
    parts.cache.wait_ready(local.CACHE_WITHIN)
    seen = Seen()
    settings = Settings(
        engine_urls=(plan.engine_url,), cache_url=plan.cache_url, kv_dir=str(plan.kv_dir), kv_redis_url=redis or "",
        data_dir=str(plan.data_dir), model_fingerprint=plan.model.fingerprint,
    )  # fmt: skip
    size = asyncio.run(fill(
        settings, "demo", chunks=options.chunks, chunk_size=_CHUNK_SIZE, object_bytes=options.object_bytes,
        windows=options.windows,
    ))  # fmt: skip
    seen.facts["objects"] = f"{options.chunks:,} chunks, {size:,} bytes on disk"
    parts.gateway.start()
    _wait(plan.options.port)
    client = Client(plan.options.port)
    began, busy, own = time.monotonic(), machine.busy_s(), _own_s(parts)
    _verbs(options, client, plan, seen)
    _looks(options, client, seen)
    _floors(options, plan, seen)
    others = (machine.busy_s() - busy) - (_own_s(parts) - own)
    share = others / ((time.monotonic() - began) * (os.cpu_count() or 1))
    seen.facts["others used of the machine meanwhile"] = f"{share:.0%}"
    return seen


def _own_s(parts: local.Parts) -> float:
    """Processor time of everything that is measured, and of the measuring."""
    return machine.own_cpu_s() + machine.cpu_s(parts.gateway.pid) + machine.cpu_s(parts.cache.pid)


def _verbs(options: argparse.Namespace, client: Client, plan: local.Plan, seen: Seen) -> None:
    before = _tiers(client, plan)
    for number in range(options.times):
        asked = {
            "clone": ("clone", {"target_window": f"clone-{number}"}),
            "isolate": ("clone", {"target_window": f"apart-{number}", "isolate": True}),
            f"fanout, {_FANOUT} sessions": ("fanout", {"count": _FANOUT, "prefix": f"branch-{number}"}),
        }
        for kind, (verb, body) in asked.items():
            took, answer = client.call("POST", f"/admin/windows/{LARGE}/{verb}", body)
            if answer["kv"] != "complete":
                raise RuntimeError(f"{kind} was not whole: {answer}")
            seen.times.setdefault(kind, []).append(took)
    seen.grown = {what: value - before[what] for what, value in _tiers(client, plan).items()}
    took, answer = client.call("POST", "/admin/windows/apart-0/thaw", {})
    receipt = answer["receipt"]
    seen.facts["first thaw of an isolated clone"] = (
        f"{took:.0f} ms: {receipt['chunks_relinked']:,} of {receipt['chunks_expected']:,} chunks linked, "
        "every byte checked"
    )


def _looks(options: argparse.Namespace, client: Client, seen: Seen) -> None:
    middle = name_of(options.windows // 2)
    asked = {
        "list": "/admin/windows",
        "list, 100 of them": "/admin/windows?limit=100",
        "list, the last page": f"/admin/windows?offset={options.windows - 20}",
        "list by name": "/admin/windows?sort_by=name",
        "list by token_count": "/admin/windows?sort_by=token_count",
        "list by size": "/admin/windows?sort_by=size&sort_order=asc",
        "list by tag": "/admin/windows?tags=team-3",
        "list by two tags": "/admin/windows?tags=auto,team-3",
        "list by session": f"/admin/windows?session_id=of-{middle}",
        "list, searched": "/admin/windows?search=migration",
        "status": f"/admin/windows/{middle}",
        "status, with lineage": f"/admin/windows/{middle}?include_lineage=true",
        "status of the large window": f"/admin/windows/{LARGE}",
    }
    for _ in range(options.times):
        for kind, path in asked.items():
            seen.times.setdefault(kind, []).append(client.call("GET", path)[0])


def _floors(options: argparse.Namespace, plan: local.Plan, seen: Seen) -> None:
    """What the file system itself takes for what the verbs do, or did before."""
    place = plan.data_dir / "floor"
    place.mkdir()
    files = [entry for entry in plan.kv_dir.iterdir() if entry.name.endswith(".data")][: options.chunks]
    links: list[float] = []
    for number in range(3):
        began = time.perf_counter()
        for index, file in enumerate(files):
            os.link(file, f"{place}/{number}-{index}")
        links.append((time.perf_counter() - began) * 1000)
    seen.facts[f"{len(files):,} hard links, nothing else"] = f"{statistics.median(links):.1f} ms"
    looks: list[float] = []
    names = [str(file) for file in files]
    for _ in range(options.times):
        began = time.perf_counter()
        for name in names:
            os.stat(name)  # noqa: PTH116 - what the system takes, not what pathlib adds
        looks.append((time.perf_counter() - began) * 1000)
    seen.facts[f"{len(files):,} stat calls, nothing else"] = f"{statistics.median(looks):.1f} ms"
    db = sqlite3.connect(place / "floor.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE t (x)")
    commits: list[float] = []
    for _ in range(options.times):
        began = time.perf_counter()
        db.execute("INSERT INTO t VALUES (1)")
        commits.append((time.perf_counter() - began) * 1000)
    seen.facts["one committed row, nothing else"] = f"{statistics.median(commits):.2f} ms"
    db.close()
    shutil.rmtree(place)


def _tiers(client: Client, plan: local.Plan) -> dict[str, int]:
    """What lies in the tiers: files and bytes as the file system tells them, and Redis by the gateway's own count."""
    files = [entry.stat() for folder in (plan.kv_dir, *(plan.data_dir / "kv-pins").iterdir())
             for entry in os.scandir(folder)]  # fmt: skip
    found = {
        "names in the disk tier": len(files),
        "bytes in the disk tier": sum({one.st_ino: one.st_blocks * 512 for one in files}.values()),
    }
    redis = client.call("GET", "/admin/cache")[1]["tiers"].get("redis")
    if redis is not None:
        found["bytes in Redis"] = redis["bytes"]
    return found


def _report(options: argparse.Namespace, seen: Seen) -> tuple[str, bool]:
    facts = machine.describe()
    rows, met = [], True
    for kind, times in seen.times.items():
        limit = _LOOK_MS if kind.startswith(("list", "status")) else _VERB_MS
        ordered = sorted(times)
        p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
        held = p99 <= limit
        met = met and held
        rows.append(
            f"| {kind} | {len(times)} | {statistics.median(times):.2f} | {p99:.2f} | {ordered[-1]:.2f} "
            f"| {limit:g} | {'met' if held else '**not met**'} |"
        )
    met = met and not any(seen.grown.values())
    tiers = "disk and Redis tiers" if options.redis_server else "disk tier only"
    lines = [
        "# What the verbs cost\n",
        "Written by `python -m loadtests.verbs_speed`.\n",
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}",
        f"- {tiers}; a window of {seen.facts.pop('objects')}; {options.windows:,} other windows in the store",
        "- over HTTP, one connection, one request after the other, until the answer is read; the target is for the p99",
        *(f"- {what}: {value}" for what, value in seen.facts.items()),
        "- after all clones, isolated clones and fanouts there were "
        + ", ".join(f"{value:+,} {what}" for what, value in seen.grown.items()),
        "\n| ms | times | p50 | p99 | longest | target | |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |",
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
    end = time.monotonic() + _GATEWAY_WITHIN
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
    parser.add_argument("--chunks", type=int, default=1000, help="of the large window")
    parser.add_argument("--object-bytes", type=int, default=65_536, help="of one KV object")
    parser.add_argument("--windows", type=int, default=10_000, help="other windows, a multiple of 500")
    parser.add_argument("--times", type=int, default=100, help="how often each is asked")
    parser.add_argument("--redis-server", help="a redis-server binary: the Redis tier as well")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

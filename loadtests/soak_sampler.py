"""Samples of what a gateway holds: memory, file descriptors, connections, tasks, rows, files and keys."""

import json
import os
import sqlite3
import time
import urllib.request
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from loadtests import machine

_ESTABLISHED = "01"
# Tables of SQLite itself, and the one that identifies the store.
_IGNORED_TABLES = ("sqlite_", "meta")


@dataclass(frozen=True, slots=True)
class GatewayUnderTest:
    """The process, ports and files of a running gateway."""

    pid: int
    inspector_port: int
    port: int
    engine_port: int
    store: Path
    kv_dir: Path | None
    redis_url: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample. `upstream` and `clients` are connections, which count in `fds` as well."""

    at_s: float
    rss: int
    fds: int
    upstream: int
    clients: int
    threads: int
    tasks: dict[str, int]
    objects: int
    types: dict[str, int]
    rows: dict[str, int]
    store_bytes: int
    kv_files: int
    kv_bytes: int
    pins: int
    redis_pins: int
    in_flight: int
    unrecorded: int
    requests: int
    failures: int
    note: str = ""

    @property
    def own_fds(self) -> int:
        """File descriptors that are not connections to the engine or to clients."""
        return self.fds - self.upstream - self.clients


@dataclass(slots=True)
class Sampler:
    """Takes samples of one gateway."""

    gateway: GatewayUnderTest
    began: float = field(default_factory=time.monotonic)

    def sample(self, requests: int = 0, failures: int = 0, note: str = "") -> Sample:
        """Take one sample."""
        w = self.gateway
        inside = _inspect(w.inspector_port)
        metrics = _metrics(w.port)
        upstream, clients = _connections(w.pid, w.engine_port, w.port)
        kv_files, kv_bytes = _usage(w.kv_dir) if w.kv_dir else (0, 0)
        pins = w.kv_dir.with_name(f"{w.kv_dir.name}-pins") if w.kv_dir else None
        return Sample(
            at_s=round(time.monotonic() - self.began, 1),
            rss=machine.resident_bytes(w.pid),
            fds=_count(w.pid, "fd"),
            upstream=upstream,
            clients=clients,
            threads=_count(w.pid, "task"),
            tasks=inside["tasks"],
            objects=inside["objects"],
            types=inside["types"],
            rows=rows(w.store),
            store_bytes=sum(f.stat().st_size for f in w.store.parent.glob(f"{w.store.name}*")),
            kv_files=kv_files,
            kv_bytes=kv_bytes,
            pins=sum(1 for f in pins.rglob("*") if f.is_file()) if pins and pins.exists() else 0,
            redis_pins=_pins_in_redis(w.redis_url) if w.redis_url else 0,
            in_flight=metrics["cwg_turns_in_flight"],
            unrecorded=metrics["cwg_turns_unrecorded"],
            requests=requests,
            failures=failures,
            note=note,
        )


def rows(store: Path) -> dict[str, int]:
    """Return the number of rows in each table of the store."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=30)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        names = [name for name in names if not name.startswith(_IGNORED_TABLES)]
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}


def _inspect(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return dict(json.load(answer))


def _metrics(port: int) -> dict[str, int]:
    """Return the gateway's own metrics that have no labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.split() for line in lines if line.startswith("cwg_") and "{" not in line)
    return {name: int(float(value)) for name, value, *_ in pairs}


def _count(pid: int, folder: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{folder}").iterdir())


def _connections(pid: int, engine_port: int, port: int) -> tuple[int, int]:
    """Count the open connections of a process: to the engine, and from clients."""
    links = (_target(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    upstream = clients = 0
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes and fields[3] == _ESTABLISHED:
            upstream += int(fields[2].partition(":")[2], 16) == engine_port
            clients += int(fields[1].partition(":")[2], 16) == port
    return upstream, clients


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except FileNotFoundError:  # it has just been closed
        return ""


def _usage(folder: Path) -> tuple[int, int]:
    """Return the number of files in a directory, and their bytes; files may disappear meanwhile."""
    sizes: list[int] = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            sizes.append(entry.stat().st_size)
    return len(sizes), sum(sizes)


def _pins_in_redis(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return sum(1 for _ in client.scan_iter("cwg:*", count=1000))

"""Clean up what the processes of the stack leave behind, even after kill -9.

Two things make this necessary. When vLLM's API server is killed, its engine and worker processes keep running. And the
KV of a CPU engine is in POSIX shared memory, which outlives the processes: a gigabyte until the next boot, even after
an orderly stop. So while a process runs, a ledger in the data directory lists its children and segments. Whoever reads
the ledger later (the supervisor, its reaper, the next start) can tell them from others: a process by its start time, a
segment by its inode.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_SHM = Path("/dev/shm")  # noqa: S108 - where POSIX keeps its segments, not a file of ours
_GONE_WITHIN = 10.0
"""Seconds that the kernel has to end killed processes with gigabytes of memory."""


class Process(NamedTuple):
    """A process, distinguishable from a later one with the same number."""

    pid: int
    started: int


class Segment(NamedTuple):
    """A shared memory segment, distinguishable from a later one with the same name."""

    name: str
    inode: int


class _Entry(NamedTuple):
    processes: set[Process]
    segments: set[Segment]
    temporary: str
    owns_segments: bool


class Ledger:
    """What belongs to one process of the stack, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, leader: int, temporary: Path, *, owns_segments: bool) -> None:
        """Record every process of the leader's group, and the segments that they have or had at the last call."""
        processes = set(group(leader))
        segments = self._read().segments | _segments(processes) if owns_segments else set()
        content = {"boot": _boot(), **_Entry(processes, segments, str(temporary), owns_segments)._asdict()}
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, default=sorted), encoding="utf-8")
        unfinished.replace(self._path)

    def processes(self) -> set[Process]:
        """The processes that were recorded last."""
        return self._read().processes

    def sweep(self) -> None:
        """Kill what still runs, remove what it left, and delete the ledger."""
        entry = self._read()
        alive = _with_groups(entry.processes)
        segments = entry.segments | _segments(alive) if entry.owns_segments else set()
        _kill(alive)
        for segment in segments:
            _unlink(segment)
        if entry.temporary:
            shutil.rmtree(entry.temporary, ignore_errors=True)
        self._path.unlink(missing_ok=True)

    def _read(self) -> _Entry:
        try:
            content = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return _Entry(set(), set(), "", False)
        if content["boot"] != _boot():
            return _Entry(set(), set(), content["temporary"], False)
        return _Entry(
            {Process(*process) for process in content["processes"]},
            {Segment(*segment) for segment in content["segments"]},
            content["temporary"],
            content["owns_segments"],
        )


def recorded(run_dir: Path) -> dict[str, set[Process]]:
    """The processes of each part of a running stack, as last recorded."""
    return {path.stem: Ledger(path).processes() for path in run_dir.glob("*.json")}


def sweep(run_dir: Path) -> None:
    """Clean up everything that an earlier run of the stack left."""
    for path in sorted(run_dir.glob("*.json")):
        Ledger(path).sweep()


def group(leader: int) -> Iterator[Process]:
    """The living processes of a process group."""
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        stat = _stat(int(entry.name))
        if stat and stat.group == leader:
            yield Process(int(entry.name), stat.started)


class _Stat(NamedTuple):
    group: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        line = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, so the fields count from the last parenthesis: state, ppid, pgrp ...
    fields = line.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else _Stat(group=int(fields[2]), started=int(fields[19]))


def _is_alive(process: Process) -> bool:
    stat = _stat(process.pid)
    return stat is not None and stat.started == process.started


def _with_groups(processes: set[Process]) -> set[Process]:
    """Those that still live, and whatever has joined their groups since they were recorded."""
    alive = {process for process in processes if _is_alive(process)}
    groups = {stat.group for process in alive if (stat := _stat(process.pid))}
    return alive | {process for leader in groups for process in group(leader)}


def _kill(alive: set[Process]) -> None:
    """Kill these, and wait until all have ended."""
    for process in alive:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself
    deadline = time.monotonic() + _GONE_WITHIN
    while any(_is_alive(process) for process in alive) and time.monotonic() < deadline:
        time.sleep(0.02)


def _segments(processes: Iterable[Process]) -> set[Segment]:
    # By inode, because a semaphore is mapped under the temporary name it was created with.
    mapped = {inode for process in processes for inode in _mapped_inodes(process.pid)}
    return {segment for segment in _all_segments() if segment.inode in mapped}


def _mapped_inodes(pid: int) -> Iterator[int]:
    try:
        lines = (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return
    for line in lines:
        if f"{_SHM}/" in line:
            yield int(line.split(maxsplit=5)[4])


def _all_segments() -> Iterator[Segment]:
    with os.scandir(_SHM) as entries:
        for entry in entries:
            yield Segment(entry.name, entry.inode())


def _unlink(segment: Segment) -> None:
    path = _SHM / segment.name
    try:
        if path.stat().st_ino == segment.inode:
            path.unlink()
    except FileNotFoundError:
        return  # its owner removed it


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

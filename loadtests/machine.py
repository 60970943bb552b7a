"""The machine that a measurement was made on, and what its processes use, read from /proc."""

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_IDLE_WINDOW_S = 0.1
_IDLE_SHARE = 0.15  # of one core; the threads of an idle server wake up now and then


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc: who, whose child, since when, and the seconds of processor time it has used."""

    pid: int
    parent: int
    started: int
    cpu_s: float


def describe() -> dict[str, str]:
    """Facts about this machine, for the head of a report."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{int((_field('/proc/meminfo', 'MemTotal') or '0').split()[0]) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def tree(pid: int) -> list[Process]:
    """A process and its descendants, the root first; empty when it is gone."""
    by_pid = {process.pid: process for process in _processes()}
    if pid not in by_pid:
        return []
    found, at = [by_pid[pid]], 0
    while at < len(found):
        found += [process for process in by_pid.values() if process.parent == found[at].pid]
        at += 1
    return found


def still_there(family: Iterable[Process]) -> list[Process]:
    """Those that have not ended; a number that was given to another process since does not count."""
    known = {(process.pid, process.started) for process in family}
    return [process for process in _processes() if (process.pid, process.started) in known]


def cpu_s(pid: int) -> float:
    """Processor time used so far by a process and its descendants."""
    return sum(process.cpu_s for process in tree(pid))


def own_cpu_s() -> float:
    """Processor time of this process and of those of its children that it has waited for."""
    return sum(os.times()[:4])


def resident_bytes(pid: int) -> int:
    """Memory that a process and its descendants hold."""
    held = (_field(f"/proc/{process.pid}/status", "VmRSS") for process in tree(pid))
    return sum(int(line.split()[0]) * 1024 for line in held if line)


def busy_s() -> float:
    """Seconds that all cores together have been busy since boot, with what the hypervisor took away."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)  # `_`: idle, and waiting for a disk
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def wait_idle(pid: int, at_most_s: float) -> float:
    """Wait until a process has nothing left to do; return how many seconds that took, 0 if it was idle already."""
    start = time.monotonic()
    while (began := time.monotonic()) - start < at_most_s:
        used = cpu_s(pid)
        time.sleep(_IDLE_WINDOW_S)
        if cpu_s(pid) - used <= _IDLE_SHARE * _IDLE_WINDOW_S + _TICK_S / 2:
            return began - start
    return at_most_s


def _processes() -> list[Process]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            fields = text.rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) * _TICK_S
            found.append(Process(int(entry.name), int(fields[1]), int(fields[19]), cpu))
    return found


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

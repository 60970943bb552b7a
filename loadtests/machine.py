"""Facts about the machine of a measurement, and the resource usage of its processes, read from /proc."""

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_IDLE_WINDOW_S = 0.1
_IDLE_SHARE = 0.15  # of one core; threads of an idle server wake up occasionally


@dataclass(frozen=True, slots=True)
class Process:
    """One process: its id, its parent, its start time in ticks, and the CPU seconds that it has used."""

    pid: int
    parent: int
    started: int
    cpu_s: float


def describe() -> dict[str, str]:
    """Return facts about this machine for the head of a report."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{int((_field('/proc/meminfo', 'MemTotal') or '0').split()[0]) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def tree(pid: int) -> list[Process]:
    """Return a process and its descendants, the root first; empty if it has ended."""
    by_pid = {process.pid: process for process in _processes()}
    if pid not in by_pid:
        return []
    processes, at = [by_pid[pid]], 0
    while at < len(processes):
        processes += [process for process in by_pid.values() if process.parent == processes[at].pid]
        at += 1
    return processes


def still_running(processes: Iterable[Process]) -> list[Process]:
    """Return those that have not ended; a reused process id does not count."""
    ids = {(process.pid, process.started) for process in processes}
    return [process for process in _processes() if (process.pid, process.started) in ids]


def cpu_s(pid: int) -> float:
    """Return the CPU time used so far by a process and its descendants."""
    return sum(process.cpu_s for process in tree(pid))


def own_cpu_s() -> float:
    """Return the CPU time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its descendants."""
    lines = (_field(f"/proc/{process.pid}/status", "VmRSS") for process in tree(pid))
    return sum(int(line.split()[0]) * 1024 for line in lines if line)


def busy_s() -> float:
    """Return the seconds that all cores together have been busy since boot, including time stolen by the hypervisor."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)  # `_`: idle and iowait
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def wait_idle(pid: int, at_most_s: float) -> float:
    """Wait until a process is idle; return how many seconds that took, 0 if it was idle already."""
    start = time.monotonic()
    while (began := time.monotonic()) - start < at_most_s:
        used = cpu_s(pid)
        time.sleep(_IDLE_WINDOW_S)
        if cpu_s(pid) - used <= _IDLE_SHARE * _IDLE_WINDOW_S + _TICK_S / 2:
            return began - start
    return at_most_s


def _processes() -> list[Process]:
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            fields = text.rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) * _TICK_S
            processes.append(Process(int(entry.name), int(fields[1]), int(fields[19]), cpu))
    return processes


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

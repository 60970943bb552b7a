"""`cwg up` in a process of its own, with its output and its processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from gateway.stack import local
from gateway.stack.demos import Demo

START_S = 400.0
PARTS = ("cache", "engine", "gateway")


class Up:
    """A running `cwg up` with a demo model."""

    def __init__(self, data_dir: Path, demo: Demo, *more: str) -> None:
        (self.port,) = local.free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir = data_dir / "run"
        argv = [sys.executable, "-m", "gateway", "up", "--data-dir", str(data_dir), "--port", str(self.port)]
        argv += ["--demo", demo, *more]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CWG_")}
        self.process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._out, self._err = _Reader(self.process.stdout), _Reader(self.process.stderr)

    @property
    def out(self) -> str:
        """All of stdout up to now."""
        return "".join(self._out.lines)

    @property
    def said(self) -> str:
        """All of stderr up to now."""
        return "".join(self._err.lines)

    def wait_ready(self) -> None:
        """Wait for the ready line."""
        eventually(lambda: bool(self.out) or self.process.poll() is not None, "the ready line", START_S)
        assert self.out == f"ready {self.url}\n", self.said

    def belongings(self, *parts: str) -> tuple[set[int], set[str]]:
        """Processes and shared memory of these parts, or of the complete stack with its supervisor."""
        noted = [json.loads((self.run_dir / f"{part}.json").read_text()) for part in parts or PARTS]
        pids = {int(pid) for part in noted for pid, _ in part["processes"]}
        return pids | (set() if parts else {self.process.pid}), {name for part in noted for name, _ in part["segments"]}

    def kill(self, part: str) -> None:
        """Kill a part of the stack, and wait until that is reported and it is back."""
        processes, segments = self.belongings(part)
        ready = self.said.count(f"{part} is ready")
        os.kill(next(pid for pid in processes if os.getpgid(pid) == pid), signal.SIGKILL)
        eventually(lambda: f"{part} was killed by SIGKILL; again in 1 s" in self.said, f"{part} is reported dead", 30)
        eventually(lambda: self.said.count(f"{part} is ready") > ready, f"{part} is back", START_S)
        assert not living(processes)
        assert not shared_memory() & segments

    def end(self, how: signal.Signals) -> int:
        """Send a signal to the supervisor alone and wait for its end."""
        self.process.send_signal(how)
        return self.close()

    def close(self) -> int:
        """Wait for its end."""
        code = self.process.wait(90)
        self._out.close()
        self._err.close()
        return code


class _Reader:
    """The lines of a pipe as they come."""

    def __init__(self, pipe: IO[str] | None) -> None:
        assert pipe is not None
        self.lines: list[str] = []
        self._pipe = pipe
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def close(self) -> None:
        """To its end."""
        self._thread.join()
        self._pipe.close()

    def _read(self) -> None:
        for line in self._pipe:
            self.lines.append(line)


def eventually(holds: Callable[[], bool], what: str, within: float) -> None:
    """Wait until something holds; fail with what it was if it does not."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, f"not within {within:g} s: {what}"
        time.sleep(0.05)


def living(pids: set[int]) -> set[int]:
    """Those of these processes that still run."""
    return {pid for pid in pids if _state(pid) not in "ZX"}


def _state(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def shared_memory() -> set[str]:
    """The names of all segments on this machine."""
    return {path.name for path in Path("/dev/shm").iterdir()}

"""`cwg up` as a user runs it: one command, the whole real stack, and every way for it to end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from gateway.stack import local

pytestmark = pytest.mark.stack

START_S = 400.0
CHUNK = 64
PARTS = ("cache", "engine", "gateway")
HISTORY = [
    {"role": "system", "content": "You keep a lighthouse."},
    {"role": "user", "content": "Tell me what you wrote into the books. " * 60},
]


class Up:
    """A running `cwg up`, with its output and its processes."""

    def __init__(self, data_dir: Path) -> None:
        (self.port,) = local.free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir = data_dir / "run"
        argv = [sys.executable, "-m", "gateway", "up", "--data-dir", str(data_dir), "--port", str(self.port)]
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

    def ask(self, question: str) -> dict[str, Any]:
        """A turn of one session; the answer's usage."""
        body = {"model": "demo", "max_tokens": 8, "messages": [*HISTORY, {"role": "user", "content": question}]}
        answer = httpx.post(f"{self.url}/s/keeper/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["usage"])


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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Up]]:
    """`cwg up` on the test's data directory, any number of times."""
    runs: list[Up] = []

    def run() -> Up:
        runs.append(Up(tmp_path / "data"))
        return runs[-1]

    yield run
    for up in runs:
        if up.process.poll() is None:
            up.end(signal.SIGTERM)


def eventually(holds: Callable[[], bool], what: str, within: float) -> None:
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, f"not within {within:g} s: {what}"
        time.sleep(0.05)


def living(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _state(pid) not in "ZX"}


def _state(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def test_up_serves_restarts_processes_and_stops_clean(start: Callable[[], Up], tmp_path: Path) -> None:
    up = start()
    up.wait_ready()
    prompt_tokens = up.ask("What did you see?")["prompt_tokens"]
    kv = tmp_path / "data" / "kv"
    eventually(
        lambda: len(list(kv.glob("models-SEP-demo-small@*.data"))) >= prompt_tokens // CHUNK, "the KV is on disk", 30
    )

    second = start()
    assert second.close() == 1
    assert second.said.endswith(f"is in use by process {up.process.pid}; stop that one or name another --data-dir\n")

    up.kill("cache")
    up.ask("And then?")
    up.kill("engine")
    assert up.ask("What did you see?")["prompt_tokens_details"]["cached_tokens"] >= prompt_tokens - CHUNK
    up.kill("gateway")
    up.ask("Anything else?")

    processes, segments = up.belongings()
    assert segments
    assert up.end(signal.SIGTERM) == 0
    assert not living(processes)
    assert not shared_memory() & segments
    assert not list(up.run_dir.iterdir())

    again = start()
    again.wait_ready()
    assert again.ask("What did you see?")["prompt_tokens_details"]["cached_tokens"] >= prompt_tokens - CHUNK

    processes, segments = again.belongings()
    again.end(signal.SIGKILL)
    eventually(lambda: not living(processes), "no orphan is left", 30)
    eventually(lambda: not shared_memory() & segments, "no segment is left", 30)

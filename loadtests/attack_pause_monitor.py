"""Polls a gateway's /healthz continuously, in a separate process, and reports the longest pause.

`python -m loadtests.attack_pause_monitor PORT PID` answers each line on stdin with one line of JSON about the time
since the line before. `pause_ms` is the longest time without an answer, less the time in which the gateway or this
process was runnable but had no core, which the kernel counts for each thread (/proc/PID/task/*/schedstat, in ns).
On a busy machine the wall-clock time, `clock_ms`, says more about the other work than about the gateway.
"""

import json
import os
import select
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

_REQUEST = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
_EVERY_S = 0.004


class PauseMonitor:
    """One connection to the gateway, reopened when it is closed."""

    def __init__(self, port: int, pid: int) -> None:
        self._port = port
        self._gateway_tasks = Path(f"/proc/{pid}/task")
        self._own_tasks = Path(f"/proc/{os.getpid()}/task")
        self._sock: socket.socket | None = None
        self._sent_at = 0.0  # when the pending request was sent; 0: no request is pending
        self._waited: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the pauses so far."""
        self.pause = self.clock = 0.0
        self.requests = self.lost = 0

    def step(self) -> None:
        """Send a request, or wait for its response."""
        if not self._sent_at:
            time.sleep(_EVERY_S)
            self._sent_at, self._waited = time.monotonic(), _waiting_ns(self._gateway_tasks)
            self._send()
        if self._sock is None:
            self._send()
            return
        own = _waiting_ns(self._own_tasks)
        if self._sock in select.select([self._sock, sys.stdin], [], [], 0.5)[0]:
            self._receive(self._sock, own)

    def record(self, own: dict[str, int] | None = None) -> None:
        """Count the pending request up to now; `own`: how long our own threads had waited for a core before."""
        if self._sent_at:
            took = time.monotonic() - self._sent_at
            waited_ns = _longest_wait(_waiting_ns(self._gateway_tasks), self._waited)
            waited_ns += _longest_wait(_waiting_ns(self._own_tasks), own) if own is not None else 0
            self.clock = max(self.clock, took)
            self.pause = max(self.pause, took - waited_ns / 1e9)

    def _send(self) -> None:
        try:
            if self._sock is None:
                self._sock = socket.create_connection(("127.0.0.1", self._port), timeout=2)
            self._sock.sendall(_REQUEST)
        except OSError:
            self._drop()

    def _receive(self, sock: socket.socket, own: dict[str, int]) -> None:
        try:
            answer = sock.recv(65536)
        except OSError:
            answer = b""
        if not answer:
            self._drop()
            return
        self.record(own)
        self.requests += 1
        self._sent_at = 0.0

    def _drop(self) -> None:
        """Close the connection; the request stays pending."""
        self.lost += 1
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        time.sleep(0.02)


def _waiting_ns(tasks: Path) -> dict[str, int]:
    """How long each thread of a process has been runnable without a core, in ns; empty once it has ended."""
    waiting = {}
    with suppress(OSError):
        for task in tasks.iterdir():
            with suppress(OSError, IndexError):
                waiting[task.name] = int((task / "schedstat").read_text().split()[1])
    return waiting


def _longest_wait(now: dict[str, int], before: dict[str, int]) -> int:
    """The longest wait of one thread since `before`: the other threads may have waited for that one."""
    return max((waited - before.get(name, 0) for name, waited in now.items()), default=0)


def main() -> None:
    """PauseMonitor until stdin ends."""
    monitor = PauseMonitor(int(sys.argv[1]), int(sys.argv[2]))
    while True:
        monitor.step()
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            monitor.record()
            pauses = {"pause_ms": monitor.pause * 1e3, "clock_ms": monitor.clock * 1e3, "requests": monitor.requests}
            print(json.dumps({**pauses, "lost": monitor.lost}), flush=True)
            monitor.reset()


if __name__ == "__main__":
    main()

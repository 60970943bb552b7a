"""Asks a gateway's /healthz all the time, in a process of its own, and tells the longest pause between two laps.

`python -m loadtests.attack_watch PORT PID` answers each line on stdin with one line of JSON. What counts is `pause_ms`:
the time in which the gateway did not answer, without that in which this machine let neither it nor us run, which the
kernel counts for each thread (/proc/PID/task/*/schedstat, in ns). On a machine that does other work too, the time on
the clock, `clock_ms`, says more about that work than about the gateway.
"""

import json
import os
import select
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

_ASK = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
_EVERY_S = 0.004


class Watch:
    """One connection, made anew when it is closed."""

    def __init__(self, port: int, pid: int) -> None:
        self._port = port
        self._gateway = Path(f"/proc/{pid}/task")
        self._mine = Path(f"/proc/{os.getpid()}/task")
        self._sock: socket.socket | None = None
        self._since = 0.0  # when the request under way was sent; 0: none is
        self._waited: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Begin a lap."""
        self.pause = self.clock = 0.0
        self.asked = self.lost = 0

    def step(self) -> None:
        """Ask, or look for the answer."""
        if not self._since:
            time.sleep(_EVERY_S)
            self._since, self._waited = time.monotonic(), _starved(self._gateway)
            self._send()
        if self._sock is None:
            self._send()
            return
        mine = _starved(self._mine)
        if self._sock in select.select([self._sock, sys.stdin], [], [], 0.5)[0]:
            self._receive(self._sock, mine)

    def look(self, mine: dict[str, int] | None = None) -> None:
        """Count the request that is under way up to now; `mine`: what we had waited for a core before it came."""
        if self._since:
            took = time.monotonic() - self._since
            starved = _most_more(_starved(self._gateway), self._waited)
            starved += _most_more(_starved(self._mine), mine) if mine is not None else 0
            self.clock = max(self.clock, took)
            self.pause = max(self.pause, took - starved / 1e9)

    def _send(self) -> None:
        try:
            if self._sock is None:
                self._sock = socket.create_connection(("127.0.0.1", self._port), timeout=2)
            self._sock.sendall(_ASK)
        except OSError:
            self._drop()

    def _receive(self, sock: socket.socket, mine: dict[str, int]) -> None:
        try:
            answer = sock.recv(65536)
        except OSError:
            answer = b""
        if not answer:
            self._drop()
            return
        self.look(mine)
        self.asked += 1
        self._since = 0.0

    def _drop(self) -> None:
        """The connection is gone: the request stays under way."""
        self.lost += 1
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        time.sleep(0.02)


def _starved(tasks: Path) -> dict[str, int]:
    """Nanoseconds in which each thread of a process wanted to run and could not; nothing where it has ended."""
    found = {}
    with suppress(OSError):
        for task in tasks.iterdir():
            with suppress(OSError, IndexError):
                found[task.name] = int((task / "schedstat").read_text().split()[1])
    return found


def _most_more(now: dict[str, int], before: dict[str, int]) -> int:
    """How much one thread waited since then: the one that waited most, for the others may wait for it."""
    return max((waited - before.get(name, 0) for name, waited in now.items()), default=0)


def main() -> None:
    """Watch until stdin ends."""
    watch = Watch(int(sys.argv[1]), int(sys.argv[2]))
    while True:
        watch.step()
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            watch.look()
            lap = {"pause_ms": watch.pause * 1e3, "clock_ms": watch.clock * 1e3, "asked": watch.asked}
            print(json.dumps({**lap, "lost": watch.lost}), flush=True)
            watch.reset()


if __name__ == "__main__":
    main()

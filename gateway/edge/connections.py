"""Connections of clients: how many there may be, and what is done about clients that went away without a word."""

import socket
from typing import Protocol

_KEEPALIVE_IDLE_S = 30
_KEEPALIVE_EVERY_S = 10
_KEEPALIVE_PROBES = 3
_LINGERING = 32  # connections beyond the limit that are kept for the moment it takes to refuse them in words


class Closable(Protocol):
    """A connection that can be closed while no request is on it."""

    def close_idle(self) -> None:
        """Close it."""
        ...


class Connections:
    """The open connections. One without a request on it is closed when there is no room for a new one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: dict[Closable, None] = {}  # in the order in which they became idle
        self._busy: set[Closable] = set()
        self._lingering = 0

    def admit(self, connection: Closable) -> bool:
        """Count a new connection, unless all there may be are busy."""
        if len(self._idle) + len(self._busy) >= self._most:
            if not self._idle:
                return False
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.close_idle()
        self._idle[connection] = None
        return True

    def begin(self, connection: Closable) -> None:
        """A request has come on it."""
        self._idle.pop(connection, None)
        self._busy.add(connection)

    def end(self, connection: Closable) -> None:
        """It has been answered."""
        if connection in self._busy:
            self._busy.discard(connection)
            self._idle[connection] = None

    def release(self, connection: Closable) -> None:
        """It is closed."""
        self._idle.pop(connection, None)
        self._busy.discard(connection)

    def linger(self) -> bool:
        """Keep a connection that was not admitted for a moment; tell whether that is possible."""
        if self._lingering >= _LINGERING:
            return False
        self._lingering += 1
        return True

    def lingered(self) -> None:
        """Such a connection is closed."""
        self._lingering -= 1


def detect_dead_peer(sock: socket.socket, timeout_s: float) -> None:
    """Have the kernel close a connection whose other end is gone without a word, or has long taken nothing.

    With TCP_USER_TIMEOUT Linux gives up on data that stays unacknowledged and on a window that stays shut for so long
    (tcp(7); `tcp_probe_timer`), and not after a quarter of an hour of retransmissions.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": _KEEPALIVE_IDLE_S,
        "TCP_KEEPINTVL": _KEEPALIVE_EVERY_S,
        "TCP_KEEPCNT": _KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": int(timeout_s * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

"""Client connections: how many there may be, and how dead ones are detected."""

import logging
import socket
import time
from typing import Protocol

log = logging.getLogger(__name__)

_KEEPALIVE_IDLE_S = 30
_KEEPALIVE_EVERY_S = 10
_KEEPALIVE_PROBES = 3
_RESERVE = 32  # connections beyond the limit whose request is read: probes are answered, others refused with a 503
_LOG_EVERY_S = 60.0


class Closable(Protocol):
    """A connection that can be closed."""

    def close_idle(self) -> None:
        """Close it; it has no request in progress."""
        ...


class Connections:
    """The open connections. An idle one is closed to make room for a new one.

    If all are busy, a few more are accepted for the moment it takes to read their request.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[Closable, None] = {}  # in the order in which they became idle
        self._busy: set[Closable] = set()
        self._reserve: dict[Closable, None] = {}  # oldest first
        self._refused = 0
        self._logged_at = -_LOG_EVERY_S

    def admit(self, connection: Closable) -> bool:
        """Count a new connection; False if the limit is reached by busy ones, so that it is only in the reserve."""
        if len(self._busy) >= self._limit:
            if len(self._reserve) >= _RESERVE:
                _close_oldest(self._reserve)
            self._reserve[connection] = None
            return False
        if len(self._idle) + len(self._busy) >= self._limit:
            _close_oldest(self._idle)
        self._idle[connection] = None
        return True

    def begin(self, connection: Closable) -> None:
        """Count a connection as busy: it has a request."""
        self._idle.pop(connection, None)
        self._reserve.pop(connection, None)
        self._busy.add(connection)

    def end(self, connection: Closable) -> None:
        """Count a connection as idle: its request has been answered."""
        if connection in self._busy:
            self._busy.discard(connection)
            self._idle[connection] = None

    def release(self, connection: Closable) -> None:
        """Forget a closed connection."""
        self._idle.pop(connection, None)
        self._reserve.pop(connection, None)
        self._busy.discard(connection)

    def refused(self) -> None:
        """Count a client that was refused; their number is logged once a minute."""
        self._refused += 1
        if time.monotonic() - self._logged_at < _LOG_EVERY_S:
            return
        self._logged_at = time.monotonic()
        log.warning(
            "%d clients were refused (503): all %d connections are busy; "
            "max_connections and the limit on open files set the maximum",
            self._refused, self._limit,
        )  # fmt: skip
        self._refused = 0


def _close_oldest(connections: dict[Closable, None]) -> None:
    oldest = next(iter(connections))
    del connections[oldest]
    oldest.close_idle()


def detect_dead_peer(sock: socket.socket, timeout_s: float) -> None:
    """Have the kernel close a connection whose peer is gone silently, or has long read nothing.

    With TCP_USER_TIMEOUT Linux gives up on data that stays unacknowledged, and on a window that stays closed, for that
    long (tcp(7); `tcp_probe_timer`), instead of after a quarter of an hour of retransmissions.
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

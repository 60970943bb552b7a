"""Detect when this process did not run: its event loop was blocked, or the whole process was stopped.

A timeout that expires meanwhile says nothing about the other side: the response may be in the socket, unread. So this
is checked before a client or an engine is blamed for a timeout.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

LostSince = Callable[[float], float]
"""Given a time of `time.monotonic`, the seconds since then in which this process did not run."""

_EVERY_S = 0.1
_NOTABLE_S = 0.25  # shorter delays are ordinary, and no timeout is as short
_NOTABLE_SHARE = 0.1
_KEPT = 256


def caused_by_own_stall(lost_since: LostSince, began: float) -> bool:
    """Whether a timeout of something that began then is our own fault: we did not run for much of the time."""
    return lost_since(began) > _NOTABLE_SHARE * (time.monotonic() - began)


def never_lost(_: float) -> float:
    """Always 0: for a client that is used outside a running gateway."""
    return 0.0


class _Stall(NamedTuple):
    began: float
    ended: float


class Stalls:
    """Detects stalls by a timer that fires late. Times are those of `time.monotonic`."""

    def __init__(self) -> None:
        self._stalls: deque[_Stall] = deque(maxlen=_KEPT)
        self._due = time.monotonic()

    async def __aenter__(self) -> "Stalls":
        self._loop = asyncio.get_running_loop()
        self._arm()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()

    def lost_since(self, since: float) -> float:
        """Seconds since then in which this process did not run."""
        stalls = [*self._stalls, *self._current()]
        return sum(stall.ended - max(stall.began, since) for stall in stalls if stall.ended > since)

    def _current(self) -> list[_Stall]:
        now = time.monotonic()  # the timer may be late and not fired yet
        return [_Stall(self._due, now)] if now - self._due > _NOTABLE_S else []

    def _arm(self) -> None:
        self._due = time.monotonic() + _EVERY_S
        self._timer = self._loop.call_later(_EVERY_S, self._on_timer)

    def _on_timer(self) -> None:
        self._stalls.extend(self._current())
        self._arm()

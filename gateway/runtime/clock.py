"""Whether the wall clock can be trusted to delete something for its age, which cannot be undone.

There are two reasons for doubt. The wall clock has moved against the one that counts seconds since boot: then somebody
set it, or it is broken. Or the newest record is very old at the start: then the machine was off for long, or its clock
is wrong, and the two cannot be told apart. In both cases nothing expires for a while, in which a clock that was wrong
for a moment is corrected; after that it is trusted.
"""

import time
from collections.abc import Callable

_TOLERANCE_S = 60.0  # between two calls of `doubt`; a clock that is slewed or drifts moves far less
_LONG_S = 7 * 86400.0


def since_boot() -> float:
    """Seconds since the machine was booted, including those in which it was suspended, if the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Compares the wall clock with one that cannot be set. A jump is one between two calls of `doubt`."""

    def __init__(
        self, hold_s: float, wall: Callable[[], float] = time.time, steady: Callable[[], float] = since_boot
    ) -> None:
        self._hold_s = hold_s
        self._wall = wall
        self._steady = steady
        self._trusted = wall() - steady()
        self._jumped_to = self._trusted
        self._jumped_at = steady()
        self._doubtful_until = steady()
        self._start_doubt = ""

    def started_after(self, newest: float | None) -> None:
        """Compare the clock with the time of the newest record, at the start."""
        behind = 0.0 if newest is None else self._wall() - newest
        if behind > _LONG_S:
            self._doubtful_until = self._steady() + self._hold_s
            self._start_doubt = f"the newest record is {behind / 86400:.0f} days old"

    def doubt(self) -> str:
        """Why nothing may expire now, "" if it may."""
        now = self._steady()
        offset = self._wall() - now
        if abs(offset - self._trusted) <= _TOLERANCE_S:
            self._trusted = self._jumped_to = offset
            return self._start_doubt if now < self._doubtful_until else ""
        if abs(offset - self._jumped_to) > _TOLERANCE_S:
            self._jumped_to, self._jumped_at = offset, now
        if now - self._jumped_at < self._hold_s:
            return f"the clock has jumped by {offset - self._trusted:+.0f} s"
        self._trusted = offset
        return ""

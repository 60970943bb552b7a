"""Whether the wall clock can be trusted where something is deleted for its age, which cannot be undone.

Two things speak against it. It has moved against the clock that counts seconds since the machine was booted: then
somebody set it, or something broke. Or the newest record lies far behind at the start: then the machine was off for
long, or its clock is wrong, and the two cannot be told apart. In both cases nothing expires for a while, in which a
clock that was wrong for a moment is put right; after that it is believed.
"""

import time
from collections.abc import Callable

_TOLERANCE_S = 60.0  # between two looks; a clock that is slewed or drifts moves far less
_LONG_S = 7 * 86400.0


def since_boot() -> float:
    """Seconds since the machine was booted, those included in which it slept, where the system tells them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Compares the wall clock with one that nobody sets. To be asked now and then: a jump is one between two looks."""

    def __init__(
        self, hold_s: float, wall: Callable[[], float] = time.time, steady: Callable[[], float] = since_boot
    ) -> None:
        self._hold_s = hold_s
        self._wall = wall
        self._steady = steady
        self._believed = wall() - steady()
        self._other = self._believed  # where it has jumped to
        self._since = steady()  # when it did
        self._held_until = steady()
        self._held_for = ""

    def started_after(self, newest: float | None) -> None:
        """Take note of when the newest record was made, at the start."""
        behind = 0.0 if newest is None else self._wall() - newest
        if behind > _LONG_S:
            self._held_until = self._steady() + self._hold_s
            self._held_for = f"the newest record is {behind / 86400:.0f} days old"

    def doubt(self) -> str:
        """Why nothing may expire just now; empty where it may."""
        now = self._steady()
        offset = self._wall() - now
        if abs(offset - self._believed) <= _TOLERANCE_S:
            self._believed = self._other = offset
            return self._held_for if now < self._held_until else ""
        if abs(offset - self._other) > _TOLERANCE_S:
            self._other, self._since = offset, now
        if now - self._since < self._hold_s:
            return f"the clock has jumped by {offset - self._believed:+.0f} s"
        self._believed = offset
        return ""

"""How long a request would wait at an engine, from its metrics (vLLM 0.32, `v1/metrics/loggers.py`)."""

import math
import re
import time

_RUNNING = re.compile(r"^vllm:num_requests_running(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_WAITING = re.compile(r"^vllm:num_requests_waiting(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_FINISHED = re.compile(r"^vllm:request_success_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_MAX_AGE_S = 30.0  # an older reading says nothing


class Queue:
    """The queue of one engine, as of the last reading, with what was sent there in place of another engine since."""

    def __init__(self) -> None:
        self.running: int | None = None  # requests that it computes; None if it does not say
        self.waiting = 0
        self._finished = -1.0
        self._read_at = -math.inf
        self._seconds_each = 0.0  # in which one request leaves the queue
        self._added = 0

    def read(self, metrics: str, now: float) -> None:
        """Take a reading; `now` as of `time.monotonic`. An answer that is none of vLLM's says that nothing waits."""
        running, finished = _total(_RUNNING, metrics), _total(_FINISHED, metrics)
        self.running = None if running is None else int(running)
        self.waiting = int(_total(_WAITING, metrics) or 0)
        passed = now - self._read_at
        if finished is not None and self._finished >= 0 and passed < _MAX_AGE_S:
            left = max(finished - self._finished, 0.0)
            # Where requests wait and none has ended, each takes at least as long as was looked.
            self._seconds_each = passed / left if left else passed if self.waiting else 0.0
        else:
            self._seconds_each = 0.0
        self._finished = -1.0 if finished is None else finished
        self._read_at, self._added = now, 0

    @property
    def requests(self) -> int | None:
        """Requests that it computes or that wait there; None if it does not say."""
        return None if self.running is None else self.running + self.waiting

    def wait_s(self) -> float:
        """Seconds that a new request would wait, about; 0 if that is not known."""
        ahead = self.waiting + self._added
        if not ahead or time.monotonic() - self._read_at > _MAX_AGE_S:
            return 0.0
        return ahead * self._seconds_each

    def add(self) -> None:
        """Count a request that goes there because of another engine's queue: the next one must not all follow it."""
        self._added += 1


def _total(pattern: re.Pattern[str], metrics: str) -> float | None:
    """The sum of a metric over its labels; None if there is none, or it cannot be read."""
    try:
        values = [float(value) for value in pattern.findall(metrics)]
    except ValueError:
        return None
    total = sum(values)
    return total if values and math.isfinite(total) and total >= 0 else None

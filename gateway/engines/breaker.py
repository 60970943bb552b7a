"""A circuit breaker: when an engine that does not answer is skipped, and for how long. Time is an argument."""

LIMIT = 3  # failures in a row
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0


class CircuitBreaker:
    """Counts failures in a row. After `LIMIT` it opens, for a time that doubles up to a bound with each failed trial.

    Then one request is let through, and another for each second without a response: a trial whose client disconnects
    must not keep the circuit open.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._backoff_level = 0
        self._until = 0.0
        self._on_trial = False

    @property
    def open(self) -> bool:
        """Whether it failed too often and has not answered since."""
        return self.failures >= LIMIT

    def allow_request(self, now: float) -> bool:
        """Whether a request may pass. If the circuit is open, that request is the trial."""
        if not self.open:
            return True
        if now < self._until:
            return False
        self._until = now + _FIRST_BACKOFF_S
        self._on_trial = True
        return True

    def failed(self, now: float) -> None:
        """Record a request without a response."""
        self.failures += 1
        if self.failures == LIMIT or self._on_trial:  # requests already in flight do not count
            self._until = now + min(_FIRST_BACKOFF_S * 2**self._backoff_level, _MAX_BACKOFF_S)
            self._backoff_level = min(self._backoff_level + 1, 16)
            self._on_trial = False

    def answered(self) -> None:
        """Record a response: close the circuit."""
        self.failures = self._backoff_level = 0
        self._until = 0.0
        self._on_trial = False

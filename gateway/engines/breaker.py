"""A circuit breaker: when an engine that does not answer is skipped, and for how long. Time is an argument."""

LIMIT = 3  # failures in a row
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 30.0


class CircuitBreaker:
    """Counts failures in a row. After `LIMIT` it opens for a time that doubles, up to a bound, with each vain trial.

    When the rest is over one request is let through, and another for each second that goes by without an answer: a
    trial whose client leaves must not keep the circuit open.
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
        """Whether a request may pass. Where it is open, that request is the trial."""
        if not self.open:
            return True
        if now < self._until:
            return False
        self._until = now + _FIRST_REST_S
        self._on_trial = True
        return True

    def failed(self, now: float) -> None:
        """A request got no answer."""
        self.failures += 1
        if self.failures == LIMIT or self._on_trial:  # those that were on their way say nothing new
            self._until = now + min(_FIRST_REST_S * 2**self._backoff_level, _LONGEST_REST_S)
            self._backoff_level = min(self._backoff_level + 1, 16)
            self._on_trial = False

    def answered(self) -> None:
        """A request got an answer: all is forgotten."""
        self.failures = self._backoff_level = 0
        self._until = 0.0
        self._on_trial = False

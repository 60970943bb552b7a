"""How long an engine that does not answer is skipped: pure arithmetic, with the time as an argument."""

import pytest

from gateway.engines.breaker import LIMIT, CircuitBreaker


def opened(at: float) -> CircuitBreaker:
    """A breaker that has just opened."""
    breaker = CircuitBreaker()
    for _ in range(LIMIT):
        breaker.failed(at)
    return breaker


def test_it_opens_after_the_limit_of_failures_in_a_row() -> None:
    breaker = CircuitBreaker()
    for count in range(1, LIMIT):
        breaker.failed(0)
        assert (breaker.open, breaker.failures, breaker.allow_request(0)) == (False, count, True)
    breaker.failed(0)
    assert (breaker.open, breaker.allow_request(0)) == (True, False)


def test_response_between_failures_resets_the_count() -> None:
    breaker = CircuitBreaker()
    for _ in range(5):
        breaker.failed(0)
        breaker.failed(0)
        breaker.answered()
    assert (breaker.open, breaker.failures) == (False, 0)


def test_after_the_backoff_one_request_a_second_is_allowed() -> None:
    breaker = opened(at=100)
    assert [breaker.allow_request(now) for now in (100.99, 101, 101, 101.5, 102, 102.1)] == [
        False, True, False, False, True, False,
    ]  # fmt: skip


def test_answered_trial_closes_it_and_resets_the_backoff() -> None:
    breaker = opened(at=0)
    for now in (1, 3, 7):  # each trial in vain
        assert breaker.allow_request(now)
        breaker.failed(now)
    assert breaker.allow_request(15)
    breaker.answered()
    assert not breaker.open
    for _ in range(LIMIT):
        breaker.failed(20)
    assert (breaker.allow_request(20.9), breaker.allow_request(21)) == (False, True)


def test_each_failed_trial_doubles_the_backoff_up_to_a_bound() -> None:
    breaker, now, rests = opened(at=0), 0.0, []
    for _ in range(100):
        began = now
        while not breaker.allow_request(now):
            now += 0.5
        rests.append(now - began)
        breaker.failed(now)
    assert rests[:7] == [1, 2, 4, 8, 16, 30, 30]
    assert rests[-1] == 30


@pytest.mark.parametrize("late", [1, 50])
def test_requests_in_flight_when_it_opens_do_not_extend_the_backoff(late: int) -> None:
    breaker = opened(at=0)
    for _ in range(late):
        breaker.failed(0.5)
    assert breaker.failures == LIMIT + late
    assert breaker.allow_request(1)

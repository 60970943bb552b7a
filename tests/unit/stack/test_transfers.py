"""The end of a request is passed to vLLM's scheduler once, and never before the load into its blocks is complete."""

from gateway.stack.transfers import Transfers


def step(transfers: Transfers, loaded: set[str], stored: set[str]) -> tuple[set[str], set[str]]:
    """What the scheduler gets of one step's reports."""
    return transfers.loads_done(loaded), transfers.stores_done(stored)


def aborted_while_loading() -> Transfers:
    transfers = Transfers()
    transfers.load_submitted("a")
    transfers.finished("a", delays_free=True)
    return transfers


def test_a_request_that_loads_runs_and_ends_is_passed_on_as_reported() -> None:
    transfers = Transfers()
    transfers.load_submitted("a")
    assert step(transfers, {"a"}, set()) == ({"a"}, set())
    transfers.finished("a", delays_free=True)
    assert step(transfers, set(), {"a"}) == (set(), {"a"})


def test_false_store_during_a_load_frees_no_blocks() -> None:
    transfers = aborted_while_loading()
    assert step(transfers, set(), {"a"}) == (set(), set())
    assert step(transfers, {"a"}, set()) == ({"a"}, set())


def test_aborted_request_that_ends_both_ways_at_once_ends_once() -> None:
    assert step(aborted_while_loading(), {"a"}, {"a"}) == ({"a"}, set())


def test_store_reported_after_the_request_ended_is_not_passed_on() -> None:
    transfers = aborted_while_loading()
    assert step(transfers, {"a"}, set()) == ({"a"}, set())
    assert step(transfers, set(), {"a"}) == (set(), set())


def test_an_abort_after_the_load_waits_for_the_store() -> None:
    transfers = Transfers()
    transfers.load_submitted("a")
    assert step(transfers, {"a"}, set()) == ({"a"}, set())  # the request waits to be scheduled
    transfers.finished("a", delays_free=True)
    assert step(transfers, set(), {"a"}) == (set(), {"a"})
    assert step(transfers, set(), {"a"}) == (set(), set())


def test_an_engine_that_stores_nothing_still_waits_for_the_load() -> None:
    transfers = Transfers()
    transfers.load_submitted("a")
    transfers.finished("a", delays_free=False)
    transfers.finished("b", delays_free=False)
    assert step(transfers, {"a"}, {"b"}) == ({"a"}, set())


def test_a_request_that_is_loaded_again_after_preemption_ends_with_its_second_load() -> None:
    transfers = Transfers()
    for _ in range(2):
        transfers.load_submitted("a")
        assert step(transfers, {"a"}, set()) == ({"a"}, set())
    transfers.load_submitted("a")
    transfers.finished("a", delays_free=True)
    assert step(transfers, set(), {"a"}) == (set(), set())
    assert step(transfers, {"a"}, set()) == ({"a"}, set())


def test_unknown_requests_are_not_passed_on() -> None:
    assert step(Transfers(), {"a"}, {"b"}) == (set(), set())

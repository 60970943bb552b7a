"""How long a request would wait at an engine, from two readings of its metrics."""

import time

import pytest

from gateway.engines.queue import Queue


def metrics(running: float, waiting: float, finished: float) -> str:
    """What vLLM 0.32 writes, with labels, and the reasons for waiting beside it."""
    label = '{engine="0",model_name="m"}'
    return "\n".join(
        [
            f"vllm:num_requests_running{label} {running}",
            f"vllm:num_requests_waiting{label} {waiting}",
            'vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 99.0',
            f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="m"}} {finished - 1}',
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 1.0',
            'vllm:request_success_created{engine="0",finished_reason="stop",model_name="m"} 1.7e+09',
        ]
    )


def read_twice(first: str, second: str, passed: float = 4.0) -> Queue:
    """A queue that was read now and `passed` seconds ago."""
    queue, now = Queue(), time.monotonic()
    queue.read(first, now - passed)
    queue.read(second, now)
    return queue


def test_a_request_waits_for_all_that_wait_before_it() -> None:
    queue = read_twice(metrics(2, 0, 10), metrics(2, 6, 18))
    assert (queue.running, queue.waiting, queue.requests) == (2, 6, 8)
    assert queue.wait_s() == pytest.approx(6 * 4 / 8)


def test_a_queue_that_does_not_move_takes_as_long_as_was_looked() -> None:
    assert read_twice(metrics(2, 3, 10), metrics(2, 3, 10)).wait_s() == pytest.approx(3 * 4)


def test_nothing_waits_where_nothing_is_known() -> None:
    assert Queue().wait_s() == 0
    once = Queue()
    once.read(metrics(2, 6, 10), time.monotonic())
    assert once.wait_s() == 0, "one reading has no rate"
    for text in ("", "<html>", "vllm:num_requests_waiting x", "vllm:num_requests_waiting NaN", "a 1"):
        queue = read_twice(metrics(2, 6, 10), text)
        assert (queue.wait_s(), queue.requests) == (0, None)


def test_an_old_reading_says_nothing() -> None:
    queue, now = Queue(), time.monotonic()
    queue.read(metrics(2, 6, 10), now - 64)
    queue.read(metrics(2, 6, 18), now - 60)
    assert queue.wait_s() == 0
    queue.read(metrics(2, 6, 19), now)
    assert queue.wait_s() == 0, "the engine may have restarted in between"


def test_what_is_sent_in_place_of_another_counts_until_the_next_reading() -> None:
    queue = read_twice(metrics(2, 1, 10), metrics(2, 1, 14))
    assert queue.wait_s() == pytest.approx(1)
    queue.add()
    queue.add()
    assert queue.wait_s() == pytest.approx(3)
    queue.read(metrics(2, 1, 18), time.monotonic())
    assert queue.wait_s() < 1

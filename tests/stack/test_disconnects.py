"""A client that leaves frees the engine within a second: seen in the engine's own metrics, every time."""

from collections.abc import Iterator

import pytest

from loadtests.leaving import WAYS, Gauge, Way, leave
from tests.stack.conftest import Stack
from tests.stack.drive import Gateway

pytestmark = pytest.mark.stack

_TIMES = 3  # for each way; `make bench-disconnects` does 200 in all


@pytest.fixture
def gauge(stack: Stack) -> Iterator[Gauge]:
    with Gauge(stack.plan.engine_url) as gauge:
        yield gauge


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_client_that_leaves_frees_the_engine_within_a_second(shared: Gateway, gauge: Gauge, way: Way) -> None:
    names = [f"left-{WAYS.index(way)}-{time}" for time in range(_TIMES)]
    took = [leave(shared.url, name, way, gauge) for name in names]
    assert max(took) < 1, took
    for name in names:
        (turn,) = shared.http.get(f"/admin/sessions/{name}").json()["turns"]
        assert turn["outcome"] == "client_gone"

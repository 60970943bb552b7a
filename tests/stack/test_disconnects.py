"""A client that leaves frees the engine: seen in the engine's own metrics. `make bench-disconnects` tells how soon."""

import re
from collections.abc import Iterator

import pytest

from loadtests.leaving import REPLY_TOKENS, WAYS, Gauge, Way, leave
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway

pytestmark = pytest.mark.stack

_TIMES = 3  # for each way
_GENERATED = re.compile(r"^vllm:generation_tokens_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@pytest.fixture
def gauge(stack: Stack) -> Iterator[Gauge]:
    with Gauge(stack.plan.engine_url) as gauge:
        yield gauge


def generated(stack: Stack) -> float:
    """Tokens that the engine has written, all in all."""
    found = _GENERATED.findall(stack.engine.get("/metrics").text)
    assert found, "the engine's metrics have no vllm:generation_tokens_total"
    return sum(map(float, found))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_client_that_leaves_frees_the_engine(stack: Stack, shared: Gateway, gauge: Gauge, way: Way) -> None:
    names = [f"left-{WAYS.index(way)}-{time}" for time in range(_TIMES)]
    before = generated(stack)
    for name in names:
        leave(shared.url, name, way, gauge)  # returns when the engine works on nothing
    assert 0 <= generated(stack) - before < REPLY_TOKENS, "not one reply was written to its end"
    for name in names:
        (turn,) = shared.http.get(f"/admin/sessions/{name}").json()["turns"]
        assert turn["outcome"] == "client_gone"

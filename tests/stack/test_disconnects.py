"""A client that disconnects frees the engine, as its own metrics show. `make bench-disconnects` measures how soon."""

import re
from collections.abc import Iterator

import pytest

from loadtests.disconnect_probe import REPLY_TOKENS, WAYS, Gauge, Way, disconnect
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
def test_a_client_that_disconnects_frees_the_engine(stack: Stack, shared: Gateway, gauge: Gauge, way: Way) -> None:
    names = [f"left-{WAYS.index(way)}-{time}" for time in range(_TIMES)]
    before = generated(stack)
    for name in names:
        disconnect(shared.url, name, way, gauge)  # returns when the engine is idle
    assert 0 <= generated(stack) - before < REPLY_TOKENS, "not one reply was written to its end"
    for name in names:
        (turn,) = shared.http.get(f"/admin/sessions/{name}").json()["turns"]
        assert turn["outcome"] == "client_gone"

"""Windows and caches that tests of several files use."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.admin_requests import freeze
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.node_pairs import Pair, Start, entries, pairs, states


@pytest.fixture
def window(gateway: Gateway, session: str) -> str:
    """A window of two messages, without KV."""
    freeze(gateway, session, f"w-{session}", description="first", tags=["a", "b"], ttl_seconds=3600)
    return f"w-{session}"


@pytest.fixture
def fake_cache(engine: FakeEngine, tmp_path: Path) -> Iterator[FakeLMCache]:
    """An LMCache that keeps what the engine computes."""
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    yield cache
    cache.stop()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Pair]]:
    """Two nodes."""
    with pairs(tmp_path) as made:
        yield made


@pytest.fixture
def start(nodes: list[Pair], tmp_path: Path) -> Iterator[Start]:
    """Starts a ready gateway in front of the nodes, which has tested them."""
    with ExitStack() as stack:

        def begin(engines: str = "", **settings: object) -> Gateway:
            given = {"engines": engines or entries(nodes), "kv_dir": tmp_path / "kv", "engine_check_s": 0.2, **settings}
            gateway = stack.enter_context(gateway_in_front_of("", tmp_path, **given))
            eventually(lambda: all(state == "healthy" for state in states(gateway).values()), "all are healthy")
            return gateway

        yield begin

"""Several fake engines, and a gateway in front of them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.engine_pool import Before
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    """Three fake engines, which a test may stop."""
    started = [FakeEngine().start() for _ in range(3)]
    yield started
    for engine in started:
        if engine.listening:
            engine.stop()


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Before]:
    """Starts a ready gateway in front of engines, probing them often."""
    with ExitStack() as stack:

        def start(*engines: FakeEngine | str, **settings: object) -> Gateway:
            urls = ",".join(engine if isinstance(engine, str) else engine.url for engine in engines)
            return stack.enter_context(gateway_in_front_of(urls, tmp_path, **{"engine_check_s": 0.2, **settings}))

        yield start

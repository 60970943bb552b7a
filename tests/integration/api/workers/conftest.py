"""Gateways of several workers."""

from collections.abc import Iterator

import pytest

from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway
from tests.support.worker_crew import crew


@pytest.fixture(scope="module")
def shared_crew(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Started once, for the tests that kill no worker."""
    with crew(shared_engine, tmp_path_factory.mktemp("crew"), busy_wait_s=0.5) as gateway:
        yield gateway


@pytest.fixture
def gateway(engine: FakeEngine, shared_crew: Gateway) -> Gateway:
    """The shared gateway of several workers."""
    return shared_crew

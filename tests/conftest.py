"""One fake engine and one gateway before it, for all tests that leave both as they found them."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.fakes.engine import FakeEngine
from tests.houses import House, cache_server, opened
from tests.rigs import RedisServer
from tests.running import Gateway, gateway_before


class OneForTheStack(LoadScopeScheduling):  # type: ignore[misc]
    """Where tests run in several processes: all that share a vLLM in one of them, the others by files."""

    def _split_scope(self, nodeid: str) -> str:
        return "stack" if nodeid.startswith("tests/stack/") else nodeid.partition("::")[0]


def pytest_configure() -> None:
    """Let engines leave half of the cores to the tests: threads that wait for each other share a core badly."""
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // 2, 1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneForTheStack:
    """Not by marks: xdist 3.8 tells of their groups in a field that items of pytest 9.2 no longer have."""
    return OneForTheStack(config, log)


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[FakeEngine]:
    """The engine behind the shared gateway; tests ask for `engine`."""
    engine = FakeEngine().start()
    yield engine
    engine.stop()


@pytest.fixture
def engine(shared_engine: FakeEngine) -> FakeEngine:
    """The engine as it is by default, with nothing seen yet."""
    shared_engine.reset()
    return shared_engine


@pytest.fixture(scope="session")
def shared_gateway(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Started once; tests ask for `gateway`."""
    with gateway_before(shared_engine.url, tmp_path_factory.mktemp("shared"), busy_wait_s=0.5) as gateway:
        yield gateway


@pytest.fixture
def gateway(engine: FakeEngine, shared_gateway: Gateway) -> Gateway:
    """The shared gateway, before an engine as it is by default."""
    return shared_gateway


@pytest.fixture
def session() -> str:
    """A session that no other test uses."""
    return f"s-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs the `async def` tests: the loop that the gateway runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for all tests that neither stop nor configure it; whoever takes it empties it."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cache() -> Iterator[str]:
    """The URL of what the parts of a house ask for LMCache."""
    with cache_server() as url:
        yield url


@pytest.fixture
async def house(engine: FakeEngine, cache: str, redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[House]:
    """A gateway's parts over empty tiers."""
    async with opened(engine, cache, redis_server, tmp_path) as house:
        yield house

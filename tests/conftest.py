"""One fake engine and one gateway in front of it, for all tests that leave both as they found them."""

import fcntl
import os
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support import postgres
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import ROOT, Gateway, gateway_in_front_of
from tests.support.harness import GatewayHarness, cache_server, open_harness
from tests.support.postgres import PostgresServer
from tests.support.s3_harness import S3Server
from tests.support.tier_harness import RedisServer


class StackInOneWorker(LoadScopeScheduling):  # type: ignore[misc]
    """Run the tests on the real stack in one xdist worker, so that one vLLM runs at a time; the others file by file."""

    def _split_scope(self, nodeid: str) -> str:
        return "stack" if nodeid.startswith(_ON_STACK) else nodeid.partition("::")[0]


STACK_WITHIN_S = 1200
"""The time limit of a test on the real stack: the first one also waits for vLLM to start, and perhaps to restart."""
_OPEN_FILES = 8192
_ON_STACK = ("tests/stack/", "tests/integration/stack/test_up.py", "tests/integration/stack/test_up_tiers.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--store postgres`: every gateway that a test starts has its store there, unless the test is about SQLite."""
    parser.addoption(
        "--store", choices=("sqlite", "postgres"), default="sqlite", help="where gateways have their stores"
    )


def pytest_configure() -> None:
    """Prepare what the processes that tests start inherit."""
    # Engines leave half of the cores to the tests: threads that wait for each other share a core badly.
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // 2, 1))
    # Ignored if a shell runs the tests in the background, and then by every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _raise_open_files()
    # Neither says anything about what is tested, only about the machine.
    settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any-machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests on the real stack more time than `timeout` in pyproject.toml; skip what is not installed.

    The stack tests come first: they are half of the run and cannot be divided. The xdist worker that has none of them
    takes the other files from the front, and both share what is left when the stack tests end.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(_ON_STACK))
    not_installed = pytest.mark.skip(reason="needs vLLM and LMCache: install the extra `local` or `gpu` too")
    installed = all(find_spec(name) for name in ("vllm", "lmcache"))
    about_sqlite = pytest.mark.skip(reason="is about the SQLite file: run it without --store postgres")
    for item in items:
        if item.get_closest_marker("sqlite") and item.config.getoption("--store") != "sqlite":
            item.add_marker(about_sqlite)
        on_stack = item.get_closest_marker("stack")
        if on_stack:
            item.add_marker(pytest.mark.timeout(STACK_WITHIN_S))
        if not installed and (on_stack or item.get_closest_marker("local")):
            item.add_marker(not_installed)


def _raise_open_files() -> None:
    """A shell often allows 1,024 open files; both ends of 1,000 streams are in the process of the tests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Spell out half surrogate pairs in what a test logged: a worker of xdist cannot send them, and would crash."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> StackInOneWorker:
    """Not by marks: xdist 3.8 reports their groups in a field that items of pytest 9.2 no longer have."""
    return StackInOneWorker(config, log)


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[FakeEngine]:
    """The engine behind the shared gateway; tests ask for `engine`."""
    engine = FakeEngine().start()
    yield engine
    engine.stop()


@pytest.fixture
def engine(shared_engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine with its defaults and no request seen; reset again for a gateway that starts in front of it later."""
    shared_engine.reset()
    yield shared_engine
    shared_engine.reset()


@pytest.fixture(scope="session")
def shared_gateway(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Started once; tests ask for `gateway`."""
    with gateway_in_front_of(shared_engine.url, tmp_path_factory.mktemp("shared"), busy_wait_s=0.5) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def shared_gateway_on_postgres(
    shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """The same with its store on PostgreSQL, for tests on `each_store`."""
    with gateway_in_front_of(shared_engine.url, tmp_path_factory.mktemp("shared-pg"), busy_wait_s=0.5) as gateway:
        yield gateway


@pytest.fixture
def gateway(engine: FakeEngine, request: pytest.FixtureRequest) -> Gateway:
    """The shared gateway, in front of an engine with its defaults."""
    on_postgres = "shared_gateway_on_postgres" if postgres.VARIABLE in os.environ else "shared_gateway"
    shared: Gateway = request.getfixturevalue(on_postgres)
    return shared


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
    """A Redis for all tests that neither stop nor configure it; each of them empties it first."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL for all tests that neither stop nor configure it; each of them has a database of its own."""
    if postgres.binaries() is None:
        pytest.skip(postgres.MISSING)
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The address of an empty database."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop(url)


@pytest.fixture(scope="session", autouse=True)
def _store_of_the_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """What `--store` says."""
    if request.config.getoption("--store") == "sqlite":
        yield
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(postgres.VARIABLE, server.url())
        yield


@pytest.fixture(scope="module", autouse=True)
def _stores_of_the_module() -> Iterator[None]:
    """Those that gateways of its tests had on PostgreSQL are deleted after it."""
    yield
    if server := os.environ.get(postgres.VARIABLE):
        postgres.drop_own_databases(server)


@pytest.fixture(params=["sqlite", "postgres"])
def each_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gateways of the test have their stores on one database, then on the other."""
    if request.param == "sqlite":
        monkeypatch.delenv(postgres.VARIABLE, raising=False)
        yield
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    monkeypatch.setenv(postgres.VARIABLE, server.url())
    yield
    if request.config.getoption("--store") == "sqlite":  # else another gateway of the module may have one
        postgres.drop_own_databases(server.url())


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for all tests that do not stop it; each of them empties it first."""
    server = S3Server(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cache() -> Iterator[str]:
    """The URL of the fake LMCache of the harnesses."""
    with cache_server() as url:
        yield url


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small demo model, built once for all tests that only read or copy it, whichever xdist worker runs them."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "models" / "demo-small"
    folder.parent.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "gateway.stack.demo_model", str(folder), "--size", "small"]
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
async def harness(
    engine: FakeEngine, cache: str, redis_server: RedisServer, tmp_path: Path
) -> AsyncIterator[GatewayHarness]:
    """A gateway's services over empty tiers."""
    async with open_harness(engine, cache, redis_server, tmp_path) as harness:
        yield harness

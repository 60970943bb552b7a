"""A gateway that is traced, and its collector."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.collector import Collector, collector
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.gateway_process import Gateway, gateway_in_front_of


@dataclass
class Traced:
    """A gateway, the cache behind it, and where its spans go."""

    gateway: Gateway
    collector: Collector
    cache: FakeLMCache


@dataclass
class Parent:
    """A span of a client."""

    trace: str
    span: str

    def header(self, flags: str = "01") -> dict[str, str]:
        """The header of a request that is a part of it."""
        return {"traceparent": f"00-{self.trace}-{self.span}-{flags}"}


@pytest.fixture
def parent() -> Parent:
    """A span of a client."""
    return Parent(secrets.token_hex(16), secrets.token_hex(8))


@pytest.fixture(scope="module")
def traced_module(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Started once; tests ask for `traced`."""
    folder = tmp_path_factory.mktemp("traced")
    cache = FakeLMCache(folder / "kv").start()
    with collector() as spans:
        settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_BSP_SCHEDULE_DELAY": 50,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "cache_url": cache.url,
            "kv_dir": folder / "kv",
            "busy_wait_s": 0.5,
        }
        with gateway_in_front_of(shared_engine.url, folder, **settings) as gateway:
            yield Traced(gateway, spans, cache)
    cache.stop()


@pytest.fixture
def traced(engine: FakeEngine, traced_module: Traced) -> Traced:
    """A gateway that records every trace, in front of an engine with its defaults and a cache that keeps its KV."""
    traced_module.cache.behind(engine)
    return traced_module


StartTraced = Callable[..., Gateway]


@pytest.fixture
def start_traced(engine: FakeEngine, tmp_path: Path) -> Iterator[StartTraced]:
    """Starts a gateway with these variables of OpenTelemetry and these settings."""
    with ExitStack() as stack:

        def start(variables: dict[str, str], **settings: object) -> Gateway:
            given = {"BSP_SCHEDULE_DELAY": "50", **variables}
            otel = {f"OTEL_{name}": value for name, value in given.items()}
            return stack.enter_context(gateway_in_front_of(engine.url, tmp_path, **otel, **settings))

        yield start

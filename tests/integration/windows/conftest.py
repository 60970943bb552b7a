"""Windows and caches that tests of several files use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.admin_requests import freeze
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.gateway_process import Gateway


@pytest.fixture
def window(gateway: Gateway, session: str) -> str:
    """A window of two messages, without KV."""
    freeze(gateway, session, f"w-{session}", description="first", tags=["a", "b"], ttl_seconds=60)
    return f"w-{session}"


@pytest.fixture
def fake_cache(engine: FakeEngine, tmp_path: Path) -> Iterator[FakeLMCache]:
    """An LMCache that keeps what the engine computes."""
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    yield cache
    cache.stop()

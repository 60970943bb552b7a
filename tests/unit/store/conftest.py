"""The store under test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.store.sqlite import SqliteStore
from gateway.store.store import Store
from tests.support.store_records import Open


@pytest.fixture(params=["sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store each time it is called."""
    assert request.param == "sqlite"
    return lambda: SqliteStore(tmp_path / "gateway.db", turns_kept=5)


@pytest.fixture
async def store(open_store: Open) -> AsyncIterator[Store]:
    async with open_store() as store:
        yield store

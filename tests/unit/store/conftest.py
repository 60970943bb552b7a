"""The store under test, on each database. `only_sqlite` is for tests that open its file, or are about it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.store.postgres.connections import Server
from gateway.store.postgres.store import PostgresStore
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Store
from tests.support.store_records import Open


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store each time it is called."""
    if request.param == "sqlite":
        yield lambda: SqliteStore(tmp_path / "gateway.db", turns_kept=5)
        return
    url = request.getfixturevalue("postgres_url")
    yield lambda: PostgresStore(Server(url), turns_kept=5)


@pytest.fixture
async def store(open_store: Open) -> AsyncIterator[Store]:
    async with open_store() as store:
        yield store

"""A store with a damaged page: `doctor` finds it, and whatever reads that page reports it."""

import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway.records import Alias
from gateway.store.failures import StoreDamaged, find_damage
from gateway.store.sqlite import SqliteStore
from tests.integration.api.test_server import DEAD, assert_one_clear_line, serve
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import free_port, gateway_in_front_of

pytestmark = pytest.mark.sqlite

_ALIAS = Alias(b"link", b"history", b"question", b"")


def garbled(store: Path, table: str) -> None:
    """Write garbage over the first page of a table."""
    with sqlite3.connect(store) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    with store.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)


def test_doctor_reports_a_damaged_page(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat(session)
        gateway.turns(session)

        def store_check() -> dict[str, str]:
            checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
            (found,) = [check for check in checks if check["name"] == "store"]
            return dict(found)

        assert store_check()["status"] == "ok"
        garbled(gateway.data_dir / "gateway.db", "window_tags")
        found = store_check()
        assert found["status"] == "failed"
        assert "the store is damaged" in found["message"]
        assert ".recover" in found["remedy"]


def test_file_that_is_no_store_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "gateway.db").write_bytes(b"not a database" * 1000)
    assert find_damage(tmp_path / "gateway.db") == ["file is not a database"]
    assert find_damage(tmp_path / "none.db") == ["unable to open database file"]


@pytest.mark.anyio
@pytest.mark.parametrize("table", ["sqlite_autoindex_objects_1", "meta"])
async def test_gateway_refuses_to_start_on_a_damaged_store(tmp_path: Path, table: str) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5):
        pass
    garbled(tmp_path / "gateway.db", table)
    ended = serve(port=free_port(), engine_urls=DEAD, data_dir=tmp_path)
    assert_one_clear_line(ended, "malformed", "restore the store from a copy", ".recover", "cwg doctor")


@pytest.mark.anyio
async def test_read_of_a_damaged_page_is_reported(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5) as store:
        garbled(tmp_path / "gateway.db", "sqlite_autoindex_objects_1")
        with pytest.raises(StoreDamaged) as told:
            await store.held_objects()
        assert ".recover" in told.value.hint
        assert await store.list_sessions("default", state=None, model=None, limit=5, offset=0) == ([], 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("page", "read"),
    [
        ("sessions", lambda store: store.session("default", "s")),
        ("sqlite_autoindex_windows_1", lambda store: store.window("default", "w")),
        ("session_prefixes", lambda store: store.sessions_by_prefix("default", [b"x"])),
        ("reply_aliases", lambda store: store.sessions_by_reply_alias("default", [_ALIAS])),
    ],
)
async def test_point_read_of_a_damaged_page_is_reported(
    tmp_path: Path, page: str, read: Callable[[SqliteStore], Awaitable[object]]
) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5):
        pass
    garbled(tmp_path / "gateway.db", page)
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5) as store:
        with pytest.raises(StoreDamaged):
            await read(store)


def test_request_for_a_damaged_page_gets_a_remedy(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat(session)
        gateway.turns(session)
        assert gateway.stop() == 0
        garbled(gateway.data_dir / "gateway.db", "sessions")
        gateway.start().wait("/healthz")
        response = gateway.chat(session)
        assert response.status_code == 500
        assert "is damaged: database disk image is malformed" in response.json()["error"]["message"]
        assert ".recover" in response.json()["error"]["message"]
        assert "completions' failed" not in gateway.log

"""Titles of sessions and windows, and how those of an older store are filled in."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from msgspec import structs

from gateway.records import Session
from gateway.store import transcript_rows
from gateway.store.database import finish
from gateway.store.schema import MIGRATIONS
from gateway.store.sqlite import SqliteStore
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.types import Text
from tests.support.store_records import TENANT, add, finished, says

pytestmark = pytest.mark.anyio


async def title_of_session(store: Store, name: str) -> str | None:
    session = await store.session(TENANT, name)
    assert session is not None
    return session.title


async def test_session_has_the_title_of_its_transcript(store: Store) -> None:
    await store.record([finished("s", None)])
    assert await title_of_session(store, "s") is None
    await store.record([finished("s", says("What is this?", "a"))])
    assert await title_of_session(store, "s") == "What is this?"
    await store.record([finished("s", None), finished("s", says("What is this?", "a", "And that?", "b"))])
    assert await title_of_session(store, "s") == "What is this?"
    await store.record([finished("s", says("Edited", "a"))])
    assert await title_of_session(store, "s") == "Edited"


async def test_successor_keeps_the_title_of_the_conversation(store: Store) -> None:
    await store.add_sessions([Session(TENANT, "s.2", "s", source="successor", title="Old")])
    await store.record([finished("s.2", says("in the middle", "a"))])
    assert await title_of_session(store, "s.2") == "Old"


async def test_window_has_the_title_of_its_session_or_text(store: Store) -> None:
    imported = await add(store, "imported", text=Text(says("from a file", "a")))
    assert imported.title == "from a file"
    await store.record([finished("s", says("kept turns", "a"))])
    session = await store.session(TENANT, "s")
    assert session is not None
    frozen = await add(
        store, "frozen", text=Text(says("kept turns", "a")), session=structs.replace(session, title="Old")
    )
    assert (await store.window(TENANT, "frozen")) == frozen
    assert frozen.title == "Old"
    copied = await store.copy_window(replace(frozen, name="copy"), frozen, None)
    assert copied is not None
    assert copied.title == "Old"


def old_store(path: Path, sessions: int) -> None:
    """A store of the schema before titles, with sessions and windows of two tenants."""
    with closing(sqlite3.connect(path)) as db:
        for statement in chain(*MIGRATIONS[:16]):
            db.execute(statement)
        db.execute("PRAGMA user_version = 16")
        db.execute("INSERT INTO manifests VALUES ('m', x'')")
        for number in range(sessions):
            link = finish(transcript_rows.add(SqliteDb(db), says(f"question {number}", "a")))
            tenant = f"t{number % 2}"
            db.execute(
                """INSERT INTO sessions (tenant, id, lineage, model, fingerprint, salt, state, token_count, turn_count,
                    created_at, last_active_at, transcript) VALUES (?, ?, 'l', '', '', '', 'active', 1, 1, 1, 2, ?)""",
                (tenant, f"s{number}", link),
            )
            db.execute(
                """INSERT INTO windows VALUES (?, ?, 's', 'l', '', 'm', '', '', 1, 1, 1, 0, 0, 'absent', ?, NULL, 'm',
                    1, '', '[]', NULL, NULL, '{}', '')""",
                (tenant, f"w{number}", link),
            )
        db.execute(
            """INSERT INTO sessions (tenant, id, lineage, model, fingerprint, salt, state, token_count, turn_count,
                created_at, last_active_at) VALUES ('t0', 'empty', 'l', '', '', '', 'active', 0, 0, 1, 2)"""
        )
        db.commit()


@pytest.mark.parametrize("count", [0, 1, 19, 20, 45])
async def test_titles_of_an_older_store_are_filled_in(tmp_path: Path, count: int) -> None:
    path = tmp_path / "gateway.db"
    old_store(path, count)
    async with SqliteStore(path, turns_kept=5) as store:
        await store.record([finished("new", says("meanwhile", "a"), tenant="t0")])
        await store.fill_in_titles()
        await store.fill_in_titles()
        for number in range(count):
            session = await store.session(f"t{number % 2}", f"s{number}")
            window = await store.window(f"t{number % 2}", f"w{number}")
            assert session is not None
            assert window is not None
            assert session.title == window.title == f"question {number}"
        assert (await store.session("t0", "new")).title == "meanwhile"  # type: ignore[union-attr]
        assert (await store.session("t0", "empty")).title is None  # type: ignore[union-attr]


async def test_filling_in_continues_where_it_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    old_store(path, 45)
    async with SqliteStore(path, turns_kept=5) as store:
        assert await store._fill_in_some(20)
    async with SqliteStore(path, turns_kept=5) as one, SqliteStore(path, turns_kept=5) as other:
        await one.fill_in_titles()
        await other.fill_in_titles()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM windows WHERE title IS NULL").fetchone() == (0,)
        assert db.execute("SELECT id FROM sessions WHERE title IS NULL").fetchall() == [("empty",)]
        assert db.execute("SELECT 1 FROM meta WHERE name = 'untitled'").fetchone() is None

"""How much a search reads: a word may be in every message, and a message at the beginning of every conversation."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.dialects.search_text import Search
from gateway.store import holder_rows, search_rows
from gateway.store.database import Db
from gateway.store.holder_rows import Holders
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.transcript_rows import _content
from gateway.store.types import Text, WindowQuery
from tests.support.store_records import TENANT, add, finished, only_sqlite, says

pytestmark = pytest.mark.anyio


class CountingDb:
    """Counts the statements of an operation that read links, and the rows that they return."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self.statements = self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    async def one(self, sql: str, *args: object) -> Any:
        self.statements += "links" in sql
        return await self._db.one(sql, *args)

    async def all(self, sql: str, *args: object) -> list[Any]:
        rows = await self._db.all(sql, *args)
        if "links" in sql:
            self.statements += 1
            self.rows += len(rows)
        return rows


async def counted(store: Store, operation: Any) -> tuple[Any, CountingDb]:
    """What an operation returns, and what it has read."""

    async def run(db: Db) -> tuple[Any, CountingDb]:
        counting = CountingDb(db)
        return await operation(counting), counting

    return await store.run_read(run)


async def indexed(store: Store) -> None:
    while await store._index_some(200):
        pass


async def test_a_word_of_every_message_is_followed_through_a_conversation_a_few_times(store: Store) -> None:
    length = 800
    talk = says(*(f"common word, message {number}" for number in range(length)))
    await store.record([finished("long", talk)])
    await add(store, "whole", text=Text(talk))
    await add(store, "half", text=Text(talk[: length // 2]))
    await indexed(store)
    wanted = Search("common")
    (found, _), read = await counted(store, lambda db: search_rows.search(db, TENANT, wanted, 20))
    assert {(one.kind, one.name) for one in found} == {("window", "whole"), ("window", "half"), ("session", "long")}
    assert read.statements < 10
    assert read.rows < 5 * length
    best, read = await counted(store, lambda db: search_rows.best_windows(db, TENANT, wanted, 5, 0.0))
    assert best
    assert read.statements < 10
    listed, read = await counted(store, lambda db: search_rows.search_windows(db, TENANT, WindowQuery(search="common")))
    assert [window.name for window, _ in listed.windows] == ["half", "whole"]
    assert [match.message for match in listed.matches] == [length // 2 - 1, length - 1]
    assert read.statements < 10


async def branches(store: Store, count: int) -> bytes:
    """Conversations that begin with the same message, each with a window; return that message's content."""
    first = says("You are the assistant of Zephyr.")
    for number in range(count):
        talk = first + says("-", f"question {number}", f"answer {number}")[1:]
        await store.record([finished(f"s{number}", talk, at=100.0 + number)])
        await add(store, f"w{number:03}", text=Text(talk), created_at=float(number))
    return _content(first[0])[0]


async def test_the_newest_are_found_where_there_are_too_many(store: Store) -> None:
    content = await branches(store, 60)

    async def holders(db: Db) -> tuple[list[str], bool]:
        few = Holders(db, TENANT, links=100)
        return [holder.name for holder, depth in (await few.of([content]))[content] if depth == 0], few.complete

    names, complete = await store.run_read(holders)
    assert not complete
    assert names[:2] == ["w059", "w058"]
    assert len(names) >= 2 * holder_rows._NEWEST
    assert "s59" in names
    everything = await store.run_read(lambda db: Holders(db, TENANT).of([content]))
    assert len(everything[content]) == 120


@only_sqlite
async def test_sqlite_stops_following_at_the_limit(store: Store) -> None:
    talk = says(*(f"message {number}" for number in range(1000)))
    await store.record([finished("long", talk)])
    content = _content(talk[0])[0]

    async def steps(db: Db, links: int) -> int:
        assert isinstance(db, SqliteDb)
        count = 0

        def another() -> int:
            nonlocal count
            count += 1
            return 0

        db.connection.set_progress_handler(another, 100)
        await db.all(holder_rows._DOWN.format(contents="?3"), TENANT, links, content)
        db.connection.set_progress_handler(None, 0)
        return count

    few, many = await store.run_read(lambda db: steps(db, 20)), await store.run_read(lambda db: steps(db, 2000))
    assert few * 10 < many


@pytest.mark.parametrize("open_store", ["postgres"], indirect=True)
async def test_postgres_stops_following_at_the_limit(store: Store) -> None:
    content = await branches(store, 300)
    query = f"EXPLAIN (ANALYZE, FORMAT JSON) {holder_rows._DOWN.format(contents='?3')}"
    ((plan,),) = await store.run_read(lambda db: db.all(query, TENANT, 20, content))
    nodes = list(every_node(json.loads(plan)[0]["Plan"]))
    assert max(node["Actual Rows"] for node in nodes if node["Node Type"] == "Recursive Union") <= 21
    # Each link is looked up, whatever the size of the table.
    assert not [node for node in nodes if node.get("Relation Name") == "links" and node["Node Type"] == "Seq Scan"]


def every_node(plan: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return [plan, *(node for part in plan.get("Plans", []) for node in every_node(part))]

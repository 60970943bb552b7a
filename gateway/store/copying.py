"""Copy everything that a store has into another one, on either database. The full-text index is made anew there.

Ids stay the same, the store's own among them: the pins of its windows are kept under it.
"""

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

from gateway.errors import StartError
from gateway.store import schema
from gateway.store.database import Db, Work
from gateway.store.sql import columns, get_meta, marks, set_meta
from gateway.store.store import Store

_ROWS = 500  # at once
_BODIES = 50  # contents and manifests, which may have megabytes each
_INDEX = frozenset({"searchable", "meta"})  # made anew, and copied by name
_LARGE = frozenset({"contents", "manifests"})
_UNFINISHED = "copying"  # in `meta` of a target until it has everything
_OWN = frozenset(
    {"schema", "schema_needed", "searchable", "checked_at", _UNFINISHED}
)  # names in `meta` that say something about one store only
_BOOLEAN = frozenset({"answered", "instructed", "unbooked"})  # SQLite has numbers for them


class _Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    is_numbered: bool


def tables() -> list[_Table]:
    """The tables that are copied, each after those that it refers to."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        schema.migrate(db)
        names = [
            name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if name not in _INDEX and not name.startswith("sqlite_")
        ]  # fmt: skip
        order = TopologicalSorter(
            {name: {row[2] for row in db.execute(f"PRAGMA foreign_key_list({name})")} for name in names}
        ).static_order()
        found = {name: _table(name, db.execute(f"PRAGMA table_info({name})").fetchall()) for name in names}
    # A window is only added after its text (`schema`).
    return sorted((found[name] for name in order), key=lambda table: table.name not in {"contents", "links"})


def _table(name: str, info: Sequence[Sequence[Any]]) -> _Table:
    key = tuple(column for _, column, *_, rank in sorted(info, key=lambda row: row[5]) if rank)
    names = tuple(row[1] for row in info)
    is_numbered = any(row[2] == "INTEGER" and row[5] == 1 for row in info) and len(key) == 1
    return _Table(name, names, key or names[:1], is_numbered)


async def copy(source: Store, target: Store, report: Callable[[str, int], None] = lambda _, __: None) -> None:
    """Copy all of a store that nobody writes to; `report` is told each table and its rows.

    Raises StartError if the target is not empty, or the source an unfinished copy itself.
    """
    await check_finished(source)
    every = tables()
    for table in every:
        if await target.run_read(_count(table.name)):
            raise StartError(
                f"the target is not empty: it has rows in {table.name}; copy into a new database "
                "(after a copy that was interrupted: drop it, and create it again)"
            )
    await target.run_write(lambda db: set_meta(db, _UNFINISHED, "1"))
    for table in every:
        rows = 0
        async for page in _pages(source, table):
            await target.run_write(_insert(table, page))
            rows += len(page)
        report(table.name, rows)
    values = await source.run_read(lambda db: db.all("SELECT name, value FROM meta"))
    kept = [row for row in values if row[0] not in _OWN]
    await target.run_write(_set_meta(kept))
    await target.numbers_given([(table.name, table.key[0]) for table in every if table.is_numbered])
    await target.run_write(lambda db: set_meta(db, _UNFINISHED, None))


async def check_finished(store: Store) -> None:
    """Raise StartError for the target of a copy that was interrupted."""
    if await store.run_read(lambda db: get_meta(db, _UNFINISHED)):
        raise StartError(
            "the store is an unfinished copy, and lacks some of what the original has: delete it, and repeat "
            "`cwg store copy`"
        )


async def check_unused(store: Store) -> None:
    """Raise StartError if a gateway uses the store; one that was killed counts until its lease ends."""
    host = await store.run_read(_host_of_a_gateway)
    if host is not None:
        raise StartError(
            f"a gateway on {host} uses one of the stores: stop it (one that was killed counts for `gateway_lease_s`)"
        )


async def _host_of_a_gateway(db: Db) -> str | None:
    host: str | None = await db.value("SELECT host FROM gateways WHERE until > ? LIMIT 1", await db.now())
    return host


def _count(table: str) -> Work[int]:
    async def count(db: Db) -> int:
        rows: int = await db.value(f"SELECT count(*) FROM (SELECT 1 FROM {table} LIMIT 1) t")  # noqa: S608
        return rows

    return count


async def _pages(source: Store, table: _Table) -> AsyncIterator[list[Any]]:
    if table.name == "contents":
        async for page in _contents(source):
            yield page
        return
    names, key, at_once = columns(table.columns), columns(table.key), _BODIES if table.name in _LARGE else _ROWS
    places = [table.columns.index(name) for name in table.key]
    last: tuple[Any, ...] = ()
    while True:
        after = f"WHERE ({key}) > ({marks(last)})" if last else ""
        query = f"SELECT {names} FROM {table.name} {after} ORDER BY {key} LIMIT {at_once}"  # noqa: S608
        page = await source.run_read(lambda db, query=query, last=last: db.all(query, *last))  # type: ignore[misc]
        if page:
            yield page
        if len(page) < at_once:
            return
        last = tuple(page[-1][place] for place in places)


async def _contents(source: Store) -> AsyncIterator[list[Any]]:
    """Oldest first, as far as the index knows: a search returns the newest first."""
    ids = await source.run_read(
        lambda db: db.all(
            """SELECT c.id FROM contents c LEFT JOIN searchable s ON s.content = c.id
            ORDER BY s.number IS NULL, s.number, c.id"""
        )
    )
    for at in range(0, len(ids), _BODIES):
        wanted = [identity for (identity,) in ids[at : at + _BODIES]]
        query = f"SELECT id, body FROM contents WHERE id IN ({marks(wanted)})"  # noqa: S608
        found = dict(await source.run_read(lambda db, query=query, wanted=wanted: db.all(query, *wanted)))  # type: ignore[misc]
        yield [(identity, found[identity]) for identity in wanted if identity in found]


def _insert(table: _Table, rows: Sequence[Sequence[Any]]) -> Work[None]:
    truths = [table.columns.index(name) for name in table.columns if name in _BOOLEAN]
    values = [[bool(value) if at in truths else value for at, value in enumerate(row)] for row in rows]
    statement = f"INSERT INTO {table.name} ({columns(table.columns)}) VALUES ({marks(table.columns)})"  # noqa: S608
    return lambda db: db.many(statement, values)


def _set_meta(values: Sequence[Sequence[str]]) -> Work[None]:
    statement = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    return lambda db: db.many(statement, values)

"""The SQL of windows. The caller owns the transaction."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import orjson

from gateway.dialects.search_text import Search
from gateway.records import TAG, Manifest, Window
from gateway.store import autofreeze_rows, ledger_rows, manifest_rows, salt_rows, transcript_rows
from gateway.store.database import Db
from gateway.store.sql import columns, marks
from gateway.store.types import SORT_COLUMNS, Released, WindowQuery

_COLUMNS = tuple(f.name for f in fields(Window))
_TAGS, _RECEIPT = _COLUMNS.index("tags"), _COLUMNS.index("receipt")  # stored as JSON
_WINDOW = f"SELECT {', '.join(_COLUMNS)} FROM windows"
JOINED_COLUMNS = columns(_COLUMNS, "w")
_TAGGED = "name IN (SELECT name FROM window_tags WHERE tenant = ? AND tag = ?)"
_TAGGED_TOO = "EXISTS (SELECT 1 FROM window_tags t WHERE t.tenant = ? AND t.tag = ? AND t.name = windows.name)"
# So many windows of a tag are sorted faster than found in an index that has thousands of others (10,000 windows).
_FEW = 500
_LIKE = "{} LIKE ? ESCAPE '\\'"
_WILD, _ESCAPED = re.compile(r"[%_\\]"), r"\\\g<0>"


def of_row(row: Sequence[Any]) -> Window:
    """A window by the values of its columns. By name takes half as long again, which shows in a list of a hundred."""
    values = [*row]
    values[_TAGS] = tuple(orjson.loads(values[_TAGS]))
    values[_RECEIPT] = orjson.loads(values[_RECEIPT])
    return Window(*values)


async def window(db: Db, tenant: str, name: str) -> Window | None:
    """Return the window, or None."""
    row = await db.one(f"{_WINDOW} WHERE tenant = ? AND name = ?", tenant, name)
    return of_row(row) if row else None


async def list_windows(db: Db, tenant: str, query: WindowQuery, found: Sequence[str] = ()) -> tuple[list[Window], int]:
    """Return one page of windows, and how many match. `found`: windows that have `query.search` in their text."""
    where, values = _where(tenant, query, found)
    tags = await _rarest_first(db, tenant, query.tags)
    # The rarest tag selects the windows, the others only filter them.
    tagged = [_TAGGED_TOO if rank else _TAGGED for rank in range(len(tags))]
    condition = " AND ".join((*where, *tagged))
    arguments = [*values, *(value for _, tag in tags for value in (tenant, tag))]
    if len(tags) == 1 and len(where) == 1:  # no other condition: counted already
        ((total, _),) = tags
    else:
        total = await db.value(f"SELECT count(*) FROM windows WHERE {condition}", *arguments)
    few = query.session_id is not None or any(count <= _FEW for count, _ in tags)
    page = await db.all(
        f"{_WINDOW} WHERE {condition} ORDER BY {_order(query, few=few)} LIMIT ? OFFSET ?",
        *arguments,
        query.limit,
        query.offset,
    )
    return [of_row(row) for row in page], total


def _order(query: WindowQuery, *, few: bool) -> str:
    """Newest or largest first is the order of an index, which is read backwards for the opposite."""
    column = SORT_COLUMNS[query.sort_by]
    # Few windows are sorted after they are found; else SQLite would walk through all of them in the index's order.
    plus = "+" if few else ""
    return f"{plus}{column} DESC, name" if query.descending else f"{plus}{column}, name DESC"


def _where(tenant: str, query: WindowQuery, found: Sequence[str]) -> tuple[list[str], list[object]]:
    """The conditions on a window's own row, the tenant first."""
    terms: list[tuple[str, Sequence[object]]] = [("tenant = ?", [tenant])]
    if query.model is not None:
        terms.append(("model = ?", [query.model]))
    if query.session_id is not None:
        terms.append(("session_id = ?", [query.session_id]))
    if query.created_after is not None:
        terms.append(("created_at > ?", [query.created_after]))
    if query.created_before is not None:
        terms.append(("created_at < ?", [query.created_before]))
    if query.search is not None:
        described, arguments = _described(Search(query.search))
        names = "name IN (SELECT value FROM json_each(?))"
        terms.append((f"({described} OR {names})", [*arguments, orjson.dumps(found).decode()]))
    terms += [(f"NOT {_TAGGED_TOO}", [tenant, tag]) for tag in query.without_tags]
    return [term for term, _ in terms], [value for _, values in terms for value in values]


def _described(search: Search) -> tuple[str, list[str]]:
    """The condition that a window's name, description and tags have the words of a search, and its arguments."""
    terms, values = [], []
    for word in search.typed:
        columns = ("name", "description", "tags") if TAG.fullmatch(word) else ("name", "description")
        terms.append(f"({' OR '.join(_LIKE.format(column) for column in columns)})")
        values += [f"%{_WILD.sub(_ESCAPED, word)}%"] * len(columns)
    return f"({(' AND ' if search.every else ' OR ').join(terms)})" if terms else "true", values


async def described(db: Db, tenant: str, search: Search, limit: int) -> list[Window]:
    """Return windows that have the words of a search in name, description or tags, newest first."""
    condition, values = _described(search)
    rows = await db.all(
        f"{_WINDOW} WHERE tenant = ? AND {condition} ORDER BY created_at DESC, name LIMIT ?", tenant, *values, limit
    )
    return [of_row(row) for row in rows]


async def _rarest_first(db: Db, tenant: str, tags: Iterable[str]) -> list[tuple[int, str]]:
    """The tags, each after the number of windows that have it."""
    counted = "SELECT count(*) FROM window_tags WHERE tenant = ? AND tag = ?"
    return sorted([(await db.value(counted, tenant, tag), tag) for tag in set(tags)])


async def ancestors(db: Db, tenant: str, name: str) -> list[str]:
    """Return the ancestors of a window, nearest first."""
    rows = await db.all(
        """WITH RECURSIVE up (parent, depth) AS (
            SELECT parent, 0 FROM windows WHERE tenant = ?1 AND name = ?2
            UNION SELECT w.parent, up.depth + 1 FROM windows w JOIN up ON w.name = up.parent AND w.tenant = ?1
            WHERE up.depth < 1000)
        SELECT parent FROM up WHERE parent IS NOT NULL ORDER BY depth""",
        tenant,
        name,
    )
    return [parent for (parent,) in rows]


async def lineage(db: Db, tenant: str, name: str) -> tuple[list[str], list[str]]:
    """Return the ancestors of a window, nearest first, and its direct clones."""
    clones = await db.all("SELECT name FROM windows WHERE tenant = ? AND parent = ? ORDER BY name", tenant, name)
    return await ancestors(db, tenant, name), [clone for (clone,) in clones]


async def add_window(db: Db, new: Window, manifest: Manifest | None) -> None:
    """Add a window whose name is free, and whose text is there."""
    if manifest is not None:
        await manifest_rows.add(db, manifest)
    values = {name: getattr(new, name) for name in _COLUMNS}
    values["parent"] = new.parent if new.parent and await window(db, new.tenant, new.parent) else None
    values["tags"] = orjson.dumps(new.tags).decode()
    values["receipt"] = orjson.dumps(dict(new.receipt)).decode()
    await db.run(f"INSERT INTO windows ({', '.join(values)}) VALUES ({marks(_COLUMNS)})", *values.values())
    await _add_tags(db, new)


async def describe_window(db: Db, tenant: str, name: str, changes: Mapping[str, Any]) -> Window | None:
    """Change `description`, `tags` or `expires_at`; return the window as it is then, or None."""
    before = await window(db, tenant, name)
    if before is None:
        return None
    now = replace(before, **changes)
    await db.run(
        "UPDATE windows SET description = ?, tags = ?, expires_at = ? WHERE tenant = ? AND name = ?",
        now.description,
        orjson.dumps(now.tags).decode(),
        now.expires_at,
        tenant,
        name,
    )
    await db.run("DELETE FROM window_tags WHERE tenant = ? AND name = ?", tenant, name)
    await _add_tags(db, now)
    return now


async def _add_tags(db: Db, window: Window) -> None:
    rows = [(window.tenant, tag, window.name) for tag in window.tags]
    await db.many("INSERT INTO window_tags VALUES (?, ?, ?)", rows)


async def expired_windows(db: Db, by: float, limit: int) -> list[Window]:
    """Return windows of every tenant that had expired by then, the first to expire first."""
    rows = await db.all(f"{_WINDOW} WHERE expires_at <= ? ORDER BY expires_at LIMIT ?", by, limit)
    return [of_row(row) for row in rows]


async def delete_window(
    db: Db, tenant: str, name: str, *, expired_by: float | None = None, automatic_of: str | None = None
) -> Released | None:
    """Delete a window; return what no window holds any more, or None if there is no such window.

    With `expired_by` only if it had expired by then, with `automatic_of` only if it is an automatic window of that
    session (`auto_windows`). Its salts are orphaned.
    """
    deleted = await window(db, tenant, name)
    if deleted is None or (expired_by is not None and not deleted.has_expired(expired_by)):
        return None
    if automatic_of is not None and name not in await autofreeze_rows.auto_windows(db, tenant, automatic_of):
        return None
    await db.run("DELETE FROM windows WHERE tenant = ? AND name = ?", tenant, name)
    await ledger_rows.forget_window(db, tenant, name)
    # The next window of this name is not the parent of what came from this one.
    await db.run("UPDATE windows SET parent = NULL WHERE tenant = ? AND parent = ?", tenant, name)
    await db.run('UPDATE sessions SET "window" = NULL WHERE tenant = ? AND "window" = ?', tenant, name)
    for salt in {deleted.salt, deleted.pin_salt}:
        await salt_rows.mark_orphaned(db, salt, tenant, deleted.lineage)
    await transcript_rows.release(db, deleted.transcript)
    await transcript_rows.release_content(db, deleted.frame)
    return replace(await manifest_rows.release(db, deleted), window=deleted)


async def window_counts(db: Db) -> dict[str, int]:
    """Return the number of windows by `kv`."""
    return dict(await db.all("SELECT kv, count(*) FROM windows GROUP BY kv"))

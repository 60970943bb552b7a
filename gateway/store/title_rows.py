"""The SQL that gives titles to the sessions and windows of an older version. The caller owns the transaction."""

import json

from gateway.dialects.titles import title_of
from gateway.store import transcript_rows
from gateway.store.database import Db
from gateway.store.sql import get_meta, set_meta

_NAMES = {"sessions": "id", "windows": "name"}  # the tables, and the column that names a row within its tenant
_BEGINNING = 32  # messages that are looked at
_POSITION = "untitled"  # in `meta`: table, tenant and name after which there may be rows without a title


async def fill_in(db: Db, at_once: int) -> bool:
    """Give a title to the next rows; return whether there may be more."""
    position = await get_meta(db, _POSITION)
    if position is None:
        return False
    table, tenant, name = json.loads(position)
    column = _NAMES[table]
    rows = await db.all(
        f"""SELECT tenant, {column}, transcript FROM {table} WHERE (tenant, {column}) > (?, ?)
        ORDER BY tenant, {column} LIMIT ?""",
        tenant,
        name,
        at_once,
    )
    values = [(await _title(db, transcript), owner, key) for owner, key, transcript in rows]
    await db.many(f"UPDATE {table} SET title = coalesce(title, ?) WHERE tenant = ? AND {column} = ?", values)
    if len(rows) == at_once:
        following: tuple[str, ...] | None = (table, *rows[-1][:2])
    else:
        following = ("windows", "", "") if table == "sessions" else None
    await set_meta(db, _POSITION, None if following is None else json.dumps(following))
    return following is not None


async def _title(db: Db, transcript: bytes | None) -> str | None:
    return title_of(await transcript_rows.beginning(db, transcript, _BEGINNING)) if transcript else None

"""The full-text index of messages, on SQLite's FTS5: all that is particular to it. The caller owns the transaction.

Each stored message is indexed once, however many sessions and windows share it: `searchable` numbers the indexed
contents, and `message_words` has their words under these numbers, without their text. Indexing in the transaction that
records a turn would cost it half as much again. So that only stores the message, and `index_some` follows in the
background; until then a search reads the messages that are `_pending`. What was recorded is found at once either way,
and a message leaves the index in the transaction that deletes it.
"""

import logging
import sqlite3
from collections.abc import Sequence

import orjson

from gateway.dialects.search_text import TOKENIZER, Search, indexed, message_text
from gateway.store.database import Db, Hits
from gateway.store.sql import get_meta, set_meta

log = logging.getLogger(__name__)

# What a search reads one by one. There are more messages only right after an upgrade, and more bytes right after a
# client has sent them.
_PENDING, _PENDING_BYTES = 500, 2**20
_BEST = 500  # messages that a ranked search returns
_BATCH_BYTES = 2**20  # of messages that are indexed at once
_NEWEST = "SELECT rowid FROM message_words WHERE message_words MATCH ? ORDER BY rowid DESC LIMIT ?"
# The inner query is in the order of the index, so that only so many are ranked.
_BEST_FIRST = """SELECT number FROM (
    SELECT rowid AS number, rank AS score FROM message_words WHERE message_words MATCH ? ORDER BY rowid DESC LIMIT ?
) ORDER BY score LIMIT ?"""
# The links below some messages, each with the last of these messages above; how many, and the windows that end there.
_WINDOWS = """WITH RECURSIVE below (link, content, depth) AS MATERIALIZED (
        SELECT l.id, l.content, l.depth FROM temp.found f CROSS JOIN links l ON l.content = f.content
        UNION SELECT l.id, coalesce(f.content, b.content), CASE WHEN f.content IS NULL THEN b.depth ELSE l.depth END
            FROM below b CROSS JOIN links l ON l.parent = b.link LEFT JOIN temp.found f ON f.content = l.content
            LIMIT ?2)
    SELECT NULL, NULL, count(*) FROM below
    UNION ALL SELECT w.name, b.content, b.depth
        FROM below b CROSS JOIN windows w ON w.transcript = b.link WHERE +w.tenant = ?1"""
_AVAILABLE = "SELECT fts5_source_id()"
_BODY = "SELECT body FROM contents WHERE id = ?"
_POSITION = "searchable"  # in `meta`: number and id of the last content that was looked at


def prepare(connection: sqlite3.Connection) -> None:
    """Create the index unless it is there. Without FTS5 messages cannot be searched, which is logged."""
    try:
        connection.execute(_AVAILABLE)
    except sqlite3.DatabaseError:
        log.warning(
            "this SQLite (%s) has no FTS5: only names, descriptions and tags are searched", sqlite3.sqlite_version
        )
        return
    connection.execute(
        f'CREATE VIRTUAL TABLE IF NOT EXISTS message_words USING fts5(words, content = "", tokenize = "{TOKENIZER}")'
    )


async def _is_available(db: Db) -> bool:
    try:
        await db.one(_AVAILABLE)
    except sqlite3.DatabaseError:
        return False
    return True


async def index_some(db: Db, at_once: int) -> bool:
    """Index the next messages; return whether there may be more."""
    if not await _is_available(db):
        return False
    size, last, count = 0, None, 0
    query = "SELECT rowid, id, length(body) FROM contents WHERE rowid > ? ORDER BY rowid LIMIT ?"
    for row, content_id, length in await db.all(query, await _position(db), at_once):
        await _index(db, content_id)
        size, last, count = size + length, (row, content_id), count + 1
        if size > _BATCH_BYTES:
            break
    if last is None:
        return False
    await set_meta(db, _POSITION, f"{last[0]}:{last[1].hex()}")
    return count == at_once or size > _BATCH_BYTES


async def _index(db: Db, content_id: bytes) -> None:
    text = indexed(_text(await db.value(_BODY, content_id)))
    if not text:
        return
    number = await db.value(
        "INSERT INTO searchable (content) VALUES (?) ON CONFLICT DO NOTHING RETURNING number", content_id
    )
    if number is not None:
        await db.run("INSERT INTO message_words (rowid, words) VALUES (?, ?)", number, text)


def _text(body: bytes) -> str:
    """The text of a content; none of one that is no message."""
    value = orjson.loads(body)
    return message_text(value) if "role" in value else ""


async def _position(db: Db) -> int:
    """The row of `contents` up to which they are indexed.

    Rows are numbered in the order in which they are added, but the number of a deleted last one is given again, and
    VACUUM numbers all of them anew. Then it is the last row that is indexed.
    """
    row, _, content = (await get_meta(db, _POSITION) or "0:").partition(":")
    if await db.one("SELECT 1 FROM contents WHERE rowid = ? AND id = ?", int(row), bytes.fromhex(content)):
        return int(row)
    before = await db.value(
        """SELECT rowid FROM contents WHERE rowid <= ? AND EXISTS (SELECT 1 FROM searchable WHERE content = id)
        ORDER BY rowid DESC LIMIT 1""",
        int(row),
    )
    return int(before or 0)


async def remove(db: Db, content_id: bytes) -> None:
    """Remove a content, which is about to be deleted, from the index."""
    number = await db.value("SELECT number FROM searchable WHERE content = ?", content_id)
    if number is None:
        return
    # An index without texts needs the text to find the words (sqlite.org/fts5.html, section 6.3).
    if await _is_available(db):
        text = indexed(_text(await db.value(_BODY, content_id)))
        await db.run("INSERT INTO message_words (message_words, rowid, words) VALUES ('delete', ?, ?)", number, text)
    await db.run("DELETE FROM searchable WHERE number = ?", number)


async def hits(db: Db, search: Search, *, limit: int, ranked: bool) -> Hits:
    """Return the contents with a match among the newest `limit` that have one."""
    if not search.expression or not await _is_available(db):
        return Hits([], truncated=False)
    pending, more = await _pending(db, search)
    if ranked:
        rows = await db.all(_BEST_FIRST, search.expression, limit, _BEST)
    else:
        rows = await db.all(_NEWEST, search.expression, limit)
    contents = [
        content
        for (number,) in rows
        for (content,) in await db.all("SELECT content FROM searchable WHERE number = ?", number)
    ]
    whole = [content for content, share in pending if share == 1]
    some = sorted((share, content) for content, share in pending if 0 < share < 1 and not search.every)
    return Hits(
        [*whole, *contents, *(content for _, content in reversed(some))],
        more or len(contents) >= (_BEST if ranked else limit),
    )


async def _pending(db: Db, search: Search) -> tuple[list[tuple[bytes, float]], bool]:
    """The newest contents that are not indexed yet, each with its share of the words, and whether there are more."""
    rows = await db.all(
        "SELECT id FROM contents WHERE rowid > ? ORDER BY rowid DESC LIMIT ?", await _position(db), _PENDING + 1
    )
    shares: list[tuple[bytes, float]] = []
    size = 0
    for (content,) in rows[:_PENDING]:
        body = await db.value(_BODY, content)
        shares.append((content, search.coverage(_text(body))))
        size += len(body)
        if size > _PENDING_BYTES:
            break
    return shares, len(rows) > len(shares)


async def windows_with(
    db: Db, tenant: str, contents: Sequence[bytes], links: int
) -> tuple[int, list[tuple[str, bytes, int]]]:
    """See `WordIndex.windows_with`."""
    await db.run("CREATE TEMP TABLE IF NOT EXISTS found (content BLOB PRIMARY KEY) WITHOUT ROWID")
    await db.run("DELETE FROM temp.found")
    await db.many("INSERT OR IGNORE INTO temp.found VALUES (?)", [(content,) for content in contents])
    (_, _, count), *rows = await db.all(_WINDOWS, tenant, links)
    return count, rows

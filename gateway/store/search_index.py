"""The full-text index of messages, on SQLite's FTS5: all that is particular to it. The caller owns the transaction.

Each stored message is indexed once, however many sessions and windows share it: `searchable` numbers the indexed
contents, and `message_words` has their words under these numbers, without their text. Indexing in the transaction that
records a turn would cost it half as much again. So that only stores the message, and `index_some` follows in the
background; until then a search reads the messages that are `_pending`. What was recorded is found at once either way,
and a message leaves the index in the transaction that deletes it.
"""

import logging
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from gateway.dialects.search_text import TOKENIZER, Search, indexed, message_text
from gateway.store.sql import get_meta, set_meta

log = logging.getLogger(__name__)

_PENDING = 500  # messages that a search reads one by one; more there are only right after an upgrade
_BEST = 500  # messages that a ranked search returns
_BATCH_BYTES = 2**20  # of messages that are indexed at once
_NEWEST = "SELECT rowid FROM message_words WHERE message_words MATCH ? ORDER BY rowid DESC LIMIT ?"
# The inner query is in the order of the index, so that only so many are ranked.
_BEST_FIRST = """SELECT number FROM (
    SELECT rowid AS number, rank AS score FROM message_words WHERE message_words MATCH ? ORDER BY rowid DESC LIMIT ?
) ORDER BY score LIMIT ?"""
_POSITION = "searchable"  # in `meta`: number and id of the last content that was looked at


class Hits(NamedTuple):
    """Contents with a match, the best first if they are ranked, else newest first; `truncated`: there may be more."""

    contents: list[bytes]
    truncated: bool


def prepare(db: sqlite3.Connection) -> None:
    """Create the index unless it is there. Without FTS5 messages cannot be searched, which is logged."""
    if not _is_available(db):
        log.warning(
            "this SQLite (%s) has no FTS5: only names, descriptions and tags are searched", sqlite3.sqlite_version
        )
        return
    db.execute(
        f'CREATE VIRTUAL TABLE IF NOT EXISTS message_words USING fts5(words, content = "", tokenize = "{TOKENIZER}")'
    )


def _is_available(db: sqlite3.Connection) -> bool:
    try:
        db.execute("SELECT fts5_source_id()")
    except sqlite3.DatabaseError:
        return False
    return True


def index_some(db: sqlite3.Connection, at_once: int) -> bool:
    """Index the next messages; return whether there may be more."""
    if not _is_available(db):
        return False
    size, last, count = 0, None, 0
    for row, content_id, body in _after(db, _position(db), at_once):
        _index(db, content_id, body)
        size, last, count = size + len(body), (row, content_id), count + 1
        if size > _BATCH_BYTES:
            break
    if last is None:
        return False
    set_meta(db, _POSITION, f"{last[0]}:{last[1].hex()}")
    return count == at_once or size > _BATCH_BYTES


def _after(db: sqlite3.Connection, position: int, count: int) -> Iterator[tuple[int, bytes, bytes]]:
    query = "SELECT rowid, id, body FROM contents WHERE rowid > ? ORDER BY rowid LIMIT ?"
    return iter(db.execute(query, (position, count)))


def _index(db: sqlite3.Connection, content_id: bytes, body: bytes) -> None:
    text = indexed(_text(body))
    if text and (cursor := db.execute("INSERT OR IGNORE INTO searchable (content) VALUES (?)", (content_id,))).rowcount:
        db.execute("INSERT INTO message_words (rowid, words) VALUES (?, ?)", (cursor.lastrowid, text))


def _text(body: bytes) -> str:
    """The text of a content; none of one that is no message."""
    value = orjson.loads(body)
    return message_text(value) if "role" in value else ""


def _position(db: sqlite3.Connection) -> int:
    """The row of `contents` up to which they are indexed.

    Rows are numbered in the order in which they are added, but the number of a deleted last one is given again, and
    VACUUM numbers all of them anew. Then it is the last row that is indexed.
    """
    row, _, content = (get_meta(db, _POSITION) or "0:").partition(":")
    if db.execute("SELECT 1 FROM contents WHERE rowid = ? AND id = ?", (int(row), bytes.fromhex(content))).fetchone():
        return int(row)
    indexed_before = db.execute(
        """SELECT rowid FROM contents WHERE rowid <= ? AND EXISTS (SELECT 1 FROM searchable WHERE content = id)
        ORDER BY rowid DESC LIMIT 1""",
        (int(row),),
    ).fetchone()
    return int(indexed_before[0]) if indexed_before else 0


def remove(db: sqlite3.Connection, content_id: bytes) -> None:
    """Remove a content, which is about to be deleted, from the index."""
    row = db.execute("SELECT number FROM searchable WHERE content = ?", (content_id,)).fetchone()
    if row is None:
        return
    # An index without texts needs the text to find the words (sqlite.org/fts5.html, section 6.3).
    if _is_available(db):
        (body,) = db.execute("SELECT body FROM contents WHERE id = ?", (content_id,)).fetchone()
        values = (row[0], indexed(_text(body)))
        db.execute("INSERT INTO message_words (message_words, rowid, words) VALUES ('delete', ?, ?)", values)
    db.execute("DELETE FROM searchable WHERE number = ?", row)


def hits(db: sqlite3.Connection, search: Search, *, limit: int, ranked: bool) -> Hits:
    """Return the contents with a match among the newest `limit` that have one."""
    if not _is_available(db) or not search.expression:
        return Hits([], truncated=False)
    pending, more = _pending(db, search)
    if ranked:
        rows = db.execute(_BEST_FIRST, (search.expression, limit, _BEST)).fetchall()
    else:
        rows = db.execute(_NEWEST, (search.expression, limit)).fetchall()
    contents = [
        content
        for (number,) in rows
        for (content,) in db.execute("SELECT content FROM searchable WHERE number = ?", (number,))
    ]
    whole = [content for content, share in pending if share == 1]
    some = sorted((share, content) for content, share in pending if 0 < share < 1 and not search.every)
    return Hits(
        [*whole, *contents, *(content for _, content in reversed(some))],
        more or len(contents) >= (_BEST if ranked else limit),
    )


def _pending(db: sqlite3.Connection, search: Search) -> tuple[list[tuple[bytes, float]], bool]:
    """The newest contents that are not indexed yet, each with its share of the words, and whether there are more."""
    rows = db.execute(
        "SELECT id, body FROM contents WHERE rowid > ? ORDER BY rowid DESC LIMIT ?", (_position(db), _PENDING + 1)
    ).fetchall()
    return [(content, search.coverage(_text(body))) for content, body in rows[:_PENDING]], len(rows) > _PENDING

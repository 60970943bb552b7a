"""The SQL of transcripts: contents by hash, and Merkle lists of them. The caller owns the transaction."""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from blake3 import blake3

from gateway.records import Message
from gateway.store import search_index

_ID_BYTES = 16
_KEPT_BYTES = 2**20  # of a transcript that is being stored
# The columns that may refer to a link, and to a content: what none of them refers to is deleted.
_LINK_HOLDERS = (
    ("links", "parent"),
    ("sessions", "transcript"),
    ("sessions", "window_transcript"),
    ("windows", "transcript"),
    ("responses", "transcript"),
    ("responses", "request_input"),
)
_CONTENT_HOLDERS = (("links", "content"), ("sessions", "frame"), ("windows", "frame"), ("responses", "echo"))


def messages(db: sqlite3.Connection, transcript: bytes) -> list[Message]:
    """Return the messages of a transcript, first to last."""
    rows = db.execute(
        """WITH RECURSIVE chain (parent, content, depth) AS (
            SELECT parent, content, depth FROM links WHERE id = ?
            UNION ALL SELECT l.parent, l.content, l.depth FROM links l JOIN chain c ON l.id = c.parent)
        SELECT body FROM chain JOIN contents ON contents.id = chain.content ORDER BY depth""",
        (transcript,),
    )
    return [orjson.loads(body) for (body,) in rows]


def beginning(db: sqlite3.Connection, transcript: bytes, count: int) -> list[Message]:
    """Return the first messages of a transcript, without reading the others."""
    rows = db.execute(
        """WITH RECURSIVE chain (parent, content, depth) AS (
            SELECT parent, content, depth FROM links WHERE id = ?
            UNION ALL SELECT l.parent, l.content, l.depth FROM links l JOIN chain c ON l.id = c.parent)
        SELECT (SELECT body FROM contents WHERE id = content) FROM chain WHERE depth < ? ORDER BY depth""",
        (transcript, count),
    )
    return [orjson.loads(body) for (body,) in rows if body is not None]


def prefix(db: sqlite3.Connection, transcript: bytes, count: int) -> bytes | None:
    """Return the id of the first `count` messages of a transcript; None if it has not that many, or is not there."""
    row = db.execute(
        """WITH RECURSIVE chain (id, parent, depth) AS (
            SELECT id, parent, depth FROM links WHERE id = ?1
            UNION ALL SELECT l.id, l.parent, l.depth FROM links l JOIN chain c ON l.id = c.parent WHERE c.depth > ?2)
        SELECT id FROM chain WHERE depth = ?2""",
        (transcript, count - 1),
    ).fetchone()
    return row[0] if row else None


def begins_with(db: sqlite3.Connection, transcript: bytes, beginning: bytes) -> bool:
    """Whether a transcript is another one, or continues it."""
    if transcript == beginning:
        return True
    row = db.execute("SELECT depth FROM links WHERE id = ?", (beginning,)).fetchone()
    return row is not None and prefix(db, transcript, row[0] + 1) == beginning


def frame(db: sqlite3.Connection, frame_id: bytes) -> dict[str, Any]:
    """Return a frame: what a prompt is rendered from besides the messages."""
    row = db.execute("SELECT body FROM contents WHERE id = ?", (frame_id,)).fetchone()
    value: dict[str, Any] = orjson.loads(row[0]) if row else {}
    return value


def exists(db: sqlite3.Connection, transcript: bytes, frame: bytes | None) -> bool:
    """Whether the store has a frame, and a transcript's last link, which is never deleted after the others."""
    if db.execute("SELECT 1 FROM links WHERE id = ?", (transcript,)).fetchone() is None:
        return False
    return frame is None or db.execute("SELECT 1 FROM contents WHERE id = ?", (frame,)).fetchone() is not None


def add_content(db: sqlite3.Connection, value: Mapping[str, object]) -> bytes:
    content_id, body = _content(value)
    db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (content_id, body))
    return content_id


def add(db: sqlite3.Connection, transcript: Sequence[Message]) -> bytes | None:
    # Most bodies are stored already, and all of a long transcript's would be in memory: what is not kept is serialised
    # again below.
    chain: list[tuple[bytes, bytes | None, bytes, bytes | None]] = []
    size = 0
    parent: bytes | None = None
    for message in transcript:
        content_id, body = _content(message)
        size += len(body)
        link = blake3((parent or b"") + content_id).digest(_ID_BYTES)
        chain.append((link, parent, content_id, body if size <= _KEPT_BYTES else None))
        parent = link
    stored = len(chain)
    # From the end: all but the last turn's messages are stored already.
    while stored and not db.execute("SELECT 1 FROM links WHERE id = ?", (chain[stored - 1][0],)).fetchone():
        stored -= 1
    new = [(depth, *chain[depth]) for depth in range(stored, len(chain))]
    bodies = ((content_id, kept or orjson.dumps(transcript[depth])) for depth, _, _, content_id, kept in new)
    db.executemany("INSERT OR IGNORE INTO contents VALUES (?, ?)", bodies)
    links = ((link, before, content_id, depth) for depth, link, before, content_id, _ in new)
    db.executemany("INSERT INTO links VALUES (?, ?, ?, ?)", links)
    return parent


def release(db: sqlite3.Connection, transcript: bytes | None) -> None:
    """Delete the links of a transcript from its end, up to the first that something else refers to."""
    while transcript is not None and not _is_referenced(db, _LINK_HOLDERS, transcript):
        row = db.execute("SELECT parent, content FROM links WHERE id = ?", (transcript,)).fetchone()
        if row is None:
            return
        db.execute("DELETE FROM links WHERE id = ?", (transcript,))
        release_content(db, row[1])
        transcript = row[0]


def release_content(db: sqlite3.Connection, content_id: bytes | None) -> None:
    """Delete a content unless something refers to it."""
    if content_id is not None and not _is_referenced(db, _CONTENT_HOLDERS, content_id):
        search_index.remove(db, content_id)
        db.execute("DELETE FROM contents WHERE id = ?", (content_id,))


def _is_referenced(db: sqlite3.Connection, holders: Sequence[tuple[str, str]], name: bytes) -> bool:
    return any(
        db.execute(f"SELECT 1 FROM {table} WHERE {column} = ? LIMIT 1", (name,)).fetchone() for table, column in holders
    )


def _content(value: Mapping[str, object]) -> tuple[bytes, bytes]:
    body = orjson.dumps(value)
    return blake3(body).digest(_ID_BYTES), body

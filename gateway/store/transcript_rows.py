"""The SQL of transcripts: contents by hash, and Merkle lists of them. The caller owns the transaction."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from blake3 import blake3

from gateway.records import Message
from gateway.store.batch import Batch
from gateway.store.database import Db

_ID_BYTES = 16
_KEPT_BYTES = 2**20  # of a transcript that is being stored
_COLLECTED_BYTES = 2**17  # of messages that are written together; orjson's buffers are much larger than what is in them
_FEW = 8  # messages are stored again sooner than it is found out which of them are stored
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


async def messages(db: Db, transcript: bytes) -> list[Message]:
    """Return the messages of a transcript, first to last."""
    rows = await db.all(
        """WITH RECURSIVE chain (parent, content, depth) AS (
            SELECT parent, content, depth FROM links WHERE id = ?
            UNION ALL SELECT l.parent, l.content, l.depth FROM links l JOIN chain c ON l.id = c.parent)
        SELECT body FROM chain JOIN contents ON contents.id = chain.content ORDER BY depth""",
        transcript,
    )
    return [orjson.loads(body) for (body,) in rows]


async def beginning(db: Db, transcript: bytes, count: int) -> list[Message]:
    """Return the first messages of a transcript, without reading the others."""
    rows = await db.all(
        """WITH RECURSIVE chain (parent, content, depth) AS (
            SELECT parent, content, depth FROM links WHERE id = ?
            UNION ALL SELECT l.parent, l.content, l.depth FROM links l JOIN chain c ON l.id = c.parent)
        SELECT (SELECT body FROM contents WHERE id = content) FROM chain WHERE depth < ? ORDER BY depth""",
        transcript,
        count,
    )
    return [orjson.loads(body) for (body,) in rows if body is not None]


async def prefix(db: Db, transcript: bytes, count: int) -> bytes | None:
    """Return the id of the first `count` messages of a transcript; None if it has not that many, or is not there."""
    found: bytes | None = await db.value(
        """WITH RECURSIVE chain (id, parent, depth) AS (
            SELECT id, parent, depth FROM links WHERE id = ?1
            UNION ALL SELECT l.id, l.parent, l.depth FROM links l JOIN chain c ON l.id = c.parent WHERE c.depth > ?2)
        SELECT id FROM chain WHERE depth = ?2""",
        transcript,
        count - 1,
    )
    return found


async def begins_with(db: Db, transcript: bytes, beginning: bytes) -> bool:
    """Whether a transcript is another one, or continues it."""
    if transcript == beginning:
        return True
    depth = await db.value("SELECT depth FROM links WHERE id = ?", beginning)
    return depth is not None and await prefix(db, transcript, depth + 1) == beginning


async def frame(db: Db, frame_id: bytes) -> dict[str, Any]:
    """Return a frame: what a prompt is rendered from besides the messages."""
    body = await db.value("SELECT body FROM contents WHERE id = ?", frame_id)
    value: dict[str, Any] = orjson.loads(body) if body else {}
    return value


async def exists(db: Db, transcript: bytes, frame: bytes | None) -> bool:
    """Whether the store has a frame, and a transcript's last link, which is never deleted after the others."""
    if await db.one("SELECT 1 FROM links WHERE id = ?", transcript) is None:
        return False
    return frame is None or await db.one("SELECT 1 FROM contents WHERE id = ?", frame) is not None


async def add_content(db: Db, value: Mapping[str, object]) -> bytes:
    content_id, body = _content(value)
    await db.run("INSERT INTO contents VALUES (?, ?) ON CONFLICT DO NOTHING", content_id, body)
    return content_id


async def add(db: Db, transcript: Sequence[Message]) -> bytes | None:
    batch = Batch()
    added = await extend(db, batch, transcript, None)
    await batch.write(db)
    return added


async def extend(db: Db, batch: Batch, transcript: Sequence[Message], old: bytes | None) -> bytes | None:
    """Add a transcript later, which most often continues the `old` one; that is released if it does not."""
    # Most bodies are stored already, and all of a long transcript's would be in memory: what is not kept is serialised
    # again below.
    chain: list[tuple[bytes, bytes | None, bytes, bytes | None]] = []
    size, known = 0, 0
    parent: bytes | None = None
    for message in transcript:
        content_id, body = _content(message)
        size += len(body)
        link = blake3((parent or b"") + content_id).digest(_ID_BYTES)
        chain.append((link, parent, content_id, body if size <= _KEPT_BYTES else None))
        parent = link
        if link == old:
            known = len(chain)
    few = len(chain) - known <= _FEW
    stored = known if few else await _stored(db, batch, [link for link, *_ in chain], known)
    for depth in range(stored, len(chain)):
        link, before, content_id, kept = chain[depth]
        batch.add_content(content_id, kept or orjson.dumps(transcript[depth]))
        batch.add_link(link, before, content_id, depth)
        if batch.text_bytes > _COLLECTED_BYTES:
            await batch.write_texts(db)
    if not known:
        batch.release(old)
    return parent


async def _stored(db: Db, batch: Batch, links: Sequence[bytes], known: int) -> int:
    """How many of the first links are stored, if at least `known` are: whatever is before a stored link is stored too.

    All but the last turn's most often, or none but these: the steps from the end double.
    """
    low = high = len(links)
    step = 1
    while low > known and not await _is_stored(db, batch, links[low - 1]):
        high, low, step = low - 1, max(low - step, known), step * 2
    while low < high:
        middle = (low + high + 1) // 2
        if await _is_stored(db, batch, links[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return low


async def _is_stored(db: Db, batch: Batch, link: bytes) -> bool:
    return batch.has_link(link) or await db.one("SELECT 1 FROM links WHERE id = ?", link) is not None


def add_frame(batch: Batch, frame: Mapping[str, object], old: bytes | None) -> bytes:
    """Add a frame later, unless it is the `old` one, which is released otherwise."""
    content_id, body = _content(frame)
    if content_id != old:
        batch.add_content(content_id, body)
        batch.release_content(old)
    return content_id


async def finish(db: Db, batch: Batch) -> None:
    """Write a batch, and release what it has let go of."""
    await batch.write(db)
    transcripts, contents = batch.released()
    for transcript in transcripts:
        await release(db, transcript)
    for content_id in contents:
        await release_content(db, content_id)


async def release(db: Db, transcript: bytes | None) -> None:
    """Delete the links of a transcript from its end, up to the first that something else refers to."""
    while transcript is not None and not await _is_referenced(db, _LINK_HOLDERS, transcript):
        await db.lock_texts()
        row = await db.one("SELECT parent, content FROM links WHERE id = ?", transcript)
        if row is None:
            return
        await db.run("DELETE FROM links WHERE id = ?", transcript)
        await release_content(db, row[1])
        transcript = row[0]


async def release_content(db: Db, content_id: bytes | None) -> None:
    """Delete a content unless something refers to it."""
    if content_id is not None and not await _is_referenced(db, _CONTENT_HOLDERS, content_id):
        await db.lock_texts()
        await db.words.remove(db, content_id)
        await db.run("DELETE FROM contents WHERE id = ?", content_id)


async def _is_referenced(db: Db, holders: Sequence[tuple[str, str]], name: bytes) -> bool:
    for table, column in holders:
        if await db.one(f"SELECT 1 FROM {table} WHERE {column} = ? LIMIT 1", name):
            return True
    return False


def _content(value: Mapping[str, object]) -> tuple[bytes, bytes]:
    body = orjson.dumps(value)
    return blake3(body).digest(_ID_BYTES), body

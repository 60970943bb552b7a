"""The full-text index of messages on PostgreSQL: a `tsvector` for each message. The caller owns the transaction.

Its words are cut by the rules of `gateway.dialects.search_text`, not by PostgreSQL's parser, so that both databases
find the same. A trigger notes each new content in `unindexed`; `index_some` follows in the background, and until then a
search reads what is noted there. PostgreSQL ranks without regard to how rare a word is, so that is counted here.
"""

from collections.abc import Iterator, Sequence

import orjson

from gateway.dialects.search_text import TOKEN, Search, folded, message_text
from gateway.store.database import Db, Hits

# What a search reads one by one. There are more messages only right after a copy, and more bytes right after a client
# has sent them.
_PENDING, _PENDING_BYTES = 500, 2**20
_BEST = 500  # messages that a ranked search returns
_RANKED = 2_000  # messages that are ranked, the newest
_BATCH_BYTES = 2**20  # of messages that are indexed at once
_MAX_POSITION = 16_383  # of a word in a tsvector (PostgreSQL, 12.10)
_MAX_WORD = 500  # characters; a lexeme has at most 2,046 bytes
_MAX_VECTOR = 900_000  # bytes of words; a tsvector has at most 1 MiB
_LONG = "\x01"  # a word of every text that is so long that the places of its last words are not known
_BODY = "SELECT body FROM contents WHERE id = ?"
_NEWEST = """SELECT content FROM searchable WHERE words @@ CAST(? AS tsquery) ORDER BY number DESC LIMIT ?"""
_BEST_FIRST = """WITH found AS (
        SELECT number, content, words FROM searchable WHERE words @@ CAST(?1 AS tsquery)
        ORDER BY number DESC LIMIT ?2),
    wanted AS MATERIALIZED (
        SELECT q.word, ln(1 + (SELECT count(*) FROM found) / (1.0 + (
            SELECT count(*) FROM found f WHERE f.words @@ CAST(q.word AS tsquery)))) AS weight
        FROM unnest(?3::text[]) q (word))
    SELECT content FROM found, wanted GROUP BY number, content
    ORDER BY sum(weight * ts_rank(words, CAST(word AS tsquery), 1)) DESC, number DESC LIMIT ?4"""

_WINDOWS = """WITH RECURSIVE below (link, content, depth) AS (
        SELECT l.id, l.content, l.depth FROM unnest(?3::bytea[]) f (content) CROSS JOIN links l ON l.content = f.content
        UNION SELECT l.id, CASE WHEN l.content = ANY(?3::bytea[]) THEN l.content ELSE b.content END,
            CASE WHEN l.content = ANY(?3::bytea[]) THEN l.depth ELSE b.depth END
        FROM below b CROSS JOIN links l ON l.parent = b.link),
    followed AS MATERIALIZED (SELECT * FROM below LIMIT ?2)
    SELECT NULL AS name, NULL AS content, count(*) FROM followed
    UNION ALL SELECT w.name, f.content, f.depth
        FROM followed f CROSS JOIN windows w ON w.transcript = f.link WHERE w.tenant = ?1"""


async def index_some(db: Db, at_once: int) -> bool:
    """Index the next messages; return whether there may be more."""
    noted = await db.all(
        """SELECT u.number, u.content, length(c.body) FROM unindexed u JOIN contents c ON c.id = u.content
        ORDER BY u.number LIMIT ? FOR UPDATE OF u SKIP LOCKED""",
        at_once,
    )
    size, done = 0, []
    for number, content_id, length in noted:
        if words := vector(_text(await db.value(_BODY, content_id))):
            await db.run(
                "INSERT INTO searchable (content, words) VALUES (?, CAST(? AS tsvector)) ON CONFLICT DO NOTHING",
                content_id, words,
            )  # fmt: skip
        done.append(number)
        size += length
        if size > _BATCH_BYTES:
            break
    await db.many("DELETE FROM unindexed WHERE number = ?", [(number,) for number in done])
    return len(noted) == at_once or size > _BATCH_BYTES


def _text(body: bytes) -> str:
    """The text of a content; none of one that is no message."""
    value = orjson.loads(body)
    return message_text(value) if "role" in value else ""


def vector(text: str) -> str:
    """A text as a tsvector, in PostgreSQL's notation."""
    places: dict[str, list[int]] = {}
    place = size = 0
    for place, word in enumerate(_words(text), 1):
        known = places.setdefault(word, [])
        size += 4 + (0 if known else len(word.encode()))
        if size > _MAX_VECTOR:
            break
        known.append(min(place, _MAX_POSITION))
    if place > _MAX_POSITION:
        places[_LONG] = [_MAX_POSITION]
    return " ".join(f"{_quoted(word)}:{','.join(map(str, at[:255]))}" for word, at in places.items())


def _words(text: str) -> Iterator[str]:
    return (word[:_MAX_WORD] for word in TOKEN.findall(folded(text)))


def _quoted(word: str) -> str:
    """A word in a tsvector or a tsquery; it has letters, digits and signs, none of which is a quote."""
    return f"'{word}'"


async def remove(db: Db, content_id: bytes) -> None:
    """Remove a content, which is about to be deleted, from the index."""
    await db.run("DELETE FROM searchable WHERE content = ?", content_id)


async def hits(db: Db, search: Search, *, limit: int, ranked: bool) -> Hits:
    """Return the contents with a match among the newest `limit` that have one."""
    queries = list(_queries(search))
    if not queries:
        return Hits([], truncated=False)
    pending, more = await _pending(db, search)
    query = (" & " if search.every else " | ").join(queries)
    if ranked:
        rows = await db.all(_BEST_FIRST, query, min(limit, _RANKED), queries, _BEST)
    else:
        rows = await db.all(_NEWEST, query, limit)
    whole = [content for content, share in pending if share == 1]
    some = sorted((share, content) for content, share in pending if 0 < share < 1 and not search.every)
    return Hits(
        [*whole, *(content for (content,) in rows), *(content for _, content in reversed(some))],
        more or len(rows) >= (_BEST if ranked else limit),
    )


def _queries(search: Search) -> Iterator[str]:
    """A tsquery for each word: its parts in a row, and the last one is the beginning of a word."""
    for word in search.words:
        parts = [_quoted(part) for part in _words(word)]
        if parts:
            parts[-1] += ":*"
            in_a_row, anywhere = " <-> ".join(parts), " & ".join(parts)
            yield f"({in_a_row} | ({_quoted(_LONG)} & {anywhere}))" if len(parts) > 1 else in_a_row


async def _pending(db: Db, search: Search) -> tuple[list[tuple[bytes, float]], bool]:
    """The newest contents that are not indexed yet, each with its share of the words, and whether there are more."""
    rows = await db.all(
        """SELECT content, CASE WHEN sum(octet_length(body)) OVER (ORDER BY number DESC) - octet_length(body) <= ?1
            THEN body END
        FROM (SELECT u.number, u.content, c.body FROM unindexed u JOIN contents c ON c.id = u.content
            ORDER BY u.number DESC LIMIT ?2) newest ORDER BY number DESC""",
        _PENDING_BYTES,
        _PENDING + 1,
    )
    read = [(content, body) for content, body in rows[:_PENDING] if body is not None]
    return [(content, search.coverage(_text(body))) for content, body in read], len(rows) > len(read)


async def windows_with(
    db: Db, tenant: str, contents: Sequence[bytes], links: int
) -> tuple[int, list[tuple[str, bytes, int]]]:
    """See `WordIndex.windows_with`."""
    (_, _, count), *rows = await db.all(_WINDOWS, tenant, links, list(contents))
    return count, rows

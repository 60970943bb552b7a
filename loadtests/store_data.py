"""Two stores with the same conversations, one on SQLite and one on PostgreSQL, filled in bulk.

Messages, their links and the index of words are written past the store; windows and sessions, whose messages are there
by then, through it. Every message has a word of its own conversation's and some as common as in natural language: the
n-th most common one with a frequency of about 1/n.
"""

import asyncio
import random
import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import orjson
from blake3 import blake3

from gateway.dialects.search_text import indexed
from gateway.records import Manifest, Session, Trace, Turn, Usage, Window
from gateway.sessions import prefix_chain
from gateway.store.postgres.words import vector
from gateway.store.store import Store
from gateway.store.types import Text, TurnRecord

TENANT = "default"
MODEL = "canned"
LENGTH = 100
"""Messages of a conversation."""
_POOL = 5_000  # texts; messages are these and a word of their own
_VOCABULARY = 20_000
_AT_ONCE = 250  # conversations
_TOPICS = ("refactor the parser", "read the logs of the night", "plan the migration", "answer the customer")


class Row(NamedTuple):
    """A message as the store has it."""

    content: bytes
    body: bytes
    link: bytes
    parent: bytes | None
    depth: int
    text: str


class Texts:
    """Conversations by their numbers."""

    def __init__(self) -> None:
        draw = random.Random(16)
        self.words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(_VOCABULARY)]
        weights = list(accumulate(1 / (n + 1) for n in range(_VOCABULARY)))
        self._pool = [" ".join(draw.choices(self.words, cum_weights=weights, k=(10, 30)[n % 2])) for n in range(_POOL)]

    def conversation(self, number: int) -> list[dict[str, Any]]:
        """A conversation: `c00042` is in each of its messages and in no other."""
        return [
            {
                "role": ("user", "assistant")[place % 2],
                "content": f"{name_of(number)} {place} {self._pool[(number * 37 + place * 11) % _POOL]}",
            }
            for place in range(LENGTH)
        ]


def name_of(number: int) -> str:
    """The name of a conversation's window and session."""
    return f"c{number:05}"


def _rows(messages: Sequence[dict[str, Any]]) -> Iterator[Row]:
    parent: bytes | None = None
    for depth, message in enumerate(messages):
        body = orjson.dumps(message)
        content = blake3(body).digest(16)
        link = blake3((parent or b"") + content).digest(16)
        yield Row(content, body, link, parent, depth, message["content"])
        parent = link


async def fill(stores: dict[str, Store], path: Path, url: str, conversations: int) -> None:
    """Fill both stores, which are open and empty."""
    texts = Texts()
    connection = await asyncpg.connect(url)
    await _prepare(connection)
    with sqlite3.connect(path) as db:
        for start in range(0, conversations, _AT_ONCE):
            rows = [
                row for n in range(start, min(start + _AT_ONCE, conversations)) for row in _rows(texts.conversation(n))
            ]
            _add_to_sqlite(db, rows)
            await _add_to_postgres(connection, rows)
        last = db.execute("SELECT rowid, id FROM contents ORDER BY rowid DESC LIMIT 1").fetchone()
        db.execute("INSERT OR REPLACE INTO meta VALUES ('searchable', ?)", (f"{last[0]}:{last[1].hex()}",))
    await _finish(connection)
    for store in stores.values():
        for start in range(0, conversations, _AT_ONCE):
            await _add_records(store, texts, range(start, min(start + _AT_ONCE, conversations)))
    await connection.execute("VACUUM ANALYZE")  # as autovacuum does some time later
    await connection.close()


def _add_to_sqlite(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    db.executemany("INSERT INTO contents VALUES (?, ?)", [(row.content, row.body) for row in rows])
    db.executemany("INSERT INTO links VALUES (?, ?, ?, ?)", [(r.link, r.parent, r.content, r.depth) for r in rows])
    (last,) = db.execute("SELECT coalesce(max(number), 0) FROM searchable").fetchone()
    numbered = list(enumerate(rows, last + 1))
    db.executemany("INSERT INTO searchable VALUES (?, ?)", [(number, row.content) for number, row in numbered])
    words = [(number, indexed(row.text)) for number, row in numbered]
    db.executemany("INSERT INTO message_words (rowid, words) VALUES (?, ?)", words)
    db.commit()


async def _prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    await connection.execute(
        """SET session_replication_role = replica; SET maintenance_work_mem = '512MB';
        DROP INDEX searchable_words; CREATE TEMP TABLE new_words (content bytea, words text)"""
    )


async def _add_to_postgres(connection: "asyncpg.Connection[asyncpg.Record]", rows: Sequence[Row]) -> None:
    await connection.copy_records_to_table("contents", records=[(row.content, row.body) for row in rows])
    links = [(row.link, row.parent, row.content, row.depth) for row in rows]
    await connection.copy_records_to_table("links", records=links)
    await connection.copy_records_to_table("new_words", records=[(row.content, vector(row.text)) for row in rows])
    await connection.execute(
        """INSERT INTO searchable (content, words) SELECT content, CAST(words AS tsvector) FROM new_words;
        TRUNCATE new_words"""
    )


async def _finish(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    await connection.execute("CREATE INDEX searchable_words ON searchable USING gin (words)")


async def _add_records(store: Store, texts: Texts, numbers: range) -> None:
    conversations = [(name_of(n), n, texts.conversation(n)) for n in numbers]
    await store.record([record(name, messages, 1.7e9 + n * 60) for name, n, messages in conversations])
    windows = (
        store.add_window(_window(name, n), Manifest(f"m-{name}", range(64), ()), Text(messages, {}))
        for name, n, messages in conversations
    )
    if not all(await asyncio.gather(*windows)):
        raise RuntimeError("a window is there already")


def record(session: str, messages: list[dict[str, Any]], at: float | None = None) -> TurnRecord:
    """A turn that has ended with a reply."""
    at = time.time() if at is None else at
    usage = Usage(20 * len(messages), 20, 16)
    turn = Turn(TENANT, session, MODEL, "completed", 200, at, 500.0, usage, engine="http://engine")
    trace: Trace = prefix_chain.trace(b"", messages[:-1], messages[-1])
    return TurnRecord(turn, Session(TENANT, session, session), "fp", f"salt-{session}", messages, {}, trace)


def _window(name: str, number: int) -> Window:
    return Window(
        tenant=TENANT, name=name, session_id=name, lineage=name, salt=f"salt-{name}", pin_salt=f"salt-{name}",
        model=MODEL, model_root=MODEL, fingerprint="fp", world_size=1, token_count=900 + number % 1000, chunk_size=256,
        chunk_count=0, size_bytes=number, kv="absent", transcript=b"", frame=None, manifest=f"m-{name}",
        created_at=1.7e9 + number * 60, description=f"{_TOPICS[number % len(_TOPICS)]}, part {number}",
        tags=("auto", f"team-{number % 10}"), receipt={"tokens": 10, "tiers": {}},
    )  # fmt: skip

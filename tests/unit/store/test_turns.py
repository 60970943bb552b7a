"""Turns and transcripts."""

import asyncio
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gateway.records import Alias, Session
from gateway.sessions import prefix_chain
from gateway.store import record_rows, transcript_rows
from gateway.store.database import finish
from gateway.store.schema import migrate
from gateway.store.sqlite import SqliteStore
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.types import TurnRecord
from tests.support.store_records import ODD, TENANT, Open, count, finished, messages_of, says

pytestmark = pytest.mark.anyio


async def test_first_turn_creates_its_session(store: Store) -> None:
    assert await store.session(TENANT, "a") is None
    await store.record([finished("a", says("hi", "hello"), frame={"tools": [1]})])
    session = await store.session(TENANT, "a")
    assert session is not None
    assert session.transcript is not None
    assert session.frame is not None
    assert session == Session(
        TENANT, "a", "a", "demo", "fp", "salt-a", "active", token_count=21, turn_count=1,
        transcript=session.transcript, frame=session.frame, created_at=100.0, last_active_at=100.5,
        first_message_hash=prefix_chain.head(says("hi")), last_request_hash=prefix_chain.link(b"", says("hi")[0]),
        answered=True, prompt_tokens=20, last_reply_hash=prefix_chain.chain(says("hi", "hello"), b"")[-1], title="hi",
    )  # fmt: skip
    assert await store.messages(session.transcript) == says("hi", "hello")
    assert await store.frame(session.frame) == {"tools": [1]}
    (turn,) = await store.turns(TENANT, "a", 10)
    assert turn == finished("a", says("hi", "hello")).turn


async def test_a_turn_is_counted_once_however_turns_are_batched(open_store: Open, tmp_path: Path) -> None:
    steps = [says("1", "a"), None, says("1", "a", "2", "b"), says("1", "a", "2", "b", "3", "c"), None]
    turns = [finished("s", messages, at=100.0 + n) for n, messages in enumerate(steps)]
    seen = []
    for number, cuts in enumerate([[5], [1, 1, 1, 1, 1], [2, 3], [3, 2]]):
        async with SqliteStore(tmp_path / f"{number}.db", turns_kept=5) as store:
            rest = list(turns)
            for cut in cuts:
                await store.record(rest[:cut])
                del rest[:cut]
            seen.append((await store.session(TENANT, "s"), await store.turns(TENANT, "s", 9)))
            assert await messages_of(store, "s") == says("1", "a", "2", "b", "3", "c")
    assert seen[0] == seen[1] == seen[2] == seen[3]
    session, kept = seen[0]
    assert session is not None
    assert (session.turn_count, session.token_count, session.last_active_at) == (3, 61, 104.5)
    assert [turn.started_at for turn in kept] == [104.0, 103.0, 102.0, 101.0, 100.0]


async def test_batch_of_many_sessions_keeps_them_apart(store: Store) -> None:
    batch = [finished(f"s{n % 7}", says(*(str(i) for i in range(2 * (n // 7) + 2)))) for n in range(28)]
    await store.record([*batch, finished("s0", says("other tenant", "x"), tenant="other")])
    for n in range(7):
        session = await store.session(TENANT, f"s{n}")
        assert session is not None
        assert session.turn_count == 4
        assert len(await messages_of(store, f"s{n}")) == 8
    other = await store.session("other", "s0")
    assert other is not None
    assert other.turn_count == 1


async def test_turn_without_a_reply_updates_activity_only(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    before = await store.session(TENANT, "s")
    await store.record([finished("s", None, at=200.0)])
    after = await store.session(TENANT, "s")
    assert before is not None
    assert after == structs.replace(before, last_active_at=200.5, last_request_hash=None, answered=False)
    assert [turn.outcome for turn in await store.turns(TENANT, "s", 9)] == ["client_gone", "completed"]


def links(*texts: str) -> list[bytes]:
    """The chain of a conversation, longest first."""
    return prefix_chain.chain(says(*texts), b"")[::-1]


async def test_longest_known_prefix_finds_its_sessions(store: Store) -> None:
    await store.record(
        [finished("further", says("1", "a", "2", "b"), at=1.0), finished("here", says("1", "a"), at=0.0)]
    )
    await store.record([finished("further", says("1", "a"), at=3.0)])
    found, sessions = await store.sessions_by_prefix(TENANT, links("1", "a", "2"))
    assert found == links("1", "a", "2")[0]
    assert [session.id for session in sessions] == ["further"]
    found, sessions = await store.sessions_by_prefix(TENANT, links("1", "a", "x", "y"))
    assert found == links("1", "a")[0]
    assert [session.id for session in sessions] == ["further", "here"]
    assert await store.sessions_by_prefix("other", links("1", "a")) == (None, [])
    assert await store.sessions_by_prefix(TENANT, links("9")) == (None, [])


async def test_long_prefix_is_found_by_its_known_part(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    long = ("1", "a", *(str(n) for n in range(2000)))
    found, sessions = await store.sessions_by_prefix(TENANT, links(*long))
    assert (found, [session.id for session in sessions]) == (links("1", "a")[0], ["s"])


async def test_reply_is_found_by_alias_after_later_turns(store: Store) -> None:
    def named(said: bytes, history: bytes, question: bytes) -> Alias:
        return Alias(said, history, question, b"after " + history + question)

    def ending(session: str, reply: str, *names: Alias) -> TurnRecord:
        turn = finished(session, says("1", reply))
        return structs.replace(turn, trace=structs.replace(turn.trace, aliases=names))

    async def known(*names: Alias) -> list[tuple[str, bytes, bool]]:
        return [
            (one.session.id, one.alias.marks, one.current) for one in await store.sessions_by_reply_alias(TENANT, names)
        ]

    one, two = named(b"said", b"h", b"q"), named(b"said", b"h", b"r")
    await store.record([ending("s", "a", one), ending("t", "a", two), ending("u", "a", named(b"said", b"", b"q"))])
    assert sorted(await known(one)) == [("s", b"after hq", True), ("t", b"after hr", True), ("u", b"after q", True)]
    await store.record([ending("s", "b", named(b"said", b"h", b"s"))])
    assert sorted(await known(two))[:2] == [("s", b"after hq", False), ("s", b"after hs", True)]
    assert (await known(two))[-1] == ("s", b"after hq", False)  # not its last reply any more
    await store.record([ending("s", "c", one)])
    assert ("s", b"after hq", True) in await known(one)  # asked anew: the row is of the last turn that had this reply
    assert await known(named(b"unsaid", b"h", b"q")) == []
    assert await store.sessions_by_reply_alias("other", [one]) == []
    assert await store.delete_session(TENANT, "u")
    assert "u" not in {session for session, _, _ in await known(one)}


async def test_common_short_reply_is_found_by_what_it_replies_to(store: Store) -> None:
    def ending(number: int) -> TurnRecord:
        turn = finished(f"s{number:03}", says(str(number), "a"))
        names = tuple(
            Alias(link, b"h%d" % (number // 40), b"q%d" % number, b"") for link in (b"ok", b"ok of one prompt")
        )
        return structs.replace(turn, trace=structs.replace(turn.trace, aliases=names))

    async def known(history: bytes, question: bytes) -> set[str]:
        names = [Alias(link, history, question, b"") for link in (b"ok", b"ok of one prompt")]
        return {one.session.id for one in await store.sessions_by_reply_alias(TENANT, names)}

    await store.record([ending(number) for number in range(200)])
    assert "s177" in await known(b"h4", b"q177")
    assert len({name for name in await known(b"h4", b"") if "s160" <= name < "s200"}) >= 32
    assert 0 < len(await known(b"", b"")) < 200  # some of them


async def test_sessions_with_a_turn_come_before_thawed_ones(store: Store) -> None:
    await store.record([finished("original", says("1", "a"))])
    (tip,) = links("1", "a")[:1]
    now = time.time()
    thawed = Session(TENANT, "thawed", "s", last_reply_hash=tip, created_at=now, last_active_at=now)
    assert await store.add_sessions([thawed]) is None
    _, sessions = await store.sessions_by_prefix(TENANT, [tip])
    assert [one.id for one in sessions] == ["original", "thawed"]


async def test_idle_sessions_are_deleted_with_all_they_had(store: Store) -> None:
    await store.record([finished(f"s{n}", says("shared", "a", str(n), "b"), at=float(n)) for n in range(60)])
    assert await store.forget_idle(2) == 58
    left, total = await store.list_sessions(TENANT, state=None, model=None, limit=9, offset=0)
    assert (total, [session.id for session in left]) == (2, ["s59", "s58"])
    assert await messages_of(store, "s59") == says("shared", "a", "59", "b")
    assert await store.sessions_by_prefix(TENANT, links("shared", "a", "5")) == (None, [])
    counts = {table: await count(store, table) for table in ("links", "contents", "session_prefixes", "turns")}
    # Of each conversation that is left: a link for "shared", "a", its own number and its reply; and one frame for all.
    assert counts == {"links": 6, "contents": 6, "session_prefixes": 4, "turns": 2}
    assert await store.forget_idle(2) == 0


async def test_retried_reply_leaves_no_link_behind(store: Store) -> None:
    for reply in ("a", "b", "c"):
        await store.record([finished("s", says("1", reply))])
    assert await count(store, "links") == 2


async def test_a_session_whose_only_turn_failed_has_no_transcript(store: Store) -> None:
    await store.record([finished("s", None)])
    session = await store.session(TENANT, "s")
    assert session is not None
    assert (session.transcript, session.turn_count, session.state) == (None, 0, "active")


async def test_only_the_last_turns_are_kept(store: Store) -> None:
    for start in (0, 3, 9):
        await store.record([finished("s", says("1", "a"), at=float(start + n)) for n in range(6)])
        await store.record([finished("other", says("1", "a"))])
    assert [turn.started_at for turn in await store.turns(TENANT, "s", 9)] == [14.0, 13.0, 12.0, 11.0, 10.0]
    assert len(await store.turns(TENANT, "other", 9)) == 3
    assert len(await store.turns(TENANT, "s", 2)) == 2


async def test_messages_are_read_as_they_were_recorded(store: Store) -> None:
    await store.record([finished("s", ODD)])
    assert await messages_of(store, "s") == ODD


async def test_repeated_message_is_kept_twice(store: Store) -> None:
    same = [{"role": "user", "content": "x"}] * 5
    await store.record([finished("s", same)])
    assert await messages_of(store, "s") == same


async def test_forks_and_edits_have_transcripts_of_their_own(store: Store) -> None:
    await store.record([finished("a", says("1", "x", "2", "y"))])
    await store.record([finished("fork", says("1", "x", "other", "z"))])
    await store.record([finished("edited", says("one", "x", "2", "y"))])
    await store.record([finished("a", says("1", "x"))])  # the client went back
    assert await messages_of(store, "a") == says("1", "x")
    assert await messages_of(store, "fork") == says("1", "x", "other", "z")
    assert await messages_of(store, "edited") == says("one", "x", "2", "y")


async def test_turn_that_cannot_be_written_does_not_affect_others(store: Store) -> None:
    bad = [{"role": "user", "content": {1, 2}}]
    good = [store.record([finished(f"s{n}", says("1", "a"))]) for n in range(10)]
    results = await asyncio.gather(*good[:5], store.record([finished("bad", bad)]), *good[5:], return_exceptions=True)
    assert [type(r) for r in results].count(type(None)) == 10
    assert isinstance(results[5], TypeError)
    assert await store.session(TENANT, "bad") is None
    _, total = await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0)
    assert total == 10


class Counting(SqliteDb):
    """Counts statements, each of which is a round trip on PostgreSQL."""

    statements = 0

    async def value(self, sql: str, *args: Any) -> Any:
        self.statements += 1
        return await super().value(sql, *args)

    async def one(self, sql: str, *args: Any) -> Any:
        self.statements += 1
        return await super().one(sql, *args)

    async def all(self, sql: str, *args: Any) -> list[Any]:
        self.statements += 1
        return await super().all(sql, *args)

    async def run(self, sql: str, *args: Any) -> int:
        self.statements += 1
        return await super().run(sql, *args)

    async def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self.statements += 1
        await super().many(sql, rows)


def test_many_turns_take_as_many_statements_as_a_few() -> None:
    taken = []
    for sessions in (2, 40):
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            migrate(connection)
            for texts in (("1", "a"), ("1", "a", "2", "b")):
                db = Counting(connection)
                turns = [finished(f"s{number}", says(f"{number}", *texts[1:])) for number in range(sessions)]
                finish(record_rows.record(db, turns, 5))
            taken.append(db.statements)
    assert taken[0] == taken[1] <= 10


def test_what_is_stored_of_a_long_transcript_is_found_out_in_few_statements() -> None:
    texts = [f"said {number}" for number in range(500)]
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate(connection)
        for name, count in (("new", 500), ("longer", 500), ("shorter", 317), ("changed", 300)):
            messages = says(*texts[:count], *([] if name in ("new", "shorter") else [name, "and so on"]))
            db = Counting(connection)
            finish(record_rows.record(db, [finished(name, messages)], 5))
            assert db.statements < 30, name
            transcript = connection.execute("SELECT transcript FROM sessions WHERE id = ?", (name,)).fetchone()[0]
            assert finish(transcript_rows.messages(db, transcript)) == messages
        # Each message once, and the links that only the other transcripts have.
        assert connection.execute("SELECT count(*) FROM links").fetchone() == (504,)

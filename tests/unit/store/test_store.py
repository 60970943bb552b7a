"""What every store promises, asked of each implementation; then what only a file on a disk can suffer."""

import asyncio
import re
import sqlite3
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError, StartError
from gateway.kv.keys import ObjectKey
from gateway.records import Alias, Manifest, PinnedObject, Session, Succession, Trace, Turn, Usage, Window
from gateway.sessions import prefix_chain
from gateway.store import transcript_rows
from gateway.store.schema import MIGRATIONS, migrate
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Store
from gateway.store.types import Released, Text, TurnRecord, WindowQuery
from tests.support.gateway_process import ROOT
from tests.support.tier_harness import key, keys, lose_text, small_disk, spelled

pytestmark = pytest.mark.anyio

Open = Callable[[], AbstractAsyncContextManager[Store]]
TENANT = "default"


@pytest.fixture(params=["sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store each time it is called."""
    assert request.param == "sqlite"
    return lambda: SqliteStore(tmp_path / "gateway.db", turns_kept=5)


@pytest.fixture
async def store(open_store: Open) -> AsyncIterator[Store]:
    async with open_store() as store:
        yield store


def says(*texts: str) -> list[dict[str, Any]]:
    """A conversation."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]


def finished(
    session: str, messages: list[dict[str, Any]] | None, *, at: float = 100.0, tenant: str = TENANT, **more: Any
) -> TurnRecord:
    """A turn that is over."""
    usage = None if messages is None else Usage(10 * len(messages), 1, 2)
    turn = Turn(tenant, session, "demo", "completed" if messages else "client_gone", 200, at, 500.0, usage)
    trace = prefix_chain.trace(b"", messages[:-1], messages[-1]) if messages else Trace(b"", b"", None)
    began = Session(tenant, session, session)
    return TurnRecord(turn, began, "fp", f"salt-{session}", messages, more.pop("frame", {}), trace, **more)


def window(name: str, transcript: bytes = b"", **more: Any) -> Window:
    """A window without KV."""
    plain = Window(
        tenant=TENANT, name=name, session_id="s", lineage="s", salt="salt", pin_salt="salt", model="demo",
        model_root="org/demo", fingerprint="fp",
        world_size=1, token_count=10, chunk_size=4, chunk_count=2, size_bytes=100, kv="complete",
        transcript=transcript, frame=None, manifest=f"m-{name}", created_at=1000.0, receipt={"tokens": 10},
    )  # fmt: skip
    return replace(plain, **more)


def manifest(name: str, held: Iterable[ObjectKey] = (), tiers: tuple[str, ...] = ("disk",)) -> Manifest:
    """What a window is made of."""
    objects = tuple(
        PinnedObject(str(one), tier, 50, f"{tier}{one.chunk_hash}".encode()) for one in held for tier in tiers
    )
    return Manifest(f"m-{name}", (1, 2, 2**32 - 1), objects)


async def add(
    store: Store, name: str, held: Iterable[ObjectKey] = (), text: Text | None = None, seen: Session | None = None,
    **more: Any,
) -> Window:  # fmt: skip
    """Commit a window."""
    made = window(name, **more)
    committed = await store.add_window(
        made, replace(manifest(name, held), id=made.manifest), text or Text(says("said", "so")), seen=seen
    )
    assert committed is not None
    return committed


async def freeze(store: Store, session: str, name: str, at: float = 1000.0) -> Window:
    """Commit what a session has now."""
    found = await store.snapshot(TENANT, session)
    assert found is not None
    return await add(store, name, text=found[1], seen=found[0], created_at=at)


async def messages_of(store: Store, session: str) -> list[dict[str, Any]]:
    """The transcript of a session."""
    found = await store.session(TENANT, session)
    assert found is not None
    assert found.transcript is not None
    return await store.messages(found.transcript)


# --- turns


async def test_a_first_turn_makes_its_session(store: Store) -> None:
    assert await store.session(TENANT, "a") is None
    await store.record([finished("a", says("hi", "hello"), frame={"tools": [1]})])
    session = await store.session(TENANT, "a")
    assert session is not None
    assert session.transcript is not None
    assert session.frame is not None
    assert session == Session(
        TENANT, "a", "a", "demo", "fp", "salt-a", "active", token_count=21, turn_count=1,
        transcript=session.transcript, frame=session.frame, created_at=100.0, last_active_at=100.5,
        head=prefix_chain.head(says("hi")), asked=prefix_chain.link(b"", says("hi")[0]), answered=True,
        prompt_tokens=20, tip=prefix_chain.chain(says("hi", "hello"), b"")[-1],
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


async def test_a_batch_of_many_sessions_keeps_them_apart(store: Store) -> None:
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


async def test_a_turn_without_a_reply_moves_the_clock_and_leaves_a_question_open(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    before = await store.session(TENANT, "s")
    await store.record([finished("s", None, at=200.0)])
    after = await store.session(TENANT, "s")
    assert before is not None
    assert after == replace(before, last_active_at=200.5, asked=None, answered=False)
    assert [turn.outcome for turn in await store.turns(TENANT, "s", 9)] == ["client_gone", "completed"]


def links(*texts: str) -> list[bytes]:
    """The chain of a conversation, longest first."""
    return prefix_chain.chain(says(*texts), b"")[::-1]


async def test_the_longest_known_beginning_names_the_sessions_that_have_been_there(store: Store) -> None:
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


async def test_a_long_beginning_of_which_only_the_first_part_is_known_is_found(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    long = ("1", "a", *(str(n) for n in range(2000)))
    found, sessions = await store.sessions_by_prefix(TENANT, links(*long))
    assert (found, [session.id for session in sessions]) == (links("1", "a")[0], ["s"])


async def test_a_reply_is_known_by_its_further_names_also_when_its_session_has_gone_on(store: Store) -> None:
    def named(said: bytes, history: bytes, question: bytes) -> Alias:
        return Alias(said, history, question, b"after " + history + question)

    def ending(session: str, reply: str, *names: Alias) -> TurnRecord:
        turn = finished(session, says("1", reply))
        return replace(turn, trace=replace(turn.trace, ends=names))

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


async def test_a_short_reply_that_many_gave_is_found_by_what_it_answers(store: Store) -> None:
    def ending(number: int) -> TurnRecord:
        turn = finished(f"s{number:03}", says(str(number), "a"))
        names = tuple(
            Alias(link, b"h%d" % (number // 40), b"q%d" % number, b"") for link in (b"ok", b"ok of one prompt")
        )
        return replace(turn, trace=replace(turn.trace, ends=names))

    async def known(history: bytes, question: bytes) -> set[str]:
        names = [Alias(link, history, question, b"") for link in (b"ok", b"ok of one prompt")]
        return {one.session.id for one in await store.sessions_by_reply_alias(TENANT, names)}

    await store.record([ending(number) for number in range(200)])
    assert "s177" in await known(b"h4", b"q177")
    assert len({name for name in await known(b"h4", b"") if "s160" <= name < "s200"}) >= 32
    assert 0 < len(await known(b"", b"")) < 200  # some of them


async def test_of_sessions_at_one_reply_those_that_had_a_turn_come_before_those_that_were_thawed(store: Store) -> None:
    await store.record([finished("original", says("1", "a"))])
    (tip,) = links("1", "a")[:1]
    now = time.time()
    assert await store.add_session(Session(TENANT, "thawed", "s", tip=tip, created_at=now, last_active_at=now))
    _, sessions = await store.sessions_by_prefix(TENANT, [tip])
    assert [one.id for one in sessions] == ["original", "thawed"]


async def test_who_was_idle_longest_is_forgotten_with_all_that_it_alone_held(store: Store, tmp_path: Path) -> None:
    await store.record([finished(f"s{n}", says("shared", "a", str(n), "b"), at=float(n)) for n in range(60)])
    assert await store.forget_idle(2) == 58
    left, total = await store.list_sessions(TENANT, state=None, model=None, limit=9, offset=0)
    assert (total, [session.id for session in left]) == (2, ["s59", "s58"])
    assert await messages_of(store, "s59") == says("shared", "a", "59", "b")
    assert await store.sessions_by_prefix(TENANT, links("shared", "a", "5")) == (None, [])
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        counts = {
            table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("links", "contents", "beginnings", "turns")
        }
    # Of each conversation that is left: a link for "shared", "a", its own number and its reply; and one frame for all.
    assert counts == {"links": 6, "contents": 6, "beginnings": 4, "turns": 2}
    assert await store.forget_idle(2) == 0


async def test_a_reply_that_was_asked_anew_leaves_no_link_behind(store: Store, tmp_path: Path) -> None:
    for reply in ("a", "b", "c"):
        await store.record([finished("s", says("1", reply))])
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        assert db.execute("SELECT count(*) FROM links").fetchone() == (2,)


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


ODD: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "日本語 🎉 \u0000 \\ \" ' %"}], "name": ""},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": '{"a": 1e400}'}}]},
    {"role": "tool", "content": "", "tool_call_id": "1", "deep": {"a": [{"b": [[]]}]}},
    {"role": "user", "content": "x" * 1_000_000, "numbers": [0.1, -0.0, 2**53, 2**64 - 1, 1e308]},
]  # fmt: skip


async def test_messages_come_back_as_they_went_in(store: Store) -> None:
    await store.record([finished("s", ODD)])
    assert await messages_of(store, "s") == ODD


async def test_the_same_message_twice_in_a_row_is_there_twice(store: Store) -> None:
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


async def test_one_turn_that_cannot_be_written_does_not_harm_those_beside_it(store: Store) -> None:
    bad = [{"role": "user", "content": {1, 2}}]
    good = [store.record([finished(f"s{n}", says("1", "a"))]) for n in range(10)]
    results = await asyncio.gather(*good[:5], store.record([finished("bad", bad)]), *good[5:], return_exceptions=True)
    assert [type(r) for r in results].count(type(None)) == 10
    assert isinstance(results[5], TypeError)
    assert await store.session(TENANT, "bad") is None
    _, total = await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0)
    assert total == 10


# --- sessions


async def test_two_sessions_of_one_id_at_once_are_one(store: Store) -> None:
    added = await asyncio.gather(*(store.add_session(Session(TENANT, "s", f"lineage-{n}")) for n in range(8)))
    assert sorted(added) == [False] * 7 + [True]
    session = await store.session(TENANT, "s")
    assert session is not None
    assert session.lineage == f"lineage-{added.index(True)}"
    assert await store.add_session(Session("other", "s", "x"))


async def test_sessions_that_are_added_at_once_are_added_all_or_none(store: Store) -> None:
    first = [Session(TENANT, f"s{n}", "lineage") for n in range(3)]
    assert await store.add_sessions(first) is None
    assert await store.add_sessions([Session(TENANT, "new", "l"), Session(TENANT, "s1", "l")]) == "s1"
    assert await store.session(TENANT, "new") is None
    assert (await store.list_sessions(TENANT, state=None, model=None, limit=10, offset=0))[1] == 3


async def test_a_session_that_went_on_while_it_was_frozen_stays_active(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.snapshot(TENANT, "s")
    assert seen is not None
    await store.record([finished("s", says("1", "a", "2", "b"))])
    await add(store, "before", text=seen[1], seen=seen[0], created_at=300.0)
    session = await store.session(TENANT, "s")
    assert session is not None
    assert (session.state, session.frozen_at) == ("active", None)
    await freeze(store, "s", "after", at=300.0)
    session = await store.session(TENANT, "s")
    assert session is not None
    assert (session.state, session.frozen_at) == ("frozen", 300.0)
    await store.record([finished("s", says("1", "a", "2", "b", "3", "c"))])
    session = await store.session(TENANT, "s")
    assert session is not None
    assert session.state == "active"


async def test_what_was_read_is_committed_whatever_became_of_the_session(store: Store) -> None:
    """Edited, deleted, or deleted and begun anew under its id, with as many turns."""
    for number, meanwhile in enumerate((says("other", "x"), None, says("stranger", "y"))):
        await store.record([finished("s", says("1", "a"), frame={"tools": [number]}, at=float(number))])
        seen = await store.snapshot(TENANT, "s")
        assert seen is not None
        if number:
            await store.delete_session(TENANT, "s")
        if meanwhile:
            await store.record([finished("s", meanwhile, at=50.0 + number)])
        made = await add(store, f"w{number}", text=seen[1], seen=seen[0])
        assert await store.text(made) == Text(says("1", "a"), {"tools": [number]})
        session = await store.session(TENANT, "s")
        assert session is None or session.state == "active"
        assert number == 0 or made.salt in {loose.salt for loose in await store.orphaned_salts()}
        await store.delete_session(TENANT, "s")


async def test_a_window_that_nobody_asked_for_is_not_made_of_a_session_that_was_deleted(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.snapshot(TENANT, "s")
    assert seen is not None
    await store.delete_session(TENANT, "s")
    await store.record([finished("s", says("1", "a"), at=77.0)])
    with pytest.raises(GatewayError, match="'s' was deleted while it was frozen") as caught:
        await store.add_window(window("w"), manifest("w", [key(1)]), seen[1], seen=seen[0], wanted=False)
    assert caught.value.code == "session_not_found"
    assert (await store.window(TENANT, "w"), await store.held_objects()) == (None, set())


async def test_the_parent_of_a_window_is_the_one_that_its_session_came_from(store: Store) -> None:
    await add(store, "w", created_at=1.0)
    thawed = Session(TENANT, "t", "s", state="thawed", window="w", created_at=2.0)
    await store.add_session(thawed)
    assert (await add(store, "child", seen=thawed)).parent == "w"
    await store.delete_session(TENANT, "t")
    assert (await add(store, "orphan", seen=thawed)).parent == "w"
    await store.delete_window(TENANT, "w")
    await add(store, "w", created_at=3.0)
    assert (await add(store, "stranger", seen=thawed)).parent is None


async def test_no_window_is_added_without_text_and_none_loses_it(store: Store, tmp_path: Path) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="without its text"):
        await store.add_window(window("w"), manifest("w"), Text([]))
    made = await add(store, "w")
    with pytest.raises(sqlite3.IntegrityError, match="without its text"):
        await store.copy_window(replace(made, name="copy", frame=b"none"), made, None)
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("DELETE FROM links")


async def test_a_window_whose_text_an_older_version_lost_is_told_of_and_nothing_begins_with_it(
    store: Store, tmp_path: Path
) -> None:
    whole, made = await add(store, "whole"), await add(store, "w", text=Text(says("lost", "text")))
    assert await store.windows_without_text() == []
    lose_text(tmp_path / "gateway.db", "w")
    assert await store.windows_without_text() == [(TENANT, "w")]
    began = Session(TENANT, "t", "s", transcript=made.transcript)
    for attempt in (
        store.text(made),
        store.copy_window(replace(made, name="copy"), made, None),
        store.add_sessions([began], source=made),
    ):
        with pytest.raises(GatewayError, match="text of window 'w' is gone") as caught:
            await attempt
        assert caught.value.code == "window_corrupted"
    assert (await store.session(TENANT, "t"), await store.window(TENANT, "copy")) == (None, None)
    assert await store.text(whole) == Text(says("said", "so"))
    assert await store.delete_window(TENANT, "w")


async def test_nothing_begins_with_a_window_that_is_another_by_now(store: Store) -> None:
    made = await add(store, "w")
    await store.delete_window(TENANT, "w")
    for again in (False, True):
        if again:
            await add(store, "w", created_at=2000.0)
        for attempt in (
            store.text(made),
            store.check_there(made),
            store.copy_window(replace(made, name="copy"), made, None),
            store.add_session(Session(TENANT, "t", "s", transcript=made.transcript), source=made),
        ):
            with pytest.raises(GatewayError, match="'w' was deleted just now") as caught:
                await attempt
            assert caught.value.code == "window_not_found"
    assert (await store.session(TENANT, "t"), await store.window(TENANT, "copy")) == (None, None)


async def test_only_an_automatic_window_is_superseded(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    session = await store.session(TENANT, "s")
    assert session is not None
    assert await store.claim_freeze(session, now=1.0, until=2.0, cool=True)
    await add(store, "w", tags=("auto",))
    await store.report_freeze(session, window="w", not_before=0.0)
    assert await store.auto_windows(TENANT, "s") == ["w"]
    assert await store.delete_window(TENANT, "w", automatic_of="other") is None
    await store.describe_window(TENANT, "w", {"tags": ()})
    assert await store.delete_window(TENANT, "w", automatic_of="s") is None
    await store.describe_window(TENANT, "w", {"tags": ("auto",)})
    assert await store.delete_window(TENANT, "w", automatic_of="s")


async def test_a_claim_keeps_to_the_cool_down_and_to_no_time_that_only_a_wrong_clock_can_have_set(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.session(TENANT, "s")
    assert seen is not None
    assert await store.claim_freeze(seen, now=1.0, until=2.0, cool=True)
    await store.report_freeze(seen, window=None, not_before=100.0)
    assert not await store.claim_freeze(seen, now=99.0, until=100.0, cool=True)
    assert not await store.claim_freeze(seen, now=50.0, until=51.0, latest=100.0, cool=True)
    assert await store.claim_freeze(seen, now=50.0, until=500.0, latest=99.0, cool=True)
    assert not await store.claim_freeze(seen, now=51.0, until=52.0, latest=501.0, cool=False), "it is claimed"
    assert await store.claim_freeze(seen, now=51.0, until=52.0, latest=499.0, cool=False)


async def test_a_claim_is_of_one_session_and_not_of_another_of_its_id(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.session(TENANT, "s")
    assert seen is not None
    await store.delete_session(TENANT, "s")
    await store.record([finished("s", says("2", "b"), at=77.0)])
    assert not await store.claim_freeze(seen, now=1.0, until=2.0, cool=True)
    now = await store.session(TENANT, "s")
    assert now is not None
    assert await store.claim_freeze(now, now=1.0, until=2.0, cool=True)
    await store.report_freeze(seen, window=None, not_before=9.0)
    assert not await store.claim_freeze(now, now=1.5, until=3.0, cool=False), "it is still claimed"


async def test_a_successor_is_given_only_to_the_session_that_was_seen(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.session(TENANT, "s")
    assert seen is not None
    step = Succession(TENANT, "s", "s.2", "w", 1, b"link")
    new = Session(TENANT, "s.2", "s")
    with pytest.raises(GatewayError, match="its window 'w' was deleted"):
        await store.succeed(step, new, seen=seen)
    await freeze(store, "s", "w")
    await store.add_session(new)
    with pytest.raises(GatewayError, match=r"another session took the id 's\.2'"):
        await store.succeed(step, new, seen=seen)
    await store.delete_session(TENANT, "s.2")
    await store.record([finished("s", says("1", "b"))])
    with pytest.raises(GatewayError, match="it went on, or was deleted") as caught:
        await store.succeed(step, new, seen=seen)
    assert caught.value.code == "session_busy"
    assert await store.successions(TENANT, "s") == []
    await store.record([finished("s", says("1", "a"))])
    now = await store.session(TENANT, "s")
    assert now is not None
    assert await store.succeed(step, new, seen=now) == step
    assert await store.succeed(replace(step, successor="s.3"), new, seen=now) == step


async def test_sessions_are_listed_by_activity_and_filtered(store: Store) -> None:
    for n in range(6):
        await store.record([finished(f"s{n}", says("1", "a"), at=float(n))])
    await freeze(store, "s2", "w")
    await store.add_session(Session(TENANT, "t", "l", model="other", state="thawed", last_active_at=3.7))

    async def ids(limit: int = 99, offset: int = 0, state: Any = None, model: str | None = None) -> list[str]:
        page, total = await store.list_sessions(TENANT, state=state, model=model, limit=limit, offset=offset)
        assert len(page) == min(limit, max(0, total - offset))
        return [session.id for session in page]

    assert await ids() == ["s5", "s4", "t", "s3", "s2", "s1", "s0"]
    assert await ids(limit=2, offset=1) == ["s4", "t"]
    assert await ids(offset=99) == []
    assert await ids(state="frozen") == ["s2"]
    assert await ids(model="other") == await ids(state="thawed") == ["t"]
    assert await ids(model="othe") == []
    page, total = await store.list_sessions(TENANT, state="expired", model=None, limit=9, offset=0, expired_by=2.9)
    assert ([one.id for one in page], total) == (["s2", "s1", "s0"], 3)  # whatever they were
    left, _ = await store.list_sessions(TENANT, state="active", model=None, limit=9, offset=0, expired_by=2.9)
    assert [one.id for one in left] == ["s5", "s4", "s3"]
    assert await store.list_sessions("nobody", state=None, model=None, limit=9, offset=0) == ([], 0)


async def test_a_lineage_is_in_use_while_one_of_its_sessions_goes_on(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    assert await store.lineage_in_use(TENANT, "s")
    assert not await store.lineage_in_use("other", "s")
    await freeze(store, "s", "w")
    assert not await store.lineage_in_use(TENANT, "s")
    await store.add_session(Session(TENANT, "t", "s", state="thawed"))
    assert await store.lineage_in_use(TENANT, "s")
    await store.delete_session(TENANT, "t")
    assert not await store.lineage_in_use(TENANT, "s")


async def test_a_deleted_session_is_gone_with_its_turns_and_a_new_one_inherits_nothing(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    assert await store.delete_session(TENANT, "s")
    assert not await store.delete_session(TENANT, "s")
    assert (await store.session(TENANT, "s"), await store.turns(TENANT, "s", 9)) == (None, [])
    await store.record([finished("s", says("new", "b"))])
    session = await store.session(TENANT, "s")
    assert session is not None
    assert session.turn_count == len(await store.turns(TENANT, "s", 9)) == 1


async def test_what_another_session_or_a_window_shares_outlives_a_deletion(store: Store) -> None:
    await store.record([finished("a", says("1", "x", "2", "y"), frame={"tools": ["t"]})])
    await store.record([finished("b", says("1", "x", "3", "z"))])
    a = await store.session(TENANT, "a")
    assert a is not None
    await freeze(store, "a", "w")
    await store.delete_session(TENANT, "a")
    assert a.transcript is not None
    assert a.frame is not None
    assert await store.messages(a.transcript) == says("1", "x", "2", "y")
    assert await store.frame(a.frame) == {"tools": ["t"]}
    await store.delete_window(TENANT, "w")
    assert await store.messages(a.transcript) == []
    assert await messages_of(store, "b") == says("1", "x", "3", "z")


async def test_a_thawed_session_keeps_the_transcript_of_a_window_that_is_deleted(store: Store) -> None:
    await store.record([finished("a", says("1", "x"))])
    a = await store.session(TENANT, "a")
    assert a is not None
    assert a.transcript is not None
    await freeze(store, "a", "w")
    thawed = Session(
        TENANT, "t", "a", state="thawed", transcript=a.transcript, window="w", window_transcript=a.transcript
    )
    await store.add_session(thawed)
    await store.record([finished("t", says("1", "x", "2", "y"))])
    await store.delete_session(TENANT, "a")
    await store.delete_window(TENANT, "w")
    t = await store.session(TENANT, "t")
    assert t is not None
    assert t.window is None
    assert t.window_transcript is not None
    assert await store.messages(t.window_transcript) == says("1", "x")


# --- windows


async def test_a_window_comes_back_as_it_went_in(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    s = await store.session(TENANT, "s")
    assert s is not None
    assert s.transcript is not None
    made = window(
        "w", transcript=s.transcript, frame=s.frame, description="d", tags=("b", "a", "été"), expires_at=2000.5,
        receipt={"tiers": {"disk": {"objects": 2}}, "cached_tokens": None},
    )  # fmt: skip
    text = Text(says("1", "a"), await store.frame(s.frame or b""))
    assert await store.add_window(replace(made, transcript=b"", frame=None), manifest("w", keys(2)), text) == made
    assert await store.window(TENANT, "w") == made
    assert await store.manifest(made) == manifest("w", keys(2))
    assert await store.pinned(made) == manifest("w", keys(2)).objects
    assert await store.window(TENANT, "W") is None
    assert await store.window("other", "w") is None


async def test_two_windows_of_one_name_at_once_are_one_and_leave_one_manifest(store: Store) -> None:
    made = [window("w", manifest=f"m-{n}", description=str(n)) for n in range(8)]
    added = await asyncio.gather(
        *(
            store.add_window(one, replace(manifest("x", [key(n)]), id=one.manifest), Text(says(str(n))))
            for n, one in enumerate(made)
        )
    )
    ((winner, committed),) = [(n, one) for n, one in enumerate(added) if one is not None]
    assert await store.window(TENANT, "w") == committed
    assert await store.text(committed) == Text(says(str(winner)))
    assert await store.held_objects() == {key(winner)}
    await add(store, "w", tenant="other")


async def test_lists_filter_sort_and_page(store: Store) -> None:
    await add(store, "b", created_at=1.0, token_count=30, size_bytes=5, tags=("x",), model="m1")
    await add(store, "a", created_at=2.0, token_count=20, size_bytes=9, tags=("x", "y"), session_id="other")
    await add(store, "d", created_at=3.0, token_count=10, size_bytes=7, tags=("y", "été"))
    await add(store, "c", created_at=3.0, token_count=10, size_bytes=7)
    await add(store, "x", tenant="other", manifest="m-other")

    async def names(**query: Any) -> list[str]:
        page, total = await store.list_windows(TENANT, WindowQuery(**query))
        assert total == len(page)
        return [one.name for one in page]

    assert await names() == ["c", "d", "a", "b"]  # newest first, names where that does not tell
    assert await names(sort_by="name", descending=False) == ["a", "b", "c", "d"]
    assert await names(sort_by="name") == ["d", "c", "b", "a"]
    assert await names(sort_by="token_count") == ["b", "a", "c", "d"]
    assert await names(sort_by="size") == ["a", "c", "d", "b"]
    assert await names(sort_by="size", descending=False) == ["b", "d", "c", "a"]  # the same the other way round
    assert await names(tags=("x",)) == ["a", "b"]
    assert await names(tags=("x", "y")) == ["a"]
    assert await names(tags=("été",)) == ["d"]
    assert await names(tags=("x", "z")) == await names(tags=("X",)) == []
    assert (await names(model="m1"), await names(session_id="other")) == (["b"], ["a"])
    assert await names(created_after=1.0, created_before=3.0) == ["a"]  # both ends are outside
    page, total = await store.list_windows(TENANT, WindowQuery(limit=3, offset=2, sort_by="name", descending=False))
    assert ([one.name for one in page], total) == (["c", "d"], 4)


async def test_search_takes_every_character_as_itself(store: Store) -> None:
    await add(store, "plain", description="nothing")
    await add(store, "odd", description="100%_done \\ \"quoted\" 'single' [a-z]* é")
    await add(store, "percent", description="100 done")

    async def names(text: str) -> set[str]:
        return {one.name for one in (await store.list_windows(TENANT, WindowQuery(search=text)))[0]}

    for text in ("%", "_", "%_", "0%_d", "\\", '"', '"quoted"', "'single'", "' OR '1'='1", "[a-z]*", "é", "ODD"):
        assert await names(text) == (set() if " OR " in text else {"odd"}), text
    assert await names("") == {"plain", "odd", "percent"}
    assert await names("DONE") == {"odd", "percent"}
    assert await names("thing") == await names("pLaIn") == {"plain"}


# --- objects and deletion


async def test_a_manifest_keeps_order_ranks_and_tiers_apart(store: Store) -> None:
    held = [key(n, rank=rank) for n in (3, 1, 2) for rank in (0x02000200, 0x02010200)]
    wanted = manifest("w", held, tiers=("disk", "redis"))
    assert await store.add_window(window("w", world_size=2, chunk_count=3), wanted, Text(says("1")))
    assert await store.manifest(window("w")) == wanted
    sizes = await store.sizes(window("w"))
    assert sizes == {tier: dict.fromkeys(spelled(*held), 50) for tier in ("disk", "redis")}
    assert await store.held_objects() == set(held)
    assert await store.tier_usage() == {"disk": (6, 300), "redis": (6, 300)}
    found = await store.objects([held[0], key(99)])
    assert sorted(o.tier for o in found) == ["disk", "redis"]
    assert {o.key for o in found} == {str(held[0])}


async def test_thousands_of_objects_are_looked_up_at_once(store: Store) -> None:
    await add(store, "w", keys(1700))
    assert len(await store.objects(keys(3000))) == 1700
    assert await store.objects([]) == []
    gone = await store.delete_window(TENANT, "w")
    assert gone is not None
    assert (len(gone.pins), gone.names) == (1700, ())


async def test_a_deletion_gives_back_only_what_nobody_else_holds(store: Store) -> None:
    await add(store, "a", keys(3))
    b = await add(store, "b", keys(5))
    await add(store, "other", [key(4)], tenant="other", manifest="m-other")
    assert await store.copy_window(replace(b, name="clone", parent="b"), b, None)
    assert await store.delete_window(TENANT, "b") == Released()  # its clone holds everything
    assert await store.delete_window(TENANT, "b") is None
    assert await store.delete_window(TENANT, "clone") == Released((key(3),))
    assert await store.held_objects() == {*keys(3), key(4)}
    assert await store.delete_window(TENANT, "a") == Released(tuple(keys(3)))
    assert await store.delete_window("other", "other") == Released((key(4),))
    assert await store.held_objects() == set()
    assert await store.tier_usage() == {}


async def test_an_isolated_clone_shares_its_sources_pins_under_names_of_its_own(store: Store) -> None:
    w = await add(store, "w", keys(2))
    apart = replace(w, name="apart", salt="other")
    assert await store.copy_window(apart, w, None)
    assert await store.copy_window(replace(apart, name="copy"), w, None)
    names = [key(number, salt="other") for number in range(2)]
    assert await store.pinned(apart) == tuple(
        one._replace(key=str(name), pin=one.key)
        for one, name in zip(manifest("w", keys(2)).objects, names, strict=True)
    )
    assert await store.sizes(apart) == {"disk": dict.fromkeys(spelled(*names), 50)}
    assert (await store.manifest(apart)).token_ids == (1, 2, 2**32 - 1)
    assert await store.held_objects() == await store.held_under("salt") == set(keys(2))
    assert await store.isolated_names() == await store.held_under("other") == set(names)
    assert await store.held_under("nobody") == set()
    assert await store.delete_window(TENANT, "copy") == Released()  # another window is found under its salt
    assert await store.delete_window(TENANT, "w") == Released()
    assert await store.delete_window(TENANT, "apart") == Released(tuple(keys(2)), tuple(names))
    assert {one.salt for one in await store.orphaned_salts()} == {"salt", "other"}
    assert await store.isolated_names() == await store.held_objects() == set()


async def test_deletions_at_once_give_each_object_back_once(store: Store) -> None:
    for n in range(10):
        await add(store, f"w{n}", [key(n), key(n + 1)])
    gone = await asyncio.gather(*(store.delete_window(TENANT, f"w{n % 10}") for n in range(20)))
    assert [g for g in gone if g is None] == [None] * 10
    given = [one for g in gone if g is not None for one in g.pins]
    assert sorted(map(str, given)) == sorted(map(str, keys(11)))


async def test_an_object_that_was_made_anew_has_its_new_checksum_for_every_window(store: Store) -> None:
    await add(store, "a", [key(1)])
    again = PinnedObject(str(key(1)), "disk", 60, b"new")
    assert await store.add_window(window("b"), Manifest("m-b", (1,), (again,)), Text(says("1")))
    assert await store.objects([key(1)]) == [again]
    assert (await store.manifest(window("a"))).objects == (again,)


# --- lineage


async def test_what_is_said_of_a_window_changes_and_its_tags_are_found_by_their_new_names(store: Store) -> None:
    before = await add(store, "w", tags=("a", "b"), description="d", expires_at=5.0)
    after = await store.describe_window(TENANT, "w", {"tags": ("b", "c")})
    assert after == replace(before, tags=("b", "c")) == await store.window(TENANT, "w")
    for tag, names in (("a", []), ("b", ["w"]), ("c", ["w"])):
        assert [w.name for w in (await store.list_windows(TENANT, WindowQuery(tags=(tag,))))[0]] == names
    cleared = await store.describe_window(TENANT, "w", {"tags": (), "description": "", "expires_at": None})
    assert cleared == replace(before, tags=(), description="", expires_at=None)
    assert await store.describe_window("another", "w", {"description": "x"}) is None
    assert await store.window(TENANT, "w") == cleared


async def test_lineage_goes_up_to_the_root_and_down_to_the_clones(store: Store) -> None:
    await add(store, "root")
    for name, parent in (("a", "root"), ("b", "root"), ("aa", "a"), ("aaa", "aa")):
        await add(store, name, parent=parent)
    await add(store, "a2", tenant="other", manifest="m-other", parent="root")
    assert await store.lineage(TENANT, "root") == ([], ["a", "b"])
    assert await store.lineage(TENANT, "aaa") == (["aa", "a", "root"], [])
    assert await store.lineage(TENANT, "a") == (["root"], ["aa"])
    assert await store.lineage(TENANT, "nobody") == ([], [])


async def test_who_gets_a_deleted_windows_name_is_nobodys_parent(store: Store) -> None:
    await add(store, "w", description="old", tags=("old",))
    await add(store, "child", parent="w")
    await store.add_session(Session(TENANT, "t", "s", state="thawed", window="w"))
    await store.delete_window(TENANT, "w")
    await add(store, "w")
    assert await store.lineage(TENANT, "w") == ([], [])
    assert await store.lineage(TENANT, "child") == ([], [])
    fresh = await store.window(TENANT, "w")
    assert fresh is not None
    assert (fresh.description, fresh.tags) == ("", ())
    session = await store.session(TENANT, "t")
    assert session is not None
    assert session.window is None
    assert (await store.list_windows(TENANT, WindowQuery(tags=("old",))))[1] == 0


async def test_a_parent_that_was_deleted_during_the_freeze_is_none(store: Store) -> None:
    await add(store, "w", parent="w")
    await add(store, "child", parent="gone")
    assert await store.lineage(TENANT, "w") == ([], [])
    assert await store.lineage(TENANT, "child") == ([], [])


# --- a life of many processes


async def test_a_restart_finds_everything(open_store: Open) -> None:
    async with open_store() as store:
        name = store.store_id
        await store.record([finished("s", ODD)])
        await add(store, "w", keys(2), tags=("x",))
        before = (await store.session(TENANT, "s"), await store.window(TENANT, "w"), await store.turns(TENANT, "s", 9))
    async with open_store() as store:
        assert store.store_id == name
        after = (await store.session(TENANT, "s"), await store.window(TENANT, "w"), await store.turns(TENANT, "s", 9))
        assert after == before
        assert await messages_of(store, "s") == ODD
        assert await store.manifest(window("w")) == manifest("w", keys(2))


async def test_what_was_written_before_the_end_is_written(open_store: Open) -> None:
    async with open_store() as store:
        writes = [asyncio.create_task(store.record([finished(f"s{n}", says("1", "a"))])) for n in range(300)]
        await asyncio.sleep(0)  # all of them are on their way
    await asyncio.gather(*writes)
    async with open_store() as store:
        _, total = await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0)
        assert total == 300


async def test_two_stores_on_one_file_see_each_others_work_and_have_one_name(open_store: Open) -> None:
    async with open_store() as one, open_store() as other:
        assert one.store_id == other.store_id
        await asyncio.gather(
            *(one.record([finished(f"a{n}", says("1", "x"))]) for n in range(50)),
            *(other.record([finished(f"b{n}", says("1", "y"))]) for n in range(50)),
            *(
                s.add_window(window(f"w{n}"), manifest(f"w{n}", [key(n)]), Text(says(f"{n}")))
                for n in range(20)
                for s in (one, other)
            ),
        )
        for store in (one, other):
            assert (await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0))[1] == 100
            assert (await store.list_windows(TENANT, WindowQuery()))[1] == 20
            assert await messages_of(store, "a7") == says("1", "x")


# --- SQLite


async def test_whoever_is_cancelled_goes_on_only_when_its_write_is_done(store: Store, tmp_path: Path) -> None:
    """It holds a lock on pins, which are let go of unless a window has them by then."""
    with closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")  # nobody else writes
        adding = asyncio.create_task(store.add_session(Session(TENANT, "s", "l")))
        await asyncio.sleep(0)
        adding.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not adding.done()
        db.execute("ROLLBACK")
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert await store.session(TENANT, "s")


WRITER = """
import asyncio, sys
from pathlib import Path
from gateway.store.sqlite import SqliteStore
from gateway.kv.keys import ObjectKey
from tests.unit.store.test_store import TENANT, add, finished, says
from tests.support.tier_harness import key
async def write(name):
    async with SqliteStore(Path(sys.argv[1]), turns_kept=200) as store:
        for n in range(int(sys.argv[3])):
            await store.record([finished(f"s-{name}", says(*map(str, range(2 * n + 2))))])
            await add(store, f"w-{name}-{n}", [key(n), key(n + 1)])
            print(n, flush=True)
asyncio.run(write(sys.argv[2]))
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[bytes]:
    """Another process that writes turns and windows, and tells what was committed."""
    argv = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0)  # what was not read stays in the pipe


def committed(process: subprocess.Popen[bytes]) -> int:
    """How many it said were committed, once it has ended."""
    out, _ = process.communicate(timeout=60)
    return len(out.splitlines())


def sound(path: Path) -> None:
    """SQLite finds nothing wrong, and no row points nowhere."""
    with closing(sqlite3.connect(path)) as db:
        found = [text for (text,) in db.execute("PRAGMA integrity_check")]
        assert found == ["ok"]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


async def whole(store: Store, name: str) -> int:
    """How many windows of a writer there are; each has to be whole."""
    count = 0
    while (one := await store.window(TENANT, f"w-{name}-{count}")) is not None:
        assert [o.key for o in (await store.manifest(one)).objects] == [str(key(count)), str(key(count + 1))]
        count += 1
    return count


async def test_processes_that_start_at_once_make_one_store_and_write_it_together(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    others = [writer(path, name, 20) for name in ("a", "b")]
    assert [await asyncio.to_thread(committed, other) for other in others] == [20, 20]
    async with SqliteStore(path, turns_kept=200) as store:
        assert [await whole(store, "a"), await whole(store, "b")] == [20, 20]
        for name in ("a", "b"):
            assert len(await messages_of(store, f"s-{name}")) == 40
            assert len(await store.turns(TENANT, f"s-{name}", 99)) == 20
    sound(path)


@pytest.mark.parametrize("after", [1, 15])
async def test_a_kill_in_mid_write_loses_nothing_committed_and_leaves_nothing_half(tmp_path: Path, after: int) -> None:
    path = tmp_path / "gateway.db"
    other = writer(path, "a", 10_000)
    assert other.stdout is not None
    for _ in range(after):
        assert other.stdout.readline()
    other.kill()
    told = after + await asyncio.to_thread(committed, other)
    async with SqliteStore(path, turns_kept=200) as store:
        assert told <= await whole(store, "a") <= told + 1
        assert len(await messages_of(store, "s-a")) in (2 * told, 2 * told + 2)
    sound(path)


@pytest.fixture
def two_megabytes(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room."""
    try:
        with small_disk(tmp_path / "small", "size=2m") as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"only root may mount a small file system: {error}")


async def test_a_full_disk_is_told_and_the_store_lives_on(two_megabytes: Path) -> None:
    path = two_megabytes / "gateway.db"
    async with SqliteStore(path, turns_kept=5) as store:
        await store.record([finished("before", says("1", "a"))])
        crowd = two_megabytes / "crowd"
        crowd.write_bytes(bytes(1_000_000))
        kept, codes = 0, set()
        for n in range(40):
            try:
                await store.record([finished(f"s{n}", [{"role": "user", "content": f"{n}" + "x" * 50_000}])])
                kept += 1
            except GatewayError as error:
                codes.add(error.code)
        assert codes == {"storage_full"}
        assert 0 < kept < 40
        assert await messages_of(store, "before") == says("1", "a")
        crowd.unlink()
        await store.record([finished("after", says("2", "b"))])
        assert await messages_of(store, "after") == says("2", "b")
        _, total = await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0)
        assert total == kept + 2
    sound(path)


def test_migrations_are_numbered_without_a_gap() -> None:
    numbers = [int(re.fullmatch(r"m(\d{3})_\w+", step.__name__)[1]) for step in MIGRATIONS]  # type: ignore[index]
    assert numbers == list(range(1, len(MIGRATIONS) + 1))


async def test_what_a_tenants_windows_hold_counts_once_what_they_share(store: Store) -> None:
    first = await add(store, "a", keys(3))
    assert await store.copy_window(replace(first, name="copy"), first, None)
    await add(store, "b", [*keys(2), key(9)])
    await add(store, "c", [key(7)], tenant="other", manifest="m-c")
    more = manifest("x", [key(0), key(7), key(8)]).objects  # held, another tenant's, nobody's
    assert await store.held_bytes(TENANT, []) == 4 * 50
    assert await store.held_bytes(TENANT, more) == 6 * 50
    assert await store.held_bytes("nobody", more) == 3 * 50


async def test_what_an_older_store_has_is_there_in_a_newer_one(tmp_path: Path) -> None:
    path, old = tmp_path / "gateway.db", manifest("w", [key(2), key(1)], ("disk", "redis"))
    talk = says("a" * 5000, "b")
    with closing(sqlite3.connect(path)) as db:
        for step in MIGRATIONS[:9]:
            step(db)
        db.execute("PRAGMA user_version = 9")
        db.execute("INSERT INTO manifests VALUES (?, ?)", (old.id, array("I", old.token_ids).tobytes()))
        db.executemany("INSERT INTO objects VALUES (?, ?, ?, ?)", [o[:4] for o in old.objects])
        held = [(old.id, n // 2, o.key, o.tier) for n, o in enumerate(old.objects)]
        db.executemany("INSERT INTO manifest_objects VALUES (?, ?, ?, ?)", held)
        tip = transcript_rows.add(db, talk)
        db.commit()
    assert tip is not None
    async with SqliteStore(path, turns_kept=5) as store:
        assert await store.manifest(window("w")) == old
        assert await store.held_objects() == {key(1), key(2)}
        assert await store.messages(tip) == talk
        assert await store.windows_without_text() == []
    sound(path)


def test_foreign_keys_are_enforced_after_a_migration(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as db:
        migrate(db)
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            db.execute("INSERT INTO links VALUES (x'01', NULL, x'02', 0)")


async def test_a_tag_that_most_windows_have_is_listed_in_order_and_counted(store: Store) -> None:
    first = await add(store, "w-000", tags=("all", "odd0"), created_at=0.0)
    for number in range(1, 600):
        tags = ("all", f"odd{number % 2}")
        more = replace(first, name=f"w-{number:03}", tags=tags, created_at=float(number))
        assert await store.copy_window(more, first, None)
    assert await store.copy_window(replace(first, name="none", tags=(), created_at=700.0), first, None)
    for tags, expected in (
        (("all",), [f"w-{number:03}" for number in range(599, -1, -1)]),
        (("odd1",), [f"w-{number:03}" for number in range(599, -1, -2)]),
        (("all", "odd1", "all"), [f"w-{number:03}" for number in range(599, -1, -2)]),
    ):
        for offset in (0, 7, len(expected) - 3):
            page, total = await store.list_windows(TENANT, WindowQuery(tags=tags, limit=5, offset=offset))
            assert ([one.name for one in page], total) == (expected[offset : offset + 5], len(expected))
    page, total = await store.list_windows(TENANT, WindowQuery(tags=("all",), created_after=590.0))
    assert ([one.name for one in page], total) == ([f"w-{number:03}" for number in range(599, 590, -1)], 9)
    page, total = await store.list_windows(TENANT, WindowQuery(tags=("all",), session_id="nobody"))
    assert (page, total) == ([], 0)


async def test_the_schema_of_a_new_store_is_the_newest(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5):
        pass
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert (tmp_path / "gateway.db").stat().st_mode & 0o777 == 0o600


async def test_a_store_of_a_newer_gateway_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StartError, match=f"schema {len(MIGRATIONS) + 1}.*newer gateway"):
        async with SqliteStore(path, turns_kept=5):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


async def test_a_file_that_is_no_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    path.write_bytes(b"this is not a database\n" * 500)
    before = path.read_bytes()
    with pytest.raises(StartError, match=r"gateway\.db cannot be opened"):
        async with SqliteStore(path, turns_kept=5):
            pass
    assert path.read_bytes() == before


async def test_a_database_of_somebody_else_is_refused_and_keeps_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE sessions (mine TEXT)")
        db.execute("INSERT INTO sessions VALUES ('x')")
        db.commit()
    with pytest.raises(StartError, match="sessions already exists"):
        async with SqliteStore(path, turns_kept=5):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("sessions",)]

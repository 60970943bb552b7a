"""Sessions, and the windows that are frozen from them."""

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gateway.errors import GatewayError
from gateway.records import Session, Succession, Window
from gateway.store import schema, session_rows
from gateway.store.database import finish
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.types import Text
from tests.support.store_records import TENANT, add, finished, manifest, messages_of, only_sqlite, says, window
from tests.support.tier_harness import key, lose_text

pytestmark = pytest.mark.anyio


async def freeze(store: Store, session: str, name: str, at: float = 1000.0) -> Window:
    """Freeze what a session has now."""
    found = await store.snapshot(TENANT, session)
    assert found is not None
    return await add(store, name, text=found[1], session=found[0], created_at=at)


async def test_concurrent_sessions_of_one_id_are_one(store: Store) -> None:
    taken = await asyncio.gather(*(store.add_sessions([Session(TENANT, "s", f"lineage-{n}")]) for n in range(8)))
    assert taken.count(None) == 1
    session = await store.session(TENANT, "s")
    assert session is not None
    assert session.lineage == f"lineage-{taken.index(None)}"
    assert await store.add_sessions([Session("other", "s", "x")]) is None


async def test_sessions_added_together_are_added_all_or_none(store: Store) -> None:
    first = [Session(TENANT, f"s{n}", "lineage") for n in range(3)]
    assert await store.add_sessions(first) is None
    assert await store.add_sessions([Session(TENANT, "new", "l"), Session(TENANT, "s1", "l")]) == "s1"
    assert await store.session(TENANT, "new") is None
    assert (await store.list_sessions(TENANT, state=None, model=None, limit=10, offset=0))[1] == 3


async def test_session_with_a_turn_during_its_freeze_stays_active(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.snapshot(TENANT, "s")
    assert seen is not None
    await store.record([finished("s", says("1", "a", "2", "b"))])
    await add(store, "before", text=seen[1], session=seen[0], created_at=300.0)
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


async def test_window_is_committed_as_read_whatever_happens_to_the_session(store: Store) -> None:
    """Edited, deleted, or deleted and recreated under its id, with as many turns."""
    for number, meanwhile in enumerate((says("other", "x"), None, says("stranger", "y"))):
        await store.record([finished("s", says("1", "a"), frame={"tools": [number]}, at=float(number))])
        seen = await store.snapshot(TENANT, "s")
        assert seen is not None
        if number:
            await store.delete_session(TENANT, "s")
        if meanwhile:
            await store.record([finished("s", meanwhile, at=50.0 + number)])
        made = await add(store, f"w{number}", text=seen[1], session=seen[0])
        assert await store.text(made) == Text(says("1", "a"), {"tools": [number]})
        session = await store.session(TENANT, "s")
        assert session is None or session.state == "active"
        assert number == 0 or made.salt in {loose.salt for loose in await store.orphaned_salts()}
        await store.delete_session(TENANT, "s")


async def test_automatic_window_of_a_deleted_session_is_not_added(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.snapshot(TENANT, "s")
    assert seen is not None
    await store.delete_session(TENANT, "s")
    await store.record([finished("s", says("1", "a"), at=77.0)])
    with pytest.raises(GatewayError, match="'s' was deleted while it was being frozen") as caught:
        await store.add_window(window("w"), manifest("w", [key(1)]), seen[1], session=seen[0], wanted=False)
    assert caught.value.code == "session_not_found"
    assert (await store.window(TENANT, "w"), await store.held_objects()) == (None, set())


async def test_parent_of_a_window_is_that_of_its_session(store: Store) -> None:
    await add(store, "w", created_at=1.0)
    thawed = Session(TENANT, "t", "s", state="thawed", window="w", created_at=2.0)
    await store.add_sessions([thawed])
    assert (await add(store, "child", session=thawed)).parent == "w"
    await store.delete_session(TENANT, "t")
    assert (await add(store, "orphan", session=thawed)).parent == "w"
    await store.delete_window(TENANT, "w")
    await add(store, "w", created_at=3.0)
    assert (await add(store, "stranger", session=thawed)).parent is None


async def test_triggers_keep_windows_and_their_text_together(store: Store) -> None:
    refused = (sqlite3.IntegrityError, asyncpg.RaiseError)
    with pytest.raises(refused, match="without its text"):
        await store.add_window(window("w"), manifest("w"), Text([]))
    made = await add(store, "w")
    with pytest.raises(refused, match="without its text"):
        await store.copy_window(replace(made, name="copy", frame=b"none"), made, None)
    with pytest.raises(refused, match="text of a window was to be deleted"):
        await store.run_write(lambda db: db.run("DELETE FROM links"))


@only_sqlite
async def test_window_without_text_is_listed_and_cannot_be_used(store: Store, tmp_path: Path) -> None:
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


async def test_nothing_is_made_of_a_replaced_window(store: Store) -> None:
    made = await add(store, "w")
    await store.delete_window(TENANT, "w")
    for again in (False, True):
        if again:
            await add(store, "w", created_at=2000.0)
        for attempt in (
            store.text(made),
            store.check_exists(made),
            store.copy_window(replace(made, name="copy"), made, None),
            store.add_sessions([Session(TENANT, "t", "s", transcript=made.transcript)], source=made),
        ):
            with pytest.raises(GatewayError, match="'w' was just deleted") as caught:
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


async def test_claim_respects_cool_down_but_no_time_set_by_a_wrong_clock(store: Store) -> None:
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


async def test_claim_does_not_apply_to_a_new_session_of_the_same_id(store: Store) -> None:
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


async def test_successor_is_created_only_for_an_unchanged_session(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    seen = await store.session(TENANT, "s")
    assert seen is not None
    step = Succession(TENANT, "s", "s.2", "w", 1, b"link")
    new = Session(TENANT, "s.2", "s")
    with pytest.raises(GatewayError, match="its window 'w' was deleted"):
        await store.succeed(step, new, full=seen)
    await freeze(store, "s", "w")
    await store.add_sessions([new])
    with pytest.raises(GatewayError, match=r"another session took the id 's\.2'"):
        await store.succeed(step, new, full=seen)
    await store.delete_session(TENANT, "s.2")
    await store.record([finished("s", says("1", "b"))])
    with pytest.raises(GatewayError, match="it continued, or was deleted") as caught:
        await store.succeed(step, new, full=seen)
    assert caught.value.code == "session_busy"
    assert await store.successions(TENANT, "s") == []
    await store.record([finished("s", says("1", "a"))])
    now = await store.session(TENANT, "s")
    assert now is not None
    assert await store.succeed(step, new, full=now) == step
    assert await store.succeed(replace(step, successor="s.3"), new, full=now) == step


async def test_sessions_are_listed_by_activity_and_filtered(store: Store) -> None:
    for n in range(6):
        await store.record([finished(f"s{n}", says("1", "a"), at=float(n))])
    await freeze(store, "s2", "w")
    await store.add_sessions([Session(TENANT, "t", "l", model="other", state="thawed", last_active_at=3.7)])

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


async def test_active_session_of_a_lineage_is_one_that_is_active_or_thawed_under_the_salt(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    assert await store.active_session(TENANT, "s", "salt-s") == "s"
    assert await store.active_session("other", "s", "salt-s") is None
    await freeze(store, "s", "w")
    assert await store.active_session(TENANT, "s", "salt-s") is None
    await store.add_sessions([Session(TENANT, "t", "s", state="thawed", salt="salt-s")])
    assert await store.active_session(TENANT, "s", "salt-s") == "t"
    assert await store.active_session(TENANT, "s", "of another model") is None
    await store.delete_session(TENANT, "t")
    assert await store.active_session(TENANT, "s", "salt-s") is None


async def test_deleted_session_leaves_nothing_to_a_new_one(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    assert await store.delete_session(TENANT, "s")
    assert not await store.delete_session(TENANT, "s")
    assert (await store.session(TENANT, "s"), await store.turns(TENANT, "s", 9)) == (None, [])
    await store.record([finished("s", says("new", "b"))])
    session = await store.session(TENANT, "s")
    assert session is not None
    assert session.turn_count == len(await store.turns(TENANT, "s", 9)) == 1


async def test_shared_messages_survive_a_deletion(store: Store) -> None:
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


async def test_thawed_session_keeps_the_transcript_of_a_deleted_window(store: Store) -> None:
    await store.record([finished("a", says("1", "x"))])
    a = await store.session(TENANT, "a")
    assert a is not None
    assert a.transcript is not None
    await freeze(store, "a", "w")
    thawed = Session(
        TENANT, "t", "a", state="thawed", transcript=a.transcript, window="w", window_transcript=a.transcript
    )
    await store.add_sessions([thawed])
    await store.record([finished("t", says("1", "x", "2", "y"))])
    await store.delete_session(TENANT, "a")
    await store.delete_window(TENANT, "w")
    t = await store.session(TENANT, "t")
    assert t is not None
    assert t.window is None
    assert t.window_transcript is not None
    assert await store.messages(t.window_transcript) == says("1", "x")


def test_a_few_sessions_are_found_without_passing_all_of_a_tenant() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        schema.migrate(db)
        queries: list[str] = []
        db.set_trace_callback(queries.append)
        finish(session_rows.active_session(SqliteDb(db), TENANT, "lineage", "salt"))
        finish(session_rows.sessions_beside(SqliteDb(db), TENANT, "agent", "agent", 5))
        db.set_trace_callback(None)
        plans = [row[3] for query in queries for row in db.execute(f"EXPLAIN QUERY PLAN {query}")]
    used = [plan for plan in plans if "sessions" in plan]
    assert len(used) == 3
    assert all("lineage=?" in plan or "id" in plan.partition("tenant=? AND ")[2] for plan in used), used


async def test_drained_engines_are_remembered_each_by_itself(store: Store) -> None:
    urls = ["http://a:1", "http://b:1", "http://c:1"]
    assert await store.drain("http://a:1", 5.5, urls)
    assert await store.drain("http://b:1", 6.0, urls)
    assert await store.drain("http://a:1", 9.0, urls), "it is drained already"
    assert await store.drained() == {"http://a:1": 5.5, "http://b:1": 6.0}
    await store.undrain("http://a:1")
    await store.undrain("http://c:1")
    assert await store.drained() == {"http://b:1": 6.0}


async def test_of_two_that_drain_the_last_engines_at_once_one_is_refused(store: Store) -> None:
    urls = ["http://a:1", "http://b:1"]
    assert sorted(await asyncio.gather(*(store.drain(url, 1.0, urls) for url in urls))) == [False, True]
    assert len(await store.drained()) == 1

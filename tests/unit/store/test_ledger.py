"""The ledger in the store: what is booked, by which curve, and that no sum is lost."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from gateway.records import Usage
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Store
from gateway.store.types import Booking, Saved, TurnRecord, WindowQuery
from tests.support.store_records import TENANT, Open, add, finished, says

pytestmark = pytest.mark.anyio

ENGINE = "http://engine"


def turn(
    session: str, prompt: int, cached: int | None, seconds: float | None = None, *, at: float = 100.0,
    engine: str = ENGINE, of: str | None = None, transcript: bytes = b"",
) -> TurnRecord:  # fmt: skip
    """A turn that the engine has counted; `of` is the window that its session was thawed from."""
    record = finished(session, says("hi", "hello"), at=at)
    began = structs.replace(record.session, window=of, window_transcript=transcript)
    first = None if seconds is None else seconds * 1000
    counted = structs.replace(record.turn, usage=Usage(prompt, 5, cached), engine=engine, first_token_ms=first)
    return structs.replace(record, turn=counted, session=began)


def _seconds(tokens: int) -> float:
    return 0.02 + 0.001 * tokens


async def _teach(
    store: Store, *, quicker: float = 1.0, sizes: tuple[int, ...] = (100, 400, 1600), tag: str = ""
) -> None:
    """Prompts one after the other; those of another `tag` run at another time."""
    for number, size in enumerate(sizes):
        at = 100.0 + 100 * len(tag) + 10 * number
        await store.record([turn(f"cold-{tag}{size}", size, 0, _seconds(size) / quicker, at=at)])


async def _all(store: Store) -> Saved:
    return (await store.saved_by_source(TENANT))["all"]


async def test_turns_are_booked_by_the_curve(store: Store) -> None:
    await _teach(store)
    await store.record([turn("s", 2000, 1500, 0.6), turn("s", 2100, 2000)])
    saved = (await store.saved(TENANT, "session", ["s", "other"]))["s"]
    assert (saved.requests, saved.prompt_tokens, saved.tokens, saved.tokens_estimated) == (2, 4100, 3500, 3500)
    assert saved.seconds_estimated == pytest.approx(3.5, rel=0.05)
    assert saved.reason is None
    assert (await _all(store)).tokens == 3500
    assert (await store.most_saved(TENANT, "session", 5)).keys() == {"s"}


async def test_nothing_booked_says_so(store: Store) -> None:
    saved = (await store.saved(TENANT, "window", ["nothing"]))["nothing"]
    assert saved == Saved(reason="no request yet whose cached tokens the engine counted")


async def test_a_turn_whose_cached_tokens_are_unknown_is_not_booked(store: Store) -> None:
    await store.record([turn("s", 2000, None), turn("s", 2000, 10, engine="")])
    assert (await _all(store)).requests == 0
    assert await store.prefill_curves() == []


async def test_tokens_wait_for_the_curve(store: Store) -> None:
    """The first turns of all are booked once it is known what they would have cost."""
    await store.record([turn("s", 300, 256)])
    saved = await _all(store)
    assert (saved.tokens, saved.seconds_estimated, saved.tokens_estimated) == (256, None, 0)
    assert saved.reason == f"learned from prompts that {ENGINE} computes without the cache: 0 so far, 3 are needed"
    await _teach(store)
    saved = await _all(store)
    assert saved.seconds_estimated == pytest.approx(0.256, rel=0.05)
    assert (saved.tokens_estimated, saved.reason) == (256, None)


async def test_tokens_beyond_reach_wait_for_longer_prompts(store: Store) -> None:
    await _teach(store, sizes=(50, 100, 110))
    await store.record([turn("s", 5000, 4096), turn("s", 200, 100)])
    saved = await _all(store)
    assert saved.tokens_estimated == 100
    assert saved.seconds_estimated == pytest.approx(0.1, rel=0.1)
    assert saved.reason == f"estimates reach to 220 tokens, until {ENGINE} has computed longer prompts"
    await _teach(store, sizes=(1500,))
    assert (await _all(store)).tokens_estimated == 4196


async def test_error_is_of_predictions_not_learned_from(store: Store) -> None:
    await _teach(store)
    assert (await _all(store)).requests == 3  # learned from, then
    for number, off in enumerate((1.1, 1.1, 0.9)):
        await store.record([turn(f"n{number}", 800, 0, _seconds(800) * off, at=10.0 * number)])
    (curve,) = await store.prefill_curves()
    assert curve.samples == 6
    assert curve.error_share == pytest.approx(0.1, abs=0.02)
    assert (await _all(store)).error_share is None  # of no tokens yet


async def test_a_quicker_engine_begins_a_curve_and_leaves_the_old_sums(store: Store) -> None:
    await _teach(store)
    await _teach(store, tag="again")
    await store.record([turn("s", 2000, 1500)])
    before = await _all(store)
    await _teach(store, quicker=3, sizes=(100, 400, 1600, 200, 800), tag="new")
    new, old = await store.prefill_curves()
    assert (new.samples, old.samples) == (5, 6)
    assert await _all(store) == replace(before, requests=12, prompt_tokens=before.prompt_tokens + 3100)
    await store.record([turn("s", 2000, 1500)])
    both = await _all(store)
    assert both.seconds_estimated == pytest.approx(1.5 + 0.5, rel=0.05)


async def test_an_engine_at_another_port_begins_with_what_is_known_of_its_model(store: Store) -> None:
    """After a restart of the stack: that is when a thaw saves most."""
    await _teach(store)
    await store.record([turn("s", 2000, 1500, engine="http://other")])
    saved = await _all(store)
    assert (saved.tokens_estimated, saved.reason) == (1500, None)
    assert saved.seconds_estimated == pytest.approx(1.5, rel=0.05)
    new, old = await store.prefill_curves()
    assert (new.engine, new.samples, new.curve) == ("http://other", 3, old.curve)
    for number, size in enumerate((100, 400, 1600, 200, 800)):
        await store.record([turn(f"n{number}", size, 0, _seconds(size) / 4, engine="http://other")])
    assert [curve.engine for curve in await store.prefill_curves()] == ["http://other", "http://other", ENGINE]
    await store.record([turn("t", 2000, 1500, engine="http://other")])
    assert (await store.saved(TENANT, "session", ["t"]))["t"].seconds_estimated == pytest.approx(0.375, rel=0.05)


async def test_samples_of_engines_that_are_gone_are_bounded(store: Store) -> None:
    await _teach(store)
    for number in range(40):
        await store.record([turn(f"s{number}", 2000, 1500, engine=f"http://{number}")])
    assert (await _all(store)).tokens_estimated == 40 * 1500
    assert await store.run_read(lambda db: db.value("SELECT count(*) FROM prefill_samples")) == 48


async def test_of_turns_that_ran_together_the_quickest_of_a_size_is_learned_from(store: Store) -> None:
    for n in range(50):
        await store.record([turn(f"s{n}", 1000, 0, 1.0 + n, at=100.0 + n / 100)])
    await store.record([turn("later", 1000, 0, 1.0, at=200.0)])
    (curve,) = await store.prefill_curves()
    assert curve.samples == 2


async def test_samples_are_bounded(store: Store) -> None:
    for number in range(40):
        await store.record([turn(f"s{number}", 1000, 0, 1.0, at=2.0 * number)])
    (curve,) = await store.prefill_curves()
    assert curve.samples == 16


async def test_sums_are_the_same_after_a_restart(open_store: Open) -> None:
    async with open_store() as store:
        await _teach(store)
        await store.record([turn("s", 2000, 1500, 0.6)])
        before = await _all(store)
    async with open_store() as store:
        assert await _all(store) == before
        await store.record([turn("s", 2000, 1500, 0.6)])
        after = await _all(store)
    assert after.tokens == 2 * before.tokens
    assert after.seconds_estimated == pytest.approx(2 * (before.seconds_estimated or 0))


async def test_two_workers_lose_nothing_of_each_other(open_store: Open, tmp_path: Path) -> None:
    """Their sums are those of one that recorded everything."""
    turns = [turn(f"s{n % 7}", 1000 + n, 64 * (n % 9) if n % 3 else 0, _seconds(1000 + n), at=n) for n in range(120)]
    async with open_store() as one, open_store() as other:
        await _teach(one)
        await asyncio.gather(*(store.record([one_turn]) for store, part in ((one, turns[::2]), (other, turns[1::2]))
                               for one_turn in part))  # fmt: skip
        both, by_session = await _all(other), await one.saved(TENANT, "session", [f"s{n}" for n in range(7)])
    async with SqliteStore(tmp_path / "alone.db", turns_kept=5) as alone:
        await _teach(alone)
        await alone.record(turns)
        expected = await _all(alone)
    assert (both.requests, both.prompt_tokens, both.tokens) == (
        expected.requests, expected.prompt_tokens, expected.tokens
    )  # fmt: skip
    assert sum(saved.tokens for saved in by_session.values()) == both.tokens
    assert both.seconds_estimated == pytest.approx(expected.seconds_estimated, rel=0.02)


async def _unbooked(store: Store) -> int:
    count: int = await store.run_read(lambda db: db.value("SELECT count(*) FROM turns WHERE unbooked"))
    return count


async def test_turns_wait_to_be_booked_until_there_are_many(store: Store) -> None:
    """Recording one is not slower for the ledger, nor does a reader find thousands that wait."""
    waiting = []
    for n in range(300):
        await store.record([turn(f"s{n}", 2000, 1500)])
        waiting.append(await _unbooked(store))
    assert waiting[:3] == [1, 2, 3]
    assert max(waiting) < 256
    await store.record([turn(f"t{n}", 2000, 1500) for n in range(256)])
    assert await _unbooked(store) == 0
    assert (await _all(store)).requests == 556


async def test_turns_are_booked_once_whoever_reads_meanwhile(open_store: Open) -> None:
    async with open_store() as one, open_store() as other:
        await one.record([turn("s", 2000, 1500), turn("t", 2000, None)])
        read = await asyncio.gather(*(_all(store) for store in (one, other) for _ in range(10)))
        assert {saved.requests for saved in read} == {1}
        await other.record([turn("s", 2000, 1500)])  # and this store is closed, as if its process were killed
    async with open_store() as again:
        assert (await again.saved(TENANT, "session", ["s"]))["s"].tokens == 3000


async def test_turns_that_are_not_kept_are_booked_before(store: Store) -> None:
    """The store keeps five of a session."""
    await store.record([turn("s", 2000, 1500) for _ in range(4)])
    await store.record([turn("s", 2000, 1500) for _ in range(50)])
    assert len(await store.turns(TENANT, "s", 100)) == 5
    assert (await _all(store)).requests == 54


async def test_a_turn_of_a_session_that_gets_another_id_is_booked_for_that(store: Store) -> None:
    one = turn("chat", 2000, 1500)
    title = structs.replace(one, session=structs.replace(one.session, first_message_hash=b"title"))
    trace = structs.replace(title.trace, first_message_hash=b"title", request_hash=b"title")
    title = structs.replace(title, trace=trace)
    chat = structs.replace(one, session=structs.replace(one.session, first_message_hash=b"chat"), displaces=True)
    await store.record([title])
    await store.record([structs.replace(chat, turn=structs.replace(chat.turn, usage=Usage(3000, 1, 2900)))])
    page, _ = await store.listed_sessions(TENANT, state=None, model=None, limit=10, offset=0)
    assert {session.id == "chat": saved.tokens for session, saved in page} == {True: 2900, False: 1500}


async def test_a_deleted_session_stays_in_the_total(store: Store) -> None:
    await store.record([turn("s", 2000, 1500)])
    await store.delete_session(TENANT, "s")
    assert (await store.saved(TENANT, "session", ["s"]))["s"].requests == 0
    assert (await _all(store)).tokens == 1500


async def test_clocks_that_jump_change_no_sum(store: Store) -> None:
    await _teach(store)
    for at in (100.0, -5.0, 1e12, 50.0):
        await store.record([turn("s", 2000, 1000, 0.7, at=at)])
    assert (await _all(store)).tokens == 4000
    assert await store.saved_since(TENANT) == 100.0


def _booking(cached: int, **more: str) -> Booking:
    return Booking(TENANT, "thaw", ENGINE, "fp", "demo", 1100, cached, 100.0, **more)


async def test_a_thaw_is_booked_for_its_window_and_its_first_turn_books_the_rest(store: Store) -> None:
    window = await add(store, "w")
    await _teach(store)
    receipt = await store.book(_booking(1000, session_id="t", window="w"))
    assert (receipt.requests, receipt.tokens) == (1, 1000)
    assert receipt.seconds_estimated == pytest.approx(1.0, rel=0.05)
    first = turn("t", 1200, 1040, of="w", transcript=window.transcript)
    await store.record([first, structs.replace(first, turn=structs.replace(first.turn, usage=Usage(1300, 1, 1200)))])
    session = (await store.saved(TENANT, "session", ["t"]))["t"]
    assert (session.requests, session.tokens) == (3, 1040 + 1200)
    saved = (await store.saved(TENANT, "window", ["w"]))["w"]
    assert (saved.requests, saved.tokens) == (2, 1040)
    assert saved.seconds_estimated == pytest.approx(1.04, rel=0.05)
    by_source = await store.saved_by_source(TENANT)
    assert (by_source["thaw"].tokens, by_source["turn"].tokens) == (1000, 1240)


async def test_each_row_of_a_list_has_its_own_savings(store: Store) -> None:
    window, other = await add(store, "w"), await add(store, "other")
    await store.book(_booking(1000, session_id="t", window="w"))
    await store.record([turn("t", 1200, 1040), turn("idle", 10, None)])
    windows, _ = await store.listed_windows(TENANT, WindowQuery())
    sessions, _ = await store.listed_sessions(TENANT, state=None, model=None, limit=10, offset=0)
    assert {row.name: saved.requests for row, saved in windows} == {"w": 1, "other": 0}
    assert {row.id: saved.requests for row, saved in sessions} == {"t": 2, "idle": 0}
    assert [(await store.sizes_and_saved(one))[1].requests for one in (window, other)] == [1, 0]


async def test_nothing_is_booked_for_a_window_that_was_deleted(store: Store) -> None:
    """The next one of its name would begin with it."""
    window = await add(store, "w")
    await store.book(_booking(1000, session_id="t", window="w"))
    await store.delete_window(TENANT, "w")
    await store.book(_booking(1000, session_id="u", window="w"))
    await store.record([turn("v", 1200, 1040, of="w", transcript=window.transcript)])
    await add(store, "w", text=None, transcript=window.transcript)
    assert (await store.saved(TENANT, "window", ["w"]))["w"].requests == 0
    assert (await _all(store)).tokens == 3040


async def test_held_bytes_add_up_over_time(store: Store) -> None:
    assert await store.held_kv() is None
    await store.hold(1000, 100.0, None)
    await store.hold(500, 100.0 + 7200, None)
    await store.hold(500, 0.0, None)  # the clock was set back
    await store.hold(500, 1e9, 3600.0)  # and far ahead, which the caller knows better
    held = await store.held_kv()
    assert held is not None
    assert (held.bytes, held.byte_hours, held.since) == (500, 2500.0, 100.0)

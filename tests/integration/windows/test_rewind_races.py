"""A session is taken back to a window while something else happens to either of them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gateway.errors import GatewayError
from gateway.records import AUTO_TAG, Session, Succession, Turn, Usage, Window
from gateway.sessions import prefix_chain
from gateway.store.types import TurnRecord
from gateway.windows.catalog import session_from_window
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming, freeze
from gateway.windows.restore import restore_for_turn
from gateway.windows.retention.orphans import delete_session
from gateway.windows.rewind import Placed, Rewound, Target, place, target
from gateway.windows.thaw import thaw
from gateway.windows.tree import tree
from tests.support.conversations import assistant, user
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.prefix_cache_model import TENANT, Cached, opened

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("each_store")]
FIRST: list[dict[str, Any]] = [user("the first question, long enough for a chunk"), assistant("answer 1")]
SECOND = [*FIRST, user("the second question"), assistant("answer 2")]
THIRD = [*SECOND, user("the third question"), assistant("answer 3")]


@pytest.fixture
async def harness(engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path) -> AsyncIterator[Cached]:
    """A session `s` of two turns, and a window `w` of its first."""
    async with opened(engine, fake_cache, tmp_path) as harness:
        await harness.session("s", FIRST)
        await harness.window("w", session="s")
        await harness.session("s", SECOND)
        yield harness


async def parts(harness: Cached, keep_as: str | None = None) -> tuple[Target, Session, Window]:
    """What a thaw into `s` has after everything but its last step."""
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    into = await target(harness.ctx, window, None, Rewound("s", keep_as))
    return into, session_from_window(window, "s", "thaw"), window


async def taken_back(harness: Cached, **more: Any) -> Placed:
    return await place(harness.ctx, *await parts(harness, **more))


async def session(harness: Cached, name: str = "s") -> Session:
    found = await harness.services.store.session(TENANT, name)
    assert found is not None
    return found


async def text(harness: Cached, transcript: bytes | None) -> list[dict[str, Any]]:
    return await harness.services.store.messages(transcript or b"")


def turn(before: Session, messages: list[dict[str, Any]], began: float = 1e9) -> TurnRecord:
    """A finished turn that found its session as `before`."""
    done = Turn(TENANT, before.id, MODEL, "completed", 200, began, 1.0)
    trace = prefix_chain.trace(b"", messages[:-1], messages[-1])
    return TurnRecord(done, before, before.fingerprint, before.salt, messages, {}, trace)


async def refused(work: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await work
    return caught.value


async def test_turn_that_began_before_is_recorded_and_moves_nothing(harness: Cached) -> None:
    before = await session(harness)
    await taken_back(harness)
    rewound = await session(harness)
    await harness.services.store.record([turn(before, THIRD)])
    after = await session(harness)
    assert after == structs.replace(rewound, turn_count=rewound.turn_count + 1)
    assert await text(harness, after.transcript) == FIRST
    (newest, *_) = await harness.services.store.turns(TENANT, "s", 10)
    assert newest.detail == "the session was taken back to a window meanwhile: this turn is not part of it"


async def test_turns_before_and_after_in_one_batch(harness: Cached) -> None:
    before = await session(harness)
    await taken_back(harness)
    rewound = await session(harness)
    other = [*FIRST, user("otherwise"), assistant("indeed")]
    await harness.services.store.record([turn(rewound, other), turn(before, THIRD)])
    after = await session(harness)
    assert (after.state, after.turn_count) == ("active", rewound.turn_count + 2)
    assert await text(harness, after.transcript) == other
    newest, second, *_ = await harness.services.store.turns(TENANT, "s", 10)
    assert (bool(newest.detail), bool(second.detail)) == (True, False)


async def test_turn_that_is_recorded_meanwhile(harness: Cached) -> None:
    into = await parts(harness)
    await harness.services.store.record([turn(await session(harness), THIRD)])
    before = await session(harness)
    error = await refused(place(harness.ctx, *into))
    assert (error.code, error.retryable, error.details) == ("session_busy", True, {})
    assert await session(harness) == before


async def test_turn_that_is_recorded_while_the_session_is_kept(harness: Cached, engine: FakeEngine) -> None:
    into = await parts(harness, keep_as="kept")
    await harness.services.store.record([turn(await session(harness), THIRD)])
    error = await refused(place(harness.ctx, *into))
    assert (error.code, error.details) == ("session_busy", {"kept_as": "kept"})
    assert "is frozen in window 'kept'" in error.message
    kept = await harness.services.store.window(TENANT, "kept")
    assert kept is not None
    assert await text(harness, kept.transcript) == THIRD == await text(harness, (await session(harness)).transcript)


async def test_another_thaw_into_the_session_meanwhile(harness: Cached) -> None:
    one, other = await parts(harness), await parts(harness)
    await place(harness.ctx, *one)
    assert (await refused(place(harness.ctx, *other))).code == "session_busy"
    assert (await session(harness)).rewinds == 1


async def test_session_deleted_meanwhile(harness: Cached) -> None:
    into = await parts(harness)
    await delete_session(harness.ctx, "s")
    assert (await refused(place(harness.ctx, *into))).code == "session_not_found"
    await harness.session("s", SECOND)
    assert (await refused(place(harness.ctx, *into))).code == "session_busy"  # another one with its id
    assert await text(harness, (await session(harness)).transcript) == SECOND


async def test_window_deleted_meanwhile_or_another_got_its_name(harness: Cached) -> None:
    into = await parts(harness)
    await delete(harness.ctx, "w")
    assert (await refused(place(harness.ctx, *into))).code == "window_not_found"
    await harness.window("w", session="s")
    assert (await refused(place(harness.ctx, *into))).code == "window_not_found"
    assert await text(harness, (await session(harness)).transcript) == SECOND


async def test_freeze_that_has_read_the_session_before(harness: Cached, engine: FakeEngine) -> None:
    """It commits what it has read, as the child of the window that the session came from then; the session stays."""
    before = await session(harness)
    committed = await freeze(harness.ctx, "s", Naming("all"))
    read = await harness.services.store.snapshot(TENANT, "s")
    await taken_back(harness)
    assert read is not None
    late = replace(committed.window, name="late", manifest="m")
    manifest = replace(await harness.services.store.manifest(committed.window), id="m")
    made = await harness.services.store.add_window(late, manifest, read[1], session=before)
    assert made is not None
    assert (made.parent, await text(harness, made.transcript)) == (None, SECOND)
    after = await session(harness)
    assert (after.state, after.window) == ("thawed", "w")
    fresh = await freeze(harness.ctx, "s", Naming("fresh"))
    assert (fresh.window.parent, await text(harness, fresh.window.transcript)) == ("w", FIRST)


async def test_nothing_is_left_of_what_no_window_has(harness: Cached) -> None:
    dropped = (await session(harness)).transcript
    placed = await taken_back(harness)
    assert placed.replaced is not None
    assert (placed.replaced.turns_dropped, placed.replaced.kept_in) == (1, None)
    assert placed.warnings == ("dropped from session 's', and in no window: 1 turn",)
    assert await text(harness, dropped) == []
    await delete(harness.ctx, "w")
    await delete_session(harness.ctx, "s")
    store = harness.services.store
    assert await store.run_read(lambda db: db.value("SELECT count(*) FROM links")) == 0
    assert await store.run_read(lambda db: db.value("SELECT count(*) FROM contents")) == 0


async def test_automatic_window_of_what_was_dropped_is_not_superseded(harness: Cached) -> None:
    store = harness.services.store
    record = turn(await session(harness), THIRD)
    await store.record([structs.replace(record, turn=structs.replace(record.turn, usage=Usage(1000, 10)))])
    claimed = await session(harness)
    assert await store.claim_freeze(claimed, now=1.0, until=2.0, cool=False)
    frozen, _ = await freeze(harness.ctx, "s", Naming("auto-1", tags=(AUTO_TAG,)))
    await store.report_freeze(claimed, window=frozen.name, not_before=0.0)
    assert await store.auto_windows(TENANT, "s") == ["auto-1"]
    assert (await taken_back(harness)).replaced is not None
    assert await store.auto_windows(TENANT, "s") == []
    (row,) = await store.freeze_candidates([(TENANT, "s")])
    assert row.covered_tokens == row.session.token_count < claimed.token_count


async def test_session_that_was_full_continues_itself(harness: Cached) -> None:
    store, full = harness.services.store, await session(harness)
    window, _ = await freeze(harness.ctx, "s", Naming("full"))
    step = Succession(TENANT, "s", "s.2", window.name, 2, b"link")
    new = Session(TENANT, "s.2", full.lineage, MODEL, source="successor", parent="s", window="full")
    await store.succeed(step, new, full=full)
    assert (await session(harness)).successor == "s.2"
    await taken_back(harness)
    assert (await session(harness)).successor is None
    assert await store.successions(TENANT, "s") == []
    assert (await session(harness, "s.2")).parent == "s"


async def test_tree_shows_the_session_above_the_window_that_it_was_taken_back_to(harness: Cached) -> None:
    await taken_back(harness)
    found = await tree(harness.services, TENANT, 10)
    assert [(n.kind, n.name, n.parent, n.missing_parent) for n in found.nodes] == [
        ("session", "s", None, None),
        ("window", "w", ("session", "s"), None),
    ]


async def test_first_turn_finds_the_windows_kv(harness: Cached) -> None:
    thawed = await thaw(harness.ctx, "w", new_session_id=None, warm="none", rewound=Rewound("s"))
    harness.cache.evict()
    await restore_for_turn(harness.services, thawed.session)
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    assert harness.cache.prefetches == [(window.salt, window.chunk_count * window.chunk_size)]
    assert thawed.session == await session(harness)

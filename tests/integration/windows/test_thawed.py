"""A thaw tells what it finds, and a first turn finds in the cache's memory what its window holds."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import Session, Window
from gateway.windows.archive import export as exporting
from gateway.windows.ask import ask
from gateway.windows.delete import delete
from gateway.windows.evict import evict
from gateway.windows.fanout import fanout
from gateway.windows.freeze import Naming
from gateway.windows.isolate import isolate
from gateway.windows.prefetch import prefetch
from gateway.windows.resume import resume
from gateway.windows.thaw import Receipt, restore, thaw
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.prefix_cache_model import CHUNKS, IDS, MESSAGES, TENANT, Cached, opened

pytestmark = pytest.mark.anyio
WHOLE = CHUNKS * CHUNK


@pytest.fixture
def cache(engine: FakeEngine, tmp_path: Path) -> Iterator[FakeLMCache]:
    """An LMCache that keeps what the engine computes."""
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    yield cache
    cache.stop()


@pytest.fixture
async def house(engine: FakeEngine, cache: FakeLMCache, tmp_path: Path) -> AsyncIterator[Cached]:
    async with opened(engine, cache, tmp_path) as house:
        await house.window()
        cache.memory.clear()
        yield house


def flip(house: Cached, key: ObjectKey) -> None:
    """Change a byte in place: the pin is the same file."""
    with (house.cache.folder / key.file_name).open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))


def lose(house: Cached, key: ObjectKey) -> None:
    """Take an object and its pin away."""
    for folder in (house.cache.folder, house.pins):
        (folder / key.file_name).unlink()


async def thawed(house: Cached, warm: str = "none") -> tuple[Session, Window, Receipt]:
    return await thaw(house.parts, TENANT, "w", new_session_id=None, warm=warm)  # type: ignore[arg-type]


async def test_a_damaged_chunk_is_lost_told_of_and_taken_from_everywhere(house: Cached) -> None:
    window = await house.parts.store.window(TENANT, "w")
    assert window is not None
    bad = house.keys(window)[3]
    flip(house, bad)
    house.cache.memory.add(bad.file_name)
    _, _, receipt = await thawed(house)
    assert (receipt.chunks_found, receipt.chunks_corrupt, receipt.partial) == (3, 1, True)
    assert bad.file_name not in house.cache.memory
    assert not (house.cache.folder / bad.file_name).exists()
    assert bad.file_name not in house.pinned
    assert f"the KV of {CHUNKS - 3} of {CHUNKS} chunks is lost" in " ".join(receipt.warnings)


async def test_a_window_that_has_lost_a_chunk_is_thawed_in_part(house: Cached) -> None:
    window = await house.parts.store.window(TENANT, "w")
    assert window is not None
    lose(house, house.keys(window)[-1])
    session, _, receipt = await thawed(house, "gpu")
    assert (receipt.chunks_found, receipt.chunks_corrupt, receipt.partial) == (CHUNKS - 1, 0, True)
    assert receipt.chunks_prefetched == CHUNKS - 1
    assert await house.parts.store.messages(session.transcript or b"") == MESSAGES


async def test_a_warm_thaw_loads_what_it_found_and_has_the_engine_use_it(engine: FakeEngine, house: Cached) -> None:
    house.cache.evict()
    _, window, receipt = await thawed(house, "gpu")
    assert (receipt.chunks_relinked, receipt.chunks_prefetched, receipt.partial) == (CHUNKS, CHUNKS, False)
    assert house.cache.prefetches == [(window.salt, WHOLE)]
    assert engine.seen("/v1/completions")[-1].json["prompt"] == IDS
    assert receipt.prompt_tokens == len(IDS)


async def test_a_prefetch_loads_and_an_eviction_drops(house: Cached) -> None:
    house.cache.evict()
    receipt = await prefetch(house.parts, TENANT, "w")
    assert (receipt.chunks_found, receipt.chunks_prefetched, receipt.partial) == (CHUNKS, CHUNKS, False)
    assert len(house.cache.memory) == CHUNKS
    done = await evict(house.parts, TENANT, "w")
    assert (done.tiers["cpu"].before, done.tiers["cpu"].after, done.kept) == (CHUNKS, 0, 0)
    assert house.cache.memory == set()


async def test_a_question_is_asked_on_what_was_put_back(house: Cached) -> None:
    house.cache.evict()
    answer = await ask(house.parts, TENANT, "w", "and?")
    assert (answer.restored.chunks_relinked, answer.restored.partial) == (CHUNKS, False)
    assert len(house.cache.prefetches) == 1


# --- a session goes on


async def test_a_first_turn_finds_its_windows_kv_loaded_and_is_not_loaded_for_twice(house: Cached) -> None:
    session, window, _ = await thawed(house)
    house.cache.evict()
    await resume(house.parts, session)
    assert house.cache.prefetches == [(window.salt, WHOLE)]
    assert house.cache.memory == {key.file_name for key in house.keys(window)}
    await resume(house.parts, session)
    assert len(house.cache.prefetches) == 1, "it was loaded in the last seconds"
    await evict(house.parts, TENANT, "w")
    await resume(house.parts, session)
    assert len(house.cache.prefetches) == 2, "it was evicted since"


async def test_a_frozen_session_that_goes_on_has_its_window_loaded(house: Cached) -> None:
    session = await house.parts.store.session(TENANT, "s")
    assert session is not None
    assert session.state == "frozen"
    await resume(house.parts, session)
    assert house.cache.prefetches == [(session.salt, WHOLE)]


async def test_a_session_under_another_salt_than_its_window_has_nothing_loaded(house: Cached) -> None:
    session, _, _ = await thawed(house)
    await resume(house.parts, replace(session, salt="another"))
    assert house.cache.prefetches == []


# --- another window by now


async def test_nothing_of_a_window_that_was_deleted_is_put_back(house: Cached) -> None:
    """What has lost its pin is pinned anew when it is put back: nobody would ever let go of that."""
    window = await house.parts.store.window(TENANT, "w")
    assert window is not None
    objects = await house.parts.store.pinned(window)
    session, _, _ = await thawed(house)
    await delete(house.parts, TENANT, "w")
    assert all((house.cache.folder / key.file_name).exists() for key in house.keys(window)), "the session's cache"
    with pytest.raises(GatewayError, match="deleted just now"):
        await restore(house.parts, window, objects, Receipt(CHUNKS), lambda *_: None)
    await resume(house.parts, session)
    assert house.pinned == set()


async def test_another_window_of_the_name_is_not_thawed_for_the_one_that_was_read(house: Cached) -> None:
    window = await house.parts.store.window(TENANT, "w")
    assert window is not None
    await delete(house.parts, TENANT, "w")
    await house.window()
    with pytest.raises(GatewayError, match="deleted just now") as caught:
        await thaw(house.parts, TENANT, "w", new_session_id="t", warm="none", seen=window)
    assert caught.value.code == "window_not_found"
    assert await house.parts.store.session(TENANT, "t") is None


async def test_a_window_that_is_deleted_while_it_warms_leaves_no_session(engine: FakeEngine, house: Cached) -> None:
    loop = asyncio.get_running_loop()
    deletion = delete(house.parts, TENANT, "w")
    engine.before_completion = lambda: asyncio.run_coroutine_threadsafe(deletion, loop).result(20)
    with pytest.raises(GatewayError, match="deleted just now"):
        await thaw(house.parts, TENANT, "w", new_session_id="t", warm="gpu")
    assert (await house.parts.store.session(TENANT, "t"), house.pinned) == (None, set())


async def test_an_isolated_clone_and_a_fanout_share_the_pins(house: Cached) -> None:
    before = house.pinned
    made, _ = await isolate(house.parts, TENANT, "w", Naming("apart"))
    await fanout(house.parts, TENANT, "apart", 2, "f")
    assert house.pinned == before
    session = await house.parts.store.session(TENANT, "f-1")
    assert session is not None
    await resume(house.parts, session)
    assert house.cache.prefetches == [(made.salt, WHOLE)]


async def test_an_export_of_a_window_that_is_deleted_meanwhile_tells_of_no_damage(house: Cached) -> None:
    window = await house.parts.store.window(TENANT, "w")
    assert window is not None
    manifest = await house.parts.store.manifest(window)
    await delete(house.parts, TENANT, "w")
    with pytest.raises(GatewayError) as caught:
        await exporting._sources(house.parts, window, manifest)
    assert caught.value.code == "window_not_found"

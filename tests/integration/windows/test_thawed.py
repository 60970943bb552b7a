"""A thaw reports what it finds, and a first turn finds its window's KV in the cache's memory."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import Session, Window
from gateway.windows import residency
from gateway.windows.archive import export as exporting
from gateway.windows.ask import ask
from gateway.windows.clone import isolate
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming, freeze
from gateway.windows.prefetch_evict import evict, prefetch
from gateway.windows.restore import Receipt, check_and_restore, restore_for_turn
from gateway.windows.retention.orphans import delete_orphans
from gateway.windows.thaw import Warm, fanout, thaw, thaw_text
from gateway.windows.verify import verify
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.prefix_cache_model import CHUNKS, IDS, MESSAGES, TENANT, Cached, opened

pytestmark = pytest.mark.anyio
WHOLE = CHUNKS * CHUNK


@pytest.fixture
async def harness(engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path) -> AsyncIterator[Cached]:
    async with opened(engine, fake_cache, tmp_path) as harness:
        await harness.window()
        fake_cache.memory.clear()
        yield harness


def flip(harness: Cached, key: ObjectKey) -> None:
    """Change a byte in place: the pin is the same file."""
    with (harness.cache.folder / key.file_name).open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))


def lose(harness: Cached, key: ObjectKey) -> None:
    """Take an object and its pin away."""
    for folder in (harness.cache.folder, harness.pins):
        (folder / key.file_name).unlink()


async def thawed(harness: Cached, warm: str = "none") -> tuple[Session, Window, Receipt]:
    return (await thaw(harness.ctx, "w", new_session_id=None, warm=warm))[:3]  # type: ignore[arg-type]


async def test_damaged_chunk_is_reported_and_deleted(harness: Cached) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    bad = harness.keys(window)[3]
    flip(harness, bad)
    harness.cache.memory.add(bad.file_name)
    _, _, receipt = await thawed(harness)
    assert (receipt.chunks_found, receipt.chunks_corrupt, receipt.partial) == (3, 1, True)
    assert bad.file_name not in harness.cache.memory
    assert not (harness.cache.folder / bad.file_name).exists()
    assert bad.file_name not in harness.pinned
    assert f"the KV of {CHUNKS - 3} of {CHUNKS} chunks is lost" in " ".join(receipt.warnings)


async def test_window_with_lost_chunk_is_partially_thawed(harness: Cached) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    lose(harness, harness.keys(window)[-1])
    session, _, receipt = await thawed(harness, "gpu")
    assert (receipt.chunks_found, receipt.chunks_corrupt, receipt.partial) == (CHUNKS - 1, 0, True)
    assert receipt.chunks_prefetched == CHUNKS - 1
    assert await harness.services.store.messages(session.transcript or b"") == MESSAGES


async def test_warm_thaw_loads_and_prefills(engine: FakeEngine, harness: Cached) -> None:
    harness.cache.evict()
    _, window, receipt = await thawed(harness, "gpu")
    assert (receipt.chunks_relinked, receipt.chunks_prefetched, receipt.partial) == (CHUNKS, CHUNKS, False)
    assert harness.cache.prefetches == [(window.salt, WHOLE)]
    assert engine.seen("/v1/completions")[-1].json["prompt"] == IDS
    assert receipt.prompt_tokens == len(IDS)


async def test_prefetch_loads_and_evict_drops(harness: Cached) -> None:
    harness.cache.evict()
    receipt, tiers, _ = await prefetch(harness.ctx, "w")
    assert (receipt.chunks_found, receipt.chunks_prefetched, receipt.partial) == (CHUNKS, CHUNKS, False)
    assert tiers == {"cpu": CHUNKS, "disk": CHUNKS}
    assert len(harness.cache.memory) == CHUNKS
    done = await evict(harness.ctx, "w")
    assert (done.tiers["cpu"].before, done.tiers["cpu"].after, done.kept) == (CHUNKS, 0, 0)
    assert harness.cache.memory == set()


async def test_prefetch_counts_the_objects_of_a_chunk_that_came_in_part(
    engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path
) -> None:
    fake_cache.world_size = 2
    async with opened(engine, fake_cache, tmp_path) as harness:
        window = await harness.window()
        fake_cache.memory.clear()
        last = fake_cache.folder / harness.keys(window)[-1].file_name
        fake_cache.before_answer = lambda method, _: last.unlink(missing_ok=True) if method == "POST" else None
        receipt, tiers, _ = await prefetch(harness.ctx, "w")
        assert (receipt.chunks_found, receipt.chunks_prefetched, tiers["cpu"]) == (CHUNKS, CHUNKS - 1, 2 * CHUNKS - 1)


async def in_memory(harness: Cached) -> int | None:
    """How many of the window's objects are said to be in LMCache's memory."""
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    present, _, _ = await residency.find(harness.services, window, [str(key) for key in harness.keys(window)])
    return len(present["cpu"]) if "cpu" in present else None


async def test_memory_is_a_tier_while_nothing_of_it_moved(harness: Cached) -> None:
    assert await in_memory(harness) is None
    await prefetch(harness.ctx, "w")
    assert await in_memory(harness) == CHUNKS
    verdict = await verify(harness.ctx, "w")
    assert (verdict.ok, verdict.tiers["cpu"].present, verdict.tiers["cpu"].checked) == (True, CHUNKS, False)
    await evict(harness.ctx, "w")
    assert await in_memory(harness) == 0


async def test_only_prefetch_and_evict_ask_for_the_metrics_of_lmcache(harness: Cached) -> None:
    """They grow with every salt."""
    paths: list[str] = []
    harness.cache.before_answer = lambda _, path: paths.append(path)
    await thawed(harness, "gpu")
    await ask(harness.ctx, "w", "and?")
    assert (await in_memory(harness), "/metrics" in paths) == (None, False)
    await prefetch(harness.ctx, "w")
    assert "/metrics" in paths


async def test_prefetch_says_nothing_of_a_memory_into_which_it_loaded_nothing(harness: Cached) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    lose(harness, harness.keys(window)[0])
    receipt, tiers, _ = await prefetch(harness.ctx, "w")
    assert (receipt.chunks_prefetched, receipt.partial, tiers) == (None, True, {"disk": CHUNKS - 1})


async def test_memory_is_unknown_once_lmcache_evicted_from_it(harness: Cached) -> None:
    await prefetch(harness.ctx, "w")
    harness.cache.memory.pop()
    assert await in_memory(harness) is None


async def test_memory_is_unknown_once_an_evicted_window_was_used(harness: Cached) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    await evict(harness.ctx, "w")
    harness.cache.store(IDS, window.salt)
    assert await in_memory(harness) is None


async def test_memory_of_another_lmcache_process_is_unknown(harness: Cached) -> None:
    await prefetch(harness.ctx, "w")
    harness.cache.started = "1.8e+09"
    assert await in_memory(harness) is None


async def test_lmcache_without_metrics_is_no_error(harness: Cached) -> None:
    harness.cache.before_answer = _refuse_metrics
    await prefetch(harness.ctx, "w")
    assert await in_memory(harness) is None


def _refuse_metrics(method: str, path: str) -> None:
    if path == "/metrics":
        raise ConnectionResetError


async def test_ask_restores_kv_first(harness: Cached) -> None:
    harness.cache.evict()
    answer = await ask(harness.ctx, "w", "and?")
    assert (answer.restored.chunks_relinked, answer.restored.partial) == (CHUNKS, False)
    assert len(harness.cache.prefetches) == 1


# --- a session continues


async def test_first_turn_loads_window_kv_once(harness: Cached) -> None:
    session, window, _ = await thawed(harness)
    harness.cache.evict()
    await restore_for_turn(harness.services, session)
    assert harness.cache.prefetches == [(window.salt, WHOLE)]
    assert harness.cache.memory == {key.file_name for key in harness.keys(window)}
    await restore_for_turn(harness.services, session)
    assert len(harness.cache.prefetches) == 1, "it was loaded in the last seconds"
    await evict(harness.ctx, "w")
    await restore_for_turn(harness.services, session)
    assert len(harness.cache.prefetches) == 2, "it was evicted since"


async def test_next_turn_of_frozen_session_loads_its_window(harness: Cached) -> None:
    session = await harness.services.store.session(TENANT, "s")
    assert session is not None
    assert session.state == "frozen"
    await restore_for_turn(harness.services, session)
    assert harness.cache.prefetches == [(session.salt, WHOLE)]


async def test_session_with_other_salt_loads_nothing(harness: Cached) -> None:
    session, _, _ = await thawed(harness)
    await restore_for_turn(harness.services, structs.replace(session, salt="another"))
    assert harness.cache.prefetches == []


# --- another window by now


async def test_deleted_window_is_not_restored(harness: Cached) -> None:
    """Restoring an object also restores its pin, which nothing would ever remove."""
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    manifest = await harness.services.store.manifest(window)
    session, _, _ = await thawed(harness)
    await delete(harness.ctx, "w")
    assert all((harness.cache.folder / key.file_name).exists() for key in harness.keys(window)), "the session's cache"
    with pytest.raises(GatewayError, match="just deleted"):
        await check_and_restore(harness.ctx, window, manifest)
    await restore_for_turn(harness.services, session)
    assert harness.pinned == set()


async def test_thaw_refuses_a_replaced_window(harness: Cached) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    await delete(harness.ctx, "w")
    await harness.window()
    with pytest.raises(GatewayError, match="just deleted") as caught:
        await thaw(harness.ctx, "w", new_session_id="t", warm="none", window=window)
    assert caught.value.code == "window_not_found"
    assert await harness.services.store.session(TENANT, "t") is None


async def test_window_deleted_while_warming_leaves_no_session(engine: FakeEngine, harness: Cached) -> None:
    loop = asyncio.get_running_loop()
    deletion = delete(harness.ctx, "w")
    engine.before_completion = lambda: asyncio.run_coroutine_threadsafe(deletion, loop).result(20)
    with pytest.raises(GatewayError, match="just deleted"):
        await thaw(harness.ctx, "w", new_session_id="t", warm="gpu")
    assert (await harness.services.store.session(TENANT, "t"), harness.pinned) == (None, set())


@pytest.mark.parametrize("name", [MODEL, "successor"])
async def test_window_of_another_model_is_thawed_as_text(engine: FakeEngine, harness: Cached, name: str) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    serve_another(engine, name)
    with pytest.raises(GatewayError) as caught:
        await thawed(harness)
    assert caught.value.code == "model_mismatch"
    session, _, receipt, _ = await thaw_text(harness.ctx, "w", new_session_id="t", warm="gpu")
    assert (session.model, session.lineage, session.token_count) == (name, window.lineage, len(IDS))
    assert session.salt not in ("", window.salt)
    assert (receipt.as_text, receipt.partial, receipt.chunks_found, receipt.prompt_tokens) == (True, True, 0, len(IDS))
    assert "only the text" in receipt.warnings[0]
    asked = engine.seen("/v1/completions")[-1].json
    assert (asked["prompt"], asked["cache_salt"]) == (IDS, session.salt)
    assert await harness.services.store.messages(session.transcript or b"") == MESSAGES
    await restore_for_turn(harness.services, session)
    assert harness.cache.prefetches == [], "the window's KV is of no use to another model"
    await delete_orphans(harness.services)
    assert await harness.services.store.orphaned_salts() == []
    assert len(objects_of(harness, session.salt)) == CHUNKS


@pytest.mark.parametrize("warm", ["none", "gpu"])
async def test_a_text_that_is_too_long_for_the_model_is_refused(
    engine: FakeEngine, harness: Cached, warm: Warm
) -> None:
    engine.context_limit = len(IDS)
    before = len(engine.seen("/v1/completions"))
    with pytest.raises(
        GatewayError, match=f"has {len(IDS)} tokens, and the context of model 'demo' {len(IDS)}"
    ) as caught:
        await thaw_text(harness.ctx, "w", new_session_id="t", warm=warm)
    assert (caught.value.code, await harness.services.store.session(TENANT, "t")) == ("model_mismatch", None)
    assert len(engine.seen("/v1/completions")) == before


async def test_a_window_without_tokens_is_thawed_without_asking_the_engine(engine: FakeEngine, harness: Cached) -> None:
    engine.on_tokenize = lambda exchange: exchange.json({"count": 0, "max_model_len": 4096, "tokens": []})
    await harness.session("empty", stored=False)
    await freeze(harness.ctx, "empty", Naming("empty"))
    before = len(engine.seen("/v1/completions"))
    _, window, receipt, _ = await thaw(harness.ctx, "empty", new_session_id="t", warm="gpu")
    assert (window.token_count, receipt.cached_tokens, receipt.prompt_tokens) == (0, None, 0)
    _, _, receipt, _ = await thaw_text(harness.ctx, "empty", new_session_id="u", warm="gpu")
    assert (receipt.as_text, receipt.cached_tokens, receipt.prompt_tokens) == (True, None, 0)
    assert len(engine.seen("/v1/completions")) == before


async def test_a_session_that_took_only_the_text_keeps_no_kv_of_a_deleted_window(
    engine: FakeEngine, harness: Cached
) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    serve_another(engine, "successor")
    session, _, _, _ = await thaw_text(harness.ctx, "w", new_session_id="t", warm="gpu")
    done = await delete(harness.ctx, "w")
    assert (done.blocks_deleted, done.blocks_kept, done.warnings) == (CHUNKS, 0, ())
    assert objects_of(harness, window.salt) == []
    assert len(objects_of(harness, session.salt)) == CHUNKS


async def test_kv_of_a_text_whose_session_id_was_taken_meanwhile_is_swept(engine: FakeEngine, harness: Cached) -> None:
    serve_another(engine, "successor")
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    loop, seen, services = asyncio.get_running_loop(), [], harness.services
    taken = services.store.add_sessions([Session(TENANT, "t", "other", salt="other")])

    def meanwhile() -> None:
        asyncio.run_coroutine_threadsafe(taken, loop).result(20)
        in_turn = services.turns.lineage_has_turn_in_flight(TENANT, window.lineage)
        seen.append(asyncio.run_coroutine_threadsafe(in_turn, loop).result(20))

    engine.before_completion = meanwhile
    with pytest.raises(GatewayError, match="already"):
        await thaw_text(harness.ctx, "w", new_session_id="t", warm="gpu")
    salt = engine.seen("/v1/completions")[-1].json["cache_salt"]
    assert (seen, len(objects_of(harness, salt))) == ([True], CHUNKS)
    await delete_orphans(services)
    assert objects_of(harness, salt) == []


async def test_thaw_of_a_text_says_what_it_does_and_does_not(engine: FakeEngine, harness: Cached) -> None:
    steps: list[tuple[str, int, int]] = []
    ctx = replace(harness.ctx, progress=lambda *step: steps.append(step))
    _, _, receipt, _ = await thaw_text(ctx, "w", new_session_id=None, warm="cpu")
    assert ("`warm: cpu` loaded nothing" in receipt.warnings[-1], steps) == (True, [])
    await thaw_text(ctx, "w", new_session_id=None, warm="gpu")
    assert steps == [("prefill", 0, len(IDS)), ("prefill", len(IDS), len(IDS))]


def serve_another(engine: FakeEngine, name: str) -> None:
    """Serve other weights than those of the window."""
    card = {"id": name, "object": "model", "root": "org/other", "max_model_len": 4096}
    engine.on_models = lambda exchange: exchange.json({"object": "list", "data": [card]})


def objects_of(harness: Cached, salt: str) -> list[Path]:
    """The files of what the cache has under a salt."""
    return list(harness.cache.folder.glob(f"*@{salt}.data"))


async def test_isolated_clone_and_fanout_share_pins(harness: Cached) -> None:
    before = harness.pinned
    made, _ = await isolate(harness.ctx, "w", Naming("apart"))
    await fanout(harness.ctx, "apart", 2, "f")
    assert harness.pinned == before
    session = await harness.services.store.session(TENANT, "f-1")
    assert session is not None
    await restore_for_turn(harness.services, session)
    assert harness.cache.prefetches == [(made.salt, WHOLE)]


async def test_export_of_deleted_window_reports_no_damage(harness: Cached) -> None:
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    manifest = await harness.services.store.manifest(window)
    await delete(harness.ctx, "w")
    with pytest.raises(GatewayError) as caught:
        await exporting._sources(harness.services, window, manifest)
    assert caught.value.code == "window_not_found"

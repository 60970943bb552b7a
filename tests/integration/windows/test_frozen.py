"""A freeze pins what it claims, waits for late objects, and commits what it has read: real files, real pins."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.store.types import Text
from gateway.windows.clone import add_copy, clone, isolate, renamed
from gateway.windows.delete import Deleted, delete
from gateway.windows.freeze import Naming, freeze, freeze_automatically
from gateway.windows.retention import orphans, sweeper
from gateway.windows.thaw import fanout, thaw
from gateway.windows.verify import verify
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.prefix_cache_model import CHUNKS, IDS, MESSAGES, TENANT, Cached, opened
from tests.support.tier_harness import lose_text

pytestmark = pytest.mark.anyio


@pytest.fixture
async def harness(engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path) -> AsyncIterator[Cached]:
    async with opened(engine, fake_cache, tmp_path) as harness:
        yield harness


async def test_frozen_window_survives_eviction(harness: Cached) -> None:
    window = await harness.window()
    assert (window.kv, window.chunk_count) == ("complete", CHUNKS)
    assert harness.pinned == {key.file_name for key in harness.keys(window)}
    harness.cache.evict()
    verdict = await verify(harness.ctx, "w")
    assert (verdict.ok, verdict.chunks_usable) == (True, CHUNKS)
    _, _, receipt, _ = await thaw(harness.ctx, "w", new_session_id=None, warm="none")
    assert (receipt.chunks_found, receipt.chunks_relinked, receipt.partial) == (CHUNKS, CHUNKS, False)


async def test_session_that_leaves_no_room_for_a_turn_is_frozen(engine: FakeEngine, harness: Cached) -> None:
    """vLLM renders no prompt longer than the context. The last reply may fill it, and a template closes it."""
    message = f"This model's maximum context length is {len(IDS)} tokens. However, your prompt contains more."

    def refuse(exchange: Exchange) -> None:
        exchange.json({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)

    engine.context_limit, engine.on_other = len(IDS), refuse
    window = await harness.window()
    assert (window.kv, window.token_count) == ("complete", len(IDS) - 1)
    receipt = (await thaw(harness.ctx, "w", new_session_id=None, warm="gpu")).receipt
    assert (receipt.partial, receipt.prompt_tokens) == (False, len(IDS) - 1)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"0"])
async def test_object_of_wrong_size_is_not_pinned_but_computed_again(
    harness: Cached, change: Callable[[bytes], bytes]
) -> None:
    """Nothing else knows that it is wrong: it has no checksum before it is pinned."""
    session = await harness.session()
    name = harness.cache.keys(IDS, session.salt)[1].file_name
    file = harness.cache.folder / name
    file.write_bytes(change(file.read_bytes()))
    window = await harness.window()
    assert (window.kv, window.chunk_count) == ("complete", CHUNKS)
    assert file.stat().st_size == (harness.pins / name).stat().st_size == harness.cache.object_bytes
    assert (await verify(harness.ctx, "w")).ok


async def test_freeze_waits_for_late_objects(engine: FakeEngine, harness: Cached) -> None:
    session, late = await harness.session(stored=False), []
    harness.cache.before_write = lambda name: bool(late.append(name))

    def seen(step: str, done: int, total: int) -> None:
        if step == "barrier" and not done:
            for key in harness.cache.keys(IDS, session.salt):
                harness.cache.write(key)

    window = await harness.window(progress=seen)
    assert (window.kv, len(late)) == ("complete", CHUNKS)
    assert len(engine.seen("/v1/completions")) == 1, "nothing had to be computed twice"


async def test_missing_objects_are_computed_once_more(engine: FakeEngine, harness: Cached) -> None:
    await harness.session(stored=False)
    refused: set[str] = set()
    harness.cache.before_write = lambda name: name in refused or bool(refused.add(name))
    window = await harness.window()
    assert (window.kv, window.chunk_count) == ("complete", CHUNKS)
    assert len(engine.seen("/v1/completions")) == 2


async def test_chunks_after_a_missing_one_are_not_claimed(harness: Cached) -> None:
    session = await harness.session(stored=False)
    hole = harness.cache.keys(IDS, session.salt)[2].file_name
    harness.cache.before_write = lambda name: name != hole
    window, warnings = await freeze(harness.ctx, "s", Naming("w"))
    assert (window.kv, window.chunk_count) == ("partial", 2)
    assert f"2 of {CHUNKS} chunks were seen" in warnings[0]
    assert {o.key for o in await harness.services.store.pinned(window)} == {
        str(key) for key in harness.keys(window)[:2]
    }
    assert harness.pinned == {key.file_name for key in harness.keys(window)[:2]}, (
        "what follows the missing one is unpinned"
    )


async def test_objects_are_claimed_from_pins_to_commit(harness: Cached) -> None:
    claimed: dict[str, bool] = {}
    await harness.window(progress=lambda step, done, total: claimed.update({step: harness.claimed}))
    assert (claimed["render"], claimed["pin"], claimed["commit"], harness.claimed) == (False, True, True, False)


async def test_nearly_full_disk_is_refused_before_computing(
    engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path
) -> None:
    async with opened(engine, fake_cache, tmp_path, disk_reserve_bytes=2**62) as harness:
        with pytest.raises(GatewayError, match="disk_reserve_bytes") as caught:
            await harness.window()
        assert caught.value.code == "storage_full"
        assert (harness.pinned, engine.seen("/v1/completions")) == (set(), [])


async def test_session_of_other_weights_gets_the_served_salt(harness: Cached) -> None:
    session = await harness.session(fingerprint="older")
    window = await harness.window()
    model = await harness.services.engines.model(window.model)
    assert window.fingerprint == model.fingerprint
    assert window.salt == harness.services.salts.of(TENANT, "s", model.fingerprint) != session.salt
    assert harness.pinned == {key.file_name for key in harness.keys(window)}


# --- the snapshot is what is committed


async def edited(harness: Cached) -> None:
    await harness.session("s", [{"role": "user", "content": "something else"}, {"role": "assistant", "content": "Ok."}])


async def deleted(harness: Cached) -> None:
    await orphans.delete_session(harness.ctx, "s")


async def recreated(harness: Cached) -> None:
    await deleted(harness)
    await edited(harness)


async def swept(harness: Cached) -> None:
    await harness.services.store.forget_idle(0)
    await sweeper.sweep(harness.services)


@pytest.mark.parametrize("meanwhile", [edited, deleted, recreated, swept], ids=lambda one: one.__name__)
@pytest.mark.parametrize("where", ["/tokenize", "/v1/completions"])
async def test_window_has_the_snapshot_despite_later_changes(
    engine: FakeEngine, harness: Cached, where: str, meanwhile: Callable[[Cached], Awaitable[None]]
) -> None:
    before = await harness.session(stored=False)
    asked, goes_on = threading.Event(), threading.Event()

    def held(exchange: Exchange, answer: Callable[[Exchange], None]) -> None:
        asked.set()
        assert goes_on.wait(20)
        answer(exchange)

    if where == "/tokenize":
        engine.on_tokenize = lambda exchange: held(exchange, engine._tokens)
    else:
        engine.on_completion = lambda exchange: held(exchange, engine.answer_completion)
    freezing = asyncio.create_task(harness.window())
    await asyncio.to_thread(asked.wait, 20)
    await meanwhile(harness)
    goes_on.set()
    window = await freezing
    assert await harness.services.store.text(window) == Text(MESSAGES, {})
    assert list((await harness.services.store.manifest(window)).token_ids) == IDS
    assert harness.pinned == {key.file_name for key in harness.keys(window)}
    assert (await verify(harness.ctx, "w")).ok
    now = await harness.services.store.session(TENANT, "s")
    assert now is None or (now.state, now.frozen_at) == ("active", None)
    session, _, receipt, _ = await thaw(harness.ctx, "w", new_session_id="t", warm="gpu")
    assert (receipt.chunks_found, session.transcript) == (CHUNKS, before.transcript)
    # And nothing is left when both are gone.
    await orphans.delete_session(harness.ctx, "t")
    await delete(harness.ctx, "w")
    if now is not None:
        await deleted(harness)
    await orphans.delete_orphans(harness.services)
    assert (harness.pinned, list(harness.cache.folder.iterdir())) == (set(), [])


async def test_cancelled_freeze_leaves_no_pin(engine: FakeEngine, harness: Cached) -> None:
    await harness.session()
    freezing: asyncio.Task[object]

    def seen(step: str, done: int, total: int) -> None:
        if step == "commit":
            freezing.cancel()

    freezing = asyncio.create_task(harness.window(progress=seen))
    with pytest.raises(asyncio.CancelledError):
        await freezing
    window = await harness.services.store.window(TENANT, "w")
    assert harness.pinned == ({key.file_name for key in harness.keys(window)} if window else set())


@pytest.mark.parametrize("failure", [GatewayError("storage_full", "no"), OSError("no"), asyncio.CancelledError()])
async def test_failed_freeze_marks_its_salt_orphaned(harness: Cached, failure: BaseException) -> None:
    session = await harness.session(stored=False)

    def seen(step: str, done: int, total: int) -> None:
        if step == "commit":
            raise failure

    with pytest.raises(type(failure)):
        await harness.window(progress=seen)
    assert [one.salt for one in await harness.services.store.orphaned_salts()] == [session.salt]
    assert harness.pinned == set()


async def test_automatic_freeze_of_deleted_session_makes_no_window(engine: FakeEngine, harness: Cached) -> None:
    await harness.session(stored=False)
    loop = asyncio.get_running_loop()
    deletion = deleted(harness)
    engine.before_completion = lambda: asyncio.run_coroutine_threadsafe(deletion, loop).result(20)
    with pytest.raises(GatewayError, match="deleted while it was being frozen") as caught:
        await freeze_automatically(harness.ctx, "s", Naming("auto"))
    assert caught.value.code == "session_not_found"
    assert (await harness.services.store.window(TENANT, "auto"), harness.pinned) == (None, set())
    await orphans.delete_orphans(harness.services)
    assert list(harness.cache.folder.iterdir()) == []


# --- operations on an existing window


async def test_deletion_leaves_what_is_about_to_be_committed(harness: Cached) -> None:
    window = await harness.window()
    pinned = harness.pinned
    async with harness.services.claims.keep(harness.keys(window)):
        assert (await delete(harness.ctx, "w")).blocks_deleted == 0
        assert (await harness.services.store.window(TENANT, "w"), harness.pinned) == (None, pinned)
    assert harness.pinned == set()  # it was not committed


async def test_replaced_source_is_not_cloned(harness: Cached) -> None:
    first = await harness.window()
    await delete(harness.ctx, "w")
    for _ in range(2):
        with pytest.raises(GatewayError, match="just deleted") as caught:
            await add_copy(harness.services, renamed(first, Naming("copy")), first, None)
        assert caught.value.code == "window_not_found"
        assert await harness.services.store.window(TENANT, "copy") is None
        if await harness.services.store.window(TENANT, "w") is None:
            await harness.window()


async def test_operations_after_a_deletion_find_no_window(harness: Cached) -> None:
    """A deletion that has begun ends before an operation that begins after it: both wait for the store's one writer."""
    makes: list[Callable[[], Coroutine[Any, Any, object]]] = [
        lambda: clone(harness.ctx, "w", Naming("made")),
        lambda: isolate(harness.ctx, "w", Naming("made")),
        lambda: fanout(harness.ctx, "w", 2, "made"),
    ]
    for make in makes:
        await harness.window()
        gone, refused = await asyncio.gather(delete(harness.ctx, "w"), make(), return_exceptions=True)
        assert isinstance(gone, Deleted)
        assert isinstance(refused, GatewayError)
        assert refused.code == "window_not_found"
        assert await harness.services.store.window(TENANT, "made") is None
        assert await harness.services.store.session(TENANT, "made-1") is None
        assert harness.pinned == set()


async def test_window_in_unconfigured_tier_is_not_verified(
    engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path
) -> None:
    async with opened(engine, fake_cache, tmp_path) as harness:
        await harness.window()
        assert (await verify(harness.ctx, "w")).ok
    async with opened(engine, fake_cache, tmp_path, kv_dir="") as harness:
        verdict = await verify(harness.ctx, "w")
        assert (verdict.ok, verdict.tiers["disk"].checked, verdict.damaged) == (False, False, ())
        assert "not configured" in verdict.warnings[0]


async def test_window_without_text_fails_verification(harness: Cached) -> None:
    await harness.window()
    lose_text(harness.services.settings.store_path, "w")
    verdict = await verify(harness.ctx, "w")
    assert (verdict.ok, verdict.damaged) == (False, ())
    assert "text of window 'w' is gone" in verdict.warnings[0]
    assert CHUNK * verdict.chunks_usable <= len(IDS)

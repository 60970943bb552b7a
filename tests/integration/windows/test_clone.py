"""Clones, isolated or not, share pins: none copies bytes, deleting one keeps the others', and the last frees all."""

import asyncio
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from msgspec import structs

from gateway.errors import GatewayError
from gateway.kv.keys import object_keys
from gateway.records import Session, Window
from gateway.windows.clone import clone, isolate
from gateway.windows.delete import Deleted, delete
from gateway.windows.freeze import Naming
from gateway.windows.restore import restore_for_turn
from gateway.windows.retention import orphans
from gateway.windows.retention.usage import usage
from gateway.windows.thaw import fanout, thaw
from gateway.windows.verify import verify
from tests.support.fakes.engine import FakeEngine
from tests.support.harness import CHUNK, CHUNKS, IDS, GatewayHarness, cache_server, open_harness, value, window
from tests.support.tier_harness import RedisServer

pytestmark = pytest.mark.anyio

TENANT = "default"
SIZE = sum(len(value(index)) for index in range(CHUNKS))


async def apart(harness: GatewayHarness, source: str = "w", name: str = "apart") -> Window:
    """An isolated clone."""
    made, warnings = await isolate(harness.ctx, source, Naming(name))
    assert warnings == ()
    return made


async def verified(harness: GatewayHarness, *names: str) -> None:
    """Every byte of these windows is there."""
    for name in names:
        verdict = await verify(harness.ctx, name)
        assert (verdict.ok, verdict.chunks_usable) == (True, CHUNKS), verdict


async def thawed(harness: GatewayHarness, name: str) -> Session:
    """Thaw, and find all of it."""
    session, _, receipt, _ = await thaw(harness.ctx, name, new_session_id=None, warm="none")
    assert (receipt.chunks_found, receipt.partial) == (CHUNKS, False)
    return session


async def gone(harness: GatewayHarness, name: str) -> Deleted:
    """Delete a window."""
    return await delete(harness.ctx, name)


async def test_clones_and_branches_create_no_objects(harness: GatewayHarness) -> None:
    await window(harness.services)
    session = await thawed(harness, "w")
    before = harness.everything()
    copy = (await clone(harness.ctx, "w", Naming("copy"))).window
    made = await apart(harness)
    again = await apart(harness, "apart", "again")
    sessions, _, warnings = await fanout(harness.ctx, "copy", 3, None)
    assert harness.everything() == before
    assert warnings == ()
    assert {one.salt for one in sessions} == {session.salt} == {copy.salt}
    assert len({session.salt, made.salt, again.salt}) == 3
    assert (made.kv, made.chunk_count, made.size_bytes) == (copy.kv, copy.chunk_count, copy.size_bytes)
    await verified(harness, "w", "copy", "apart", "again")


async def test_first_turn_of_a_branch_restores_evicted_kv(
    harness: GatewayHarness, caplog: pytest.LogCaptureFixture
) -> None:
    kept = await window(harness.services)
    keys = object_keys(kept.model_root, IDS, CHUNK, 1, kept.salt)
    names = [str(key) for key in keys]
    (first, second), _, _ = await fanout(harness.ctx, "w", 2, None)
    assert await _present(harness, names) == [0, 0]
    await restore_for_turn(harness.services, first)
    assert await _present(harness, names) == [CHUNKS, CHUNKS]
    assert "lost" not in caplog.text
    disk, redis = harness.services.pins.tiers
    await disk.remove(keys[-1:])
    await restore_for_turn(harness.services, second)
    assert await _present(harness, names) == [CHUNKS - 1, CHUNKS]
    assert f"session {second.id} continues without all of its KV: disk tier: 1 of {CHUNKS} objects" in caplog.text
    await redis.remove(keys)
    went_on = structs.replace(second, state="active")
    await restore_for_turn(harness.services, went_on)
    assert await _present(harness, names) == [CHUNKS - 1, 0], "the engine has taken it over"


async def test_branch_of_a_replaced_window_restores_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    (first,), made, _ = await fanout(harness.ctx, "w", 1, None)
    await delete(harness.ctx, "w")
    await restore_for_turn(harness.services, first)
    other = await window(harness.services)
    names = [str(key) for key in object_keys(other.model_root, IDS, CHUNK, 1, other.salt)]
    await restore_for_turn(harness.services, structs.replace(first, window_transcript=b"another"))
    assert (other.salt, await _present(harness, names)) == (made.salt, [0, 0])


async def _present(harness: GatewayHarness, names: Sequence[str]) -> list[int]:
    """How many of these LMCache would find, tier by tier."""
    return [sum(map(bool, await tier.sizes(names))) for tier in harness.services.pins.tiers]


async def test_isolated_clone_gets_its_own_names_when_thawed(harness: GatewayHarness) -> None:
    source = await window(harness.services)
    made = await apart(harness)
    names = object_keys(made.model_root, IDS, CHUNK, 1, made.salt)
    assert [harness.redis.live(name) for name in names] == [None] * CHUNKS
    session = await thawed(harness, "apart")
    assert (session.salt, session.lineage) == (made.salt, made.lineage)
    assert [harness.redis.live(name) for name in names] == [value(index) for index in range(CHUNKS)]
    for name, own in zip(names, object_keys(made.model_root, IDS, CHUNK, 1, source.salt), strict=True):
        pin = harness.kv.parent / "kv-pins" / harness.services.store.store_id / own.file_name
        assert (harness.kv / name.file_name).samefile(pin)
    tiers, _ = await usage(harness.services)
    by_name = {tier.name: tier for tier in tiers}
    assert by_name["disk"].total.bytes == by_name["disk"].windows.bytes == SIZE
    assert by_name["redis"].total.bytes == by_name["redis"].windows.bytes == 2 * SIZE


async def test_encryption_by_salt_isolates_only_text_and_ids(
    engine: FakeEngine, redis_server: RedisServer, tmp_path: Path
) -> None:
    with cache_server(serde="aesgcm") as url:
        async with open_harness(engine, url, redis_server, tmp_path) as harness:
            await window(harness.services)
            made, warnings = await isolate(harness.ctx, "w", Naming("apart"))
            assert (made.kv, made.chunk_count, made.size_bytes) == ("absent", 0, 0)
            assert "encrypts by salt (aesgcm)" in warnings[0]
            assert tuple((await harness.services.store.manifest(made)).token_ids) == IDS
            _, _, receipt, _ = await thaw(harness.ctx, "apart", new_session_id=None, warm="none")
            assert (receipt.chunks_expected, receipt.chunks_found, receipt.partial) == (CHUNKS, 0, True)


@pytest.mark.parametrize("order", list(permutations(["w", "copy", "apart"])), ids="-".join)
async def test_deletions_keep_other_clones_and_last_frees_all(harness: GatewayHarness, order: tuple[str, ...]) -> None:
    empty = harness.everything()
    await window(harness.services)
    await clone(harness.ctx, "w", Naming("copy"))
    await apart(harness)
    for name in ("w", "apart"):
        session = await thawed(harness, name)
        await orphans.delete_session(harness.ctx, session.id)
    left = list(order)
    for name in order[:-1]:
        assert (await gone(harness, name)).blocks_deleted == 0
        left.remove(name)
        await verified(harness, *left)
        for other in left:
            await orphans.delete_session(harness.ctx, (await thawed(harness, other)).id)
    last = await gone(harness, order[-1])
    assert last.blocks_deleted == CHUNKS
    assert last.space_freed_bytes >= 2 * SIZE
    await orphans.delete_orphans(harness.services)
    assert harness.everything() == empty


async def test_source_session_keeps_cache_after_last_clone(harness: GatewayHarness) -> None:
    source = await window(harness.services)
    session = await thawed(harness, "w")
    await apart(harness)
    await gone(harness, "w")
    done = await gone(harness, "apart")
    keys = object_keys(source.model_root, IDS, CHUNK, 1, source.salt)
    assert done.blocks_deleted == 0
    assert [harness.redis.live(key) for key in keys] == [value(index) for index in range(CHUNKS)]
    assert await harness.services.store.held_objects() == set()
    await orphans.delete_session(harness.ctx, session.id)
    assert [harness.redis.live(key) for key in keys] == [None] * CHUNKS


async def test_concurrent_clones_and_deletions_leave_whole_windows(harness: GatewayHarness) -> None:
    empty = harness.everything()
    await window(harness.services)
    outcomes = await asyncio.gather(
        *(clone(harness.ctx, "w", Naming(f"c{number}")) for number in range(4)),
        *(isolate(harness.ctx, "w", Naming("same")) for _ in range(4)),
        *(delete(harness.ctx, "w") for _ in range(2)),
        *(isolate(harness.ctx, "w", Naming(f"i{number}")) for number in range(4)),
        return_exceptions=True,
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, GatewayError), outcome
            assert outcome.code in ("window_not_found", "window_already_exists")
    made = [name for name in (*(f"c{n}" for n in range(4)), *(f"i{n}" for n in range(4)), "same")
            if await harness.services.store.window(TENANT, name)]  # fmt: skip
    assert await harness.services.store.window(TENANT, "w") is None
    await verified(harness, *made)
    for name in made:
        await gone(harness, name)
    await orphans.delete_orphans(harness.services)
    assert harness.everything() == empty

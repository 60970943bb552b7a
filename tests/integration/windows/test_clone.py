"""Clones, isolated or not, share pins: none copies a byte, none loses one when another goes, and the last takes all."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.kv.keys import object_keys
from gateway.records import Session, Window
from gateway.windows.clone import clone
from gateway.windows.delete import Deleted, delete
from gateway.windows.fanout import fanout
from gateway.windows.freeze import Naming
from gateway.windows.isolate import isolate
from gateway.windows.resume import resume
from gateway.windows.retention import orphans
from gateway.windows.retention.usage import usage
from gateway.windows.thaw import thaw
from gateway.windows.verify import verify
from tests.support.fakes.engine import FakeEngine
from tests.support.harness import CHUNK, CHUNKS, IDS, House, cache_server, opened, value, window
from tests.support.tier_harness import RedisServer

pytestmark = pytest.mark.anyio

TENANT = "default"
SIZE = sum(len(value(index)) for index in range(CHUNKS))


async def apart(house: House, source: str = "w", name: str = "apart") -> Window:
    """An isolated clone."""
    made, warnings = await isolate(house.parts, TENANT, source, Naming(name))
    assert warnings == []
    return made


async def verified(house: House, *names: str) -> None:
    """Every byte of these windows is there."""
    for name in names:
        verdict = await verify(house.parts, TENANT, name)
        assert (verdict.ok, verdict.chunks_usable) == (True, CHUNKS), verdict


async def thawed(house: House, name: str) -> Session:
    """Thaw, and find all of it."""
    session, _, receipt = await thaw(house.parts, TENANT, name, new_session_id=None, warm="none")
    assert (receipt.chunks_found, receipt.partial) == (CHUNKS, False)
    return session


async def gone(house: House, name: str) -> Deleted:
    """Delete a window."""
    return await delete(house.parts, TENANT, name)


async def test_no_clone_and_no_branch_makes_a_file_or_a_key(house: House) -> None:
    await window(house.parts)
    session = await thawed(house, "w")
    before = house.everything()
    copy = await clone(house.parts, TENANT, "w", Naming("copy"))
    made = await apart(house)
    again = await apart(house, "apart", "again")
    sessions, _, warnings = await fanout(house.parts, TENANT, "copy", 3, None)
    assert house.everything() == before
    assert warnings == []
    assert {one.salt for one in sessions} == {session.salt} == {copy.salt}
    assert len({session.salt, made.salt, again.salt}) == 3
    assert (made.kv, made.chunk_count, made.size_bytes) == (copy.kv, copy.chunk_count, copy.size_bytes)
    await verified(house, "w", "copy", "apart", "again")


async def test_the_first_turn_of_a_branch_puts_back_what_was_evicted_and_the_log_tells_what_is_lost(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    kept = await window(house.parts)
    keys = object_keys(kept.model_root, IDS, CHUNK, 1, kept.salt)
    names = [str(key) for key in keys]
    (first, second), _, _ = await fanout(house.parts, TENANT, "w", 2, None)
    assert await _present(house, names) == [0, 0]
    await resume(house.parts, first)
    assert await _present(house, names) == [CHUNKS, CHUNKS]
    assert "lost" not in caplog.text
    disk, redis = house.parts.pins.tiers
    await disk.remove(keys[-1:])
    await resume(house.parts, second)
    assert await _present(house, names) == [CHUNKS - 1, CHUNKS]
    assert f"session {second.id} goes on without all of its KV: disk tier: 1 of {CHUNKS} objects" in caplog.text
    await redis.remove(keys)
    went_on = replace(second, state="active")
    await resume(house.parts, went_on)
    assert await _present(house, names) == [CHUNKS - 1, 0], "the engine has taken it over"


async def test_a_branch_begins_without_a_window_that_was_deleted_or_is_another_one_by_now(house: House) -> None:
    await window(house.parts)
    (first,), made, _ = await fanout(house.parts, TENANT, "w", 1, None)
    await delete(house.parts, TENANT, "w")
    await resume(house.parts, first)
    other = await window(house.parts)
    names = [str(key) for key in object_keys(other.model_root, IDS, CHUNK, 1, other.salt)]
    await resume(house.parts, replace(first, window_transcript=b"another"))
    assert (other.salt, await _present(house, names)) == (made.salt, [0, 0])


async def _present(house: House, names: Sequence[str]) -> list[int]:
    """How many of these LMCache would find, tier by tier."""
    return [sum(map(bool, await tier.sizes(names))) for tier in house.parts.pins.tiers]


async def test_an_isolated_clone_is_found_under_its_own_names_once_it_is_thawed(house: House) -> None:
    source = await window(house.parts)
    made = await apart(house)
    names = object_keys(made.model_root, IDS, CHUNK, 1, made.salt)
    assert [house.redis.live(name) for name in names] == [None] * CHUNKS
    session = await thawed(house, "apart")
    assert (session.salt, session.lineage) == (made.salt, made.lineage)
    assert [house.redis.live(name) for name in names] == [value(index) for index in range(CHUNKS)]
    for name, own in zip(names, object_keys(made.model_root, IDS, CHUNK, 1, source.salt), strict=True):
        pin = house.kv.parent / "kv-pins" / house.parts.store.store_id / own.file_name
        assert (house.kv / name.file_name).samefile(pin)
    tiers, _ = await usage(house.parts)
    by_name = {tier.name: tier for tier in tiers}
    assert by_name["disk"].total.bytes == by_name["disk"].windows.bytes == SIZE
    assert by_name["redis"].total.bytes == by_name["redis"].windows.bytes == 2 * SIZE


async def test_where_bytes_are_encrypted_by_salt_only_text_and_ids_are_isolated(
    engine: FakeEngine, redis_server: RedisServer, tmp_path: Path
) -> None:
    with cache_server(serde="aesgcm") as url:
        async with opened(engine, url, redis_server, tmp_path) as house:
            await window(house.parts)
            made, warnings = await isolate(house.parts, TENANT, "w", Naming("apart"))
            assert (made.kv, made.chunk_count, made.size_bytes) == ("absent", 0, 0)
            assert "encrypts by salt (aesgcm)" in warnings[0]
            assert (await house.parts.store.manifest(made)).token_ids == IDS
            _, _, receipt = await thaw(house.parts, TENANT, "apart", new_session_id=None, warm="none")
            assert (receipt.chunks_expected, receipt.chunks_found, receipt.partial) == (CHUNKS, 0, True)


@pytest.mark.parametrize("order", list(permutations(["w", "copy", "apart"])), ids="-".join)
async def test_each_deletion_leaves_the_others_whole_and_the_last_leaves_nothing(
    house: House, order: tuple[str, ...]
) -> None:
    empty = house.everything()
    await window(house.parts)
    await clone(house.parts, TENANT, "w", Naming("copy"))
    await apart(house)
    for name in ("w", "apart"):
        session = await thawed(house, name)
        await orphans.delete_session(house.parts, TENANT, session.id)
    left = list(order)
    for name in order[:-1]:
        assert (await gone(house, name)).blocks_deleted == 0
        left.remove(name)
        await verified(house, *left)
        for other in left:
            await orphans.delete_session(house.parts, TENANT, (await thawed(house, other)).id)
    last = await gone(house, order[-1])
    assert last.blocks_deleted == CHUNKS
    assert last.space_freed_bytes >= 2 * SIZE
    await orphans.forget_loose(house.parts)
    assert house.everything() == empty


async def test_a_session_of_the_source_keeps_its_cache_when_the_clone_goes_last(house: House) -> None:
    source = await window(house.parts)
    session = await thawed(house, "w")
    await apart(house)
    await gone(house, "w")
    done = await gone(house, "apart")
    keys = object_keys(source.model_root, IDS, CHUNK, 1, source.salt)
    assert done.blocks_deleted == 0
    assert [house.redis.live(key) for key in keys] == [value(index) for index in range(CHUNKS)]
    assert await house.parts.store.held_objects() == set()
    await orphans.delete_session(house.parts, TENANT, session.id)
    assert [house.redis.live(key) for key in keys] == [None] * CHUNKS


async def test_clones_and_deletions_of_one_window_at_once_leave_whole_windows_only(house: House) -> None:
    empty = house.everything()
    await window(house.parts)
    outcomes = await asyncio.gather(
        *(clone(house.parts, TENANT, "w", Naming(f"c{number}")) for number in range(4)),
        *(isolate(house.parts, TENANT, "w", Naming("same")) for _ in range(4)),
        *(delete(house.parts, TENANT, "w") for _ in range(2)),
        *(isolate(house.parts, TENANT, "w", Naming(f"i{number}")) for number in range(4)),
        return_exceptions=True,
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, GatewayError), outcome
            assert outcome.code in ("window_not_found", "window_already_exists")
    made = [name for name in (*(f"c{n}" for n in range(4)), *(f"i{n}" for n in range(4)), "same")
            if await house.parts.store.window(TENANT, name)]  # fmt: skip
    assert await house.parts.store.window(TENANT, "w") is None
    await verified(house, *made)
    for name in made:
        await gone(house, name)
    await orphans.forget_loose(house.parts)
    assert house.everything() == empty

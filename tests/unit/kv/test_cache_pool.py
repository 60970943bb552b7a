"""Several caches: what goes to all of them, what to one, and which of them is left out."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.kv.cache_pool import CachePool
from gateway.kv.lmcache import LMCache
from tests.support.fakes.lmcache import CHUNK, ROOT, FakeLMCache

pytestmark = pytest.mark.anyio

IDS = tuple(range(3 * CHUNK))


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[list[FakeLMCache]]:
    """The caches of three nodes over one directory, which a test may stop."""
    made = [FakeLMCache(tmp_path / "kv").start() for _ in range(3)]
    yield made
    for cache in made:
        if cache.listening:
            cache.stop()


@asynccontextmanager
async def pool_of(caches: list[FakeLMCache], folder: Path, chunk_size: int = 0) -> AsyncIterator[CachePool]:
    async with CachePool(lambda url: LMCache(url, 1.0, folder / url[-5:], chunk_size), chunk_size) as pool:
        for cache in caches:
            await pool.add(cache.url)
        yield pool


async def test_a_deletion_reaches_every_cache_also_where_one_is_down(caches: list[FakeLMCache], tmp_path: Path) -> None:
    async with pool_of(caches, tmp_path) as pool:
        keys = caches[0].keys(IDS, "s")
        for cache in caches[:2]:
            cache.store(IDS, "s")
        assert await pool.delete(keys, tier="l1") == (6, 0)
        assert [cache.memory for cache in caches] == [set()] * 3
        caches[0].stop()
        for cache in caches[1:]:
            cache.memory.update(key.file_name for key in keys)
        with pytest.raises(GatewayError, match=caches[0].url) as error:
            await pool.delete(keys, tier="all", adapter="fs")
        assert error.value.code == "cache_unavailable"
        assert [cache.memory for cache in caches[1:]] == [set()] * 2
        assert not list(caches[0].folder.glob("*.data"))
        answers = await pool.delete_each(keys, tier="l1")
        assert [isinstance(answers[cache.url], tuple) for cache in caches] == [False, True, True]


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("chunk", 2 * CHUNK, "--chunk-size 16"),
        ("hash_algorithm", "builtin", "--hash-algorithm blake3"),
        ("world_size", 2, "--tensor-parallel-size 1"),
    ],
)
async def test_the_odd_cache_is_left_out_with_the_remedy_until_it_is_like_the_others(
    caches: list[FakeLMCache], tmp_path: Path, field: str, value: object, remedy: str
) -> None:
    odd, usual = caches[0], getattr(caches[0], field)
    setattr(odd, field, value)
    async with pool_of(caches, tmp_path) as pool:
        info = await pool.info()
        assert (info.chunk_size, info.hash_algorithm, info.world_sizes) == (CHUNK, "blake3", {ROOT: 1})
        assert pool.chunk_size == CHUNK
        assert list(pool.left_out) == [odd.url]
        assert remedy in pool.left_out[odd.url]
        assert [pool.at(cache.url) is None for cache in caches] == [True, False, False]
        own = pool.own(odd.url)
        assert own is not None
        assert own.url == odd.url
        setattr(odd, field, usual)
        await pool.info()
        assert pool.left_out == {}
        assert pool.at(odd.url) is not None


async def test_of_two_that_differ_the_first_is_right_and_one_alone_differs_from_none(
    caches: list[FakeLMCache], tmp_path: Path
) -> None:
    first, second, _ = caches
    second.chunk = 2 * CHUNK
    async with pool_of([first, second], tmp_path) as pool:
        await pool.info()
        assert list(pool.left_out) == [second.url]
        await pool.remove(first.url)
        assert pool.left_out == {}
        assert pool.at("whatever") is pool.own(second.url)
        assert (await pool.info()).chunk_size == pool.chunk_size == 2 * CHUNK


async def test_a_cache_that_is_silent_is_named_and_the_others_answer(caches: list[FakeLMCache], tmp_path: Path) -> None:
    async with pool_of(caches, tmp_path) as pool:
        caches[1].stop()
        assert (await pool.info()).chunk_size == CHUNK
        assert list(pool.silent) == [caches[1].url]
        troubles = await pool.troubles()
        assert [bool(troubles[cache.url]) for cache in caches] == [False, True, False]
        assert not await pool.encrypts_by_salt()
        for cache in (caches[0], caches[2]):
            cache.stop()
        with pytest.raises(GatewayError, match="does not answer") as error:
            await pool.info()
        assert all(cache.url in error.value.message for cache in caches)


async def test_an_odd_cache_that_falls_silent_stays_left_out(caches: list[FakeLMCache], tmp_path: Path) -> None:
    caches[2].chunk = 2 * CHUNK
    async with pool_of(caches, tmp_path) as pool:
        await pool.info()
        caches[2].stop()
        await pool.info()
        assert list(pool.left_out) == list(pool.silent) == [caches[2].url]


async def test_memory_is_added_up(caches: list[FakeLMCache], tmp_path: Path) -> None:
    caches[0].store(IDS, "s")
    caches[1].memory.update(caches[0].memory)
    async with pool_of(caches, tmp_path) as pool:
        memory = (await pool.info()).memory
        assert memory is not None
        assert (memory.objects, memory.capacity_bytes) == (6, 3 * 2**20)


async def test_no_cache_at_all_says_why(tmp_path: Path) -> None:
    async with pool_of([], tmp_path) as pool:
        with pytest.raises(GatewayError, match="no cache is known yet"):
            await pool.info()
        pool.missing = {"caches:1": "caches:1 has no address: gone"}
        with pytest.raises(GatewayError, match=r"caches:1 has no address: gone"):
            await pool.info()
        assert (pool.at("x"), pool.chunk_size, await pool.troubles()) == (None, 0, {})


async def test_the_time_of_a_load_is_learned(caches: list[FakeLMCache], tmp_path: Path) -> None:
    async with pool_of(caches, tmp_path) as pool:
        cache = pool.own(caches[0].url)
        assert cache is not None
        assert pool.load_s(cache.url, 20_000) == pytest.approx(2)
        began = -1000.0  # of the monotonic clock: long ago
        pool.loaded(cache, 1000, began)
        assert pool.load_s(cache.url, 1000) > 900
        assert pool.load_s(caches[1].url, 20_000) == pytest.approx(2)
        pool.loaded(cache, 0, began)

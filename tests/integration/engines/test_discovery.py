"""Engines and caches that a name has: found, drained when their address goes, and paired by what they do."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from gateway.api.selftest import run
from gateway.app import open_services
from gateway.engines.client import HttpEngineClient
from gateway.engines.connection_pool import Upstream
from gateway.engines.node import EngineNode
from gateway.engines.pool import EnginePool
from gateway.kv.cache_pool import CachePool
from gateway.kv.lmcache import LMCache
from gateway.runtime.addresses import LookupFailed
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics
from gateway.validation.addresses import EngineEntry
from gateway.windows.context import Services
from gateway.windows.nodes import Nodes
from tests.support.fakes.engine import FakeEngine
from tests.support.node_pairs import Pair, pairs

pytestmark = pytest.mark.anyio

ENGINES = EngineEntry(discover="engines:8000")
BOTH = EngineEntry(discover="engines:8000", cache_discover="caches:8080")


class Names:
    """A name server, which a test tells what it has."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses

    async def resolve(self, name: str, _timeout_s: float) -> list[str]:
        """As `look_up`."""
        if not (found := self.addresses.get(name.partition(":")[0])):
            raise LookupFailed(f"{name} has no address: gone")
        return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Pair]]:
    """Two nodes."""
    with pairs(tmp_path) as made:
        yield made


def address(of: object) -> str:
    """Host and port of a fake."""
    return str(of.url).removeprefix("http://")  # type: ignore[attr-defined]


def make(url: str, cache: str) -> EngineNode:
    """The client of an engine."""
    client = HttpEngineClient(url, api_key="", fingerprint="", connect_timeout_s=1, timeout_s=5)
    return EngineNode(Upstream(url, connect_timeout_s=1, silence_timeout_s=5), client, cache=cache)


@asynccontextmanager
async def discovering(
    names: Names, folder: Path, *entries: EngineEntry
) -> AsyncIterator[tuple[Nodes, EnginePool, CachePool]]:
    """What keeps the nodes, which looks names up only when a test does."""
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(EnginePool([], 0.05))
        caches = await stack.enter_async_context(CachePool(lambda url: LMCache(url, 1.0, folder / "locks")))
        metrics = await stack.enter_async_context(Metrics())
        nodes = Nodes(entries, engines, caches, make, 3600, metrics, names.resolve)
        yield await stack.enter_async_context(nodes), engines, caches


async def test_each_address_of_a_name_is_an_engine(engines: list[FakeEngine], tmp_path: Path) -> None:
    names = Names(engines=[address(engine) for engine in engines[:2]])
    async with discovering(names, tmp_path, ENGINES) as (nodes, pool, _):
        assert [member.url for member in pool.members] == [engine.url for engine in engines[:2]]
        names.addresses["engines"] = [address(engine) for engine in engines]
        await nodes.look_up()
        assert [member.url for member in pool.members] == [engine.url for engine in engines]
        await pool.probe()
        assert {pool.choose(f"lineage {number}")[0].url for number in range(60)} == {engine.url for engine in engines}


async def test_an_address_that_goes_is_drained_and_forgotten_when_it_does_not_answer(
    engines: list[FakeEngine], tmp_path: Path
) -> None:
    names = Names(engines=[address(engine) for engine in engines])
    async with discovering(names, tmp_path, ENGINES) as (nodes, pool, _):
        await pool.probe()
        gone = pool.choose("lineage")[0]
        names.addresses["engines"] = [one for one in names.addresses["engines"] if one not in gone.url]
        await nodes.look_up()
        await nodes.check()
        assert (gone.state, gone.draining, gone.up) == ("draining", True, True)
        assert pool.choose("lineage", prefer=gone.url)[-1] is gone, "its sessions go elsewhere"
        names.addresses["engines"].append(gone.url.removeprefix("http://"))
        await nodes.look_up()
        assert (gone.draining, pool.choose("lineage")[0]) == (False, gone)
        names.addresses["engines"].remove(gone.url.removeprefix("http://"))
        await nodes.look_up()
        next(engine for engine in engines if engine.url == gone.url).stop()
        while gone.state != "ejected":
            await gone._probe()
        await nodes.check()
        assert gone not in pool.members
        assert len(pool.choose("lineage")) == 2


async def test_a_name_server_that_is_down_takes_no_engine_away(engines: list[FakeEngine], tmp_path: Path) -> None:
    names = Names(engines=[address(engine) for engine in engines])
    async with discovering(names, tmp_path, ENGINES) as (nodes, pool, _):
        names.addresses.clear()
        await nodes.look_up()
        await nodes.check()
        assert [member.draining for member in pool.members] == [False] * 3
        assert pool.missing == {"engines:8000": "engines:8000 has no address: gone"}
        names.addresses["engines"] = [address(engines[0])]
        await nodes.look_up()
        await nodes.check()
        assert ([member.draining for member in pool.members], pool.missing) == ([False, True, True], {})


async def test_without_any_address_requests_are_told_why(tmp_path: Path) -> None:
    async with discovering(Names(), tmp_path, BOTH) as (_, pool, caches):
        assert pool.choose("lineage") == []
        assert pool.place("lineage") is None
        assert "engines:8000 has no address: gone" in pool.trouble()
        assert caches.missing == {"caches:8080": "caches:8080 has no address: gone"}


async def test_an_engine_that_is_also_given_by_its_url_is_there_once(engines: list[FakeEngine], tmp_path: Path) -> None:
    names = Names(engines=[address(engine) for engine in engines])
    async with discovering(names, tmp_path, ENGINES, EngineEntry(discover="more:8000")) as (nodes, pool, _):
        names.addresses["more"] = names.addresses["engines"][:1]
        await nodes.look_up()
        assert len(pool.members) == 3
        names.addresses["engines"] = names.addresses["engines"][1:]
        await nodes.look_up()
        assert not any(member.draining for member in pool.members), "another name still has it"


async def test_the_cache_at_the_same_address_is_that_of_the_engine(nodes: list[Pair], tmp_path: Path) -> None:
    names = Names(engines=[address(pair.engine) for pair in nodes])
    entry = EngineEntry(discover="engines:8000", cache_port=nodes[0].cache.port)
    async with discovering(names, tmp_path, entry) as (_, pool, caches):
        assert [member.cache for member in pool.members] == [nodes[0].cache.url] * 2, "both fakes are on loopback"
        assert caches.urls == [nodes[0].cache.url]


async def test_a_cache_whose_address_goes_is_kept_while_it_answers(nodes: list[Pair], tmp_path: Path) -> None:
    names = Names(engines=[address(nodes[0].engine)], caches=[address(pair.cache) for pair in nodes])
    async with discovering(names, tmp_path, BOTH) as (keeper, _, caches):
        names.addresses["caches"] = names.addresses["caches"][:1]
        await keeper.look_up()
        await keeper.check()
        assert len(caches.urls) == 2
        nodes[1].cache.stop()
        await keeper.check()
        assert caches.urls == [nodes[0].cache.url]
        assert (caches.silent, caches.left_out) == ({}, {})


@asynccontextmanager
async def two_discovered(nodes: list[Pair], tmp_path: Path) -> AsyncIterator[tuple[Services, Nodes]]:
    """A gateway's services, and two engines and caches that were found by name: which belong together is not said."""
    names = Names(engines=[address(p.engine) for p in nodes], caches=[address(p.cache) for p in reversed(nodes)])
    entries = tuple(EngineEntry(url=pair.engine.url, cache_url=pair.cache.url) for pair in nodes)
    fixed = Settings(engines=entries, kv_dir=str(tmp_path / "kv"), data_dir=str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    async with open_services(fixed) as services:
        assert services.cache is not None
        for member in list(services.engines.members):
            await services.engines.remove(member)
        keeper = Nodes((BOTH,), services.engines, services.cache, make, 3600, services.metrics, names.resolve)
        async with keeper:
            yield services, keeper


async def test_the_self_test_finds_out_which_cache_is_whose(nodes: list[Pair], tmp_path: Path) -> None:
    async with two_discovered(nodes, tmp_path) as (services, _):
        await services.engines.probe()
        assert [member.cache for member in services.engines.members] == ["", ""]
        for member in services.engines.members:
            checks = {check.name: check for check in await run(services, member, land_s=5)}
            assert checks["pairing"].status == "ok", checks
        assert {member.url: member.cache for member in services.engines.members} == {
            pair.engine.url: pair.cache.url for pair in nodes
        }


async def test_an_engine_that_stores_in_no_known_cache_is_unproved(nodes: list[Pair], tmp_path: Path) -> None:
    async with two_discovered(nodes, tmp_path) as (services, _):
        nodes[0].engine.on_computed = lambda body, ids: None
        await services.engines.probe()
        checks = {check.name: check for check in await run(services, services.engines.members[0], land_s=0.1)}
        assert (checks["pairing"].status, services.engines.members[0].cache) == ("warning", "")
        assert "lmcache.mp.host" in checks["pairing"].remedy

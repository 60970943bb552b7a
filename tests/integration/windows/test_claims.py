"""At each step of a freeze another gateway starts, sweeps, and deletes what it can: no window loses a pin."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.kv.pins import Pins
from gateway.kv.tiers.base import Tier
from gateway.store.leases import Leases
from gateway.store.membership import Membership
from gateway.store.store import Store
from gateway.windows.claims import Claims
from gateway.windows.context import OperationContext, Services
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming, freeze
from gateway.windows.retention import orphans, sweeper
from gateway.windows.thaw import thaw
from gateway.windows.verify import verify
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.prefix_cache_model import CHUNKS, TENANT, Cached, opened

pytestmark = pytest.mark.anyio

Happening = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    return


class Steps:
    """A tier that lets something happen before or after one of its calls; `at` is like `before pin`."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.at = ""
        self.happens: Happening = _nothing

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._tier, name)
        if name not in {"free", "sizes", "pin", "check_and_restore", "unpin"}:
            return call

        async def step(*args: Any) -> Any:
            await self._now(f"before {name}")
            result = await call(*args)
            await self._now(f"after {name}")
            return result

        return step

    async def _now(self, at: str) -> None:
        if at == self.at:
            self.at = ""  # once
            await self.happens()


@asynccontextmanager
async def another_gateway(services: Services, ttl_s: float = 10.0) -> AsyncIterator[Services]:
    """Another gateway on the same store and tiers; it has joined and released strays, as at a start."""
    async with Membership(services.store, ttl_s=ttl_s) as membership:
        pins = Pins(tuple(getattr(tier, "_tier", tier) for tier in services.pins.tiers))
        claims = Claims(services.store, pins, membership)
        await claims.release_strays()
        yield replace(services, pins=pins, claims=claims, leases=Leases(services.store, membership))


@pytest.fixture
async def harness(engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path) -> AsyncIterator[Cached]:
    async with opened(engine, fake_cache, tmp_path) as harness:
        yield harness


def stepping(harness: Cached) -> tuple[Cached, Steps]:
    """The same gateway with a tier whose steps can be delayed."""
    services = harness.services
    (tier,) = services.pins.tiers
    steps = Steps(tier)
    pins = Pins((steps,))
    membership = services.claims._membership
    return Cached(replace(services, pins=pins, claims=Claims(services.store, pins, membership)), harness.cache), steps


async def whole(harness: Cached, name: str) -> None:
    """The window has every byte, and nothing else is pinned."""
    harness.cache.evict()
    verdict = await verify(harness.ctx, name)
    assert (verdict.ok, verdict.chunks_usable) == (True, CHUNKS), verdict
    window = await harness.services.store.window(TENANT, name)
    assert window is not None
    assert harness.pinned == {key.file_name for key in harness.keys(window)}
    assert not harness.claimed


FREEZE = ["before free", "after free", "before sizes", "after sizes", "before pin", "after pin"]


@pytest.mark.parametrize("at", FREEZE)
async def test_freeze_while_another_gateway_starts_and_sweeps(harness: Cached, at: str) -> None:
    mine, steps = stepping(harness)
    await mine.session()

    async def happens() -> None:
        async with another_gateway(harness.services) as other:
            await sweeper.sweep(other)

    steps.at, steps.happens = at, happens
    await mine.window()
    assert not steps.at, "the step was reached"
    await whole(mine, "w")


@pytest.mark.parametrize("at", FREEZE)
async def test_freeze_while_another_gateway_deletes_a_window_of_the_same_objects(harness: Cached, at: str) -> None:
    mine, steps = stepping(harness)
    await mine.window("old")

    async def happens() -> None:
        async with another_gateway(harness.services) as other:
            await delete(OperationContext(other, TENANT), "old")
            await orphans.delete_orphans(other)

    steps.at, steps.happens = at, happens
    await mine.window("w")
    assert not steps.at, "the step was reached"
    await whole(mine, "w")


@pytest.mark.parametrize("at", FREEZE)
async def test_freeze_of_a_session_that_another_gateway_deletes(harness: Cached, at: str) -> None:
    mine, steps = stepping(harness)
    await mine.session()

    async def happens() -> None:
        async with another_gateway(harness.services) as other:
            await orphans.delete_session(OperationContext(other, TENANT), "s")
            await sweeper.sweep(other)

    steps.at, steps.happens = at, happens
    await mine.window()
    await whole(mine, "w")


@pytest.mark.parametrize("at", FREEZE)
async def test_freeze_by_a_gateway_that_was_away_for_longer_than_its_lease(harness: Cached, at: str) -> None:
    mine, steps = stepping(harness)
    await mine.session()
    store = harness.services.store

    async def happens() -> None:
        """It was stopped: another one has ended its lease, and removed what it had pinned."""
        async with another_gateway(harness.services) as other:
            await store.bury_gateways([mine.services.claims._membership.member.id])
            await other.claims.release_strays()
            assert harness.pinned == set()

    steps.at, steps.happens = at, happens
    await mine.window()
    await whole(mine, "w")


@pytest.mark.parametrize("at", ["before unpin", "after unpin"])
async def test_freeze_while_another_gateway_removes_the_same_objects(harness: Cached, at: str) -> None:
    window = await harness.window("old")
    other, steps = stepping(harness)
    await harness.services.store.delete_session(TENANT, "s")
    await harness.session("s", stored=True)
    again: list[asyncio.Task[Any]] = []

    async def happens() -> None:
        again.append(asyncio.create_task(freeze(harness.ctx, "s", Naming("w"))))
        done, _ = await asyncio.wait(again, timeout=0.2)
        assert not done, "it waits until they are removed"

    steps.at, steps.happens = at, happens
    assert (await delete(other.ctx, "old")).blocks_kept == CHUNKS
    assert (await again[0]).window.kv == "complete"
    assert (await harness.services.store.window(TENANT, "w") or window).salt == window.salt
    await whole(harness, "w")


async def test_removal_ends_where_the_lease_did(harness: Cached) -> None:
    window = await harness.window()
    services = harness.services
    membership = services.claims._membership
    async with services.claims.deleting(TENANT, "w") as (released, removal):
        assert released is not None
        async with another_gateway(services):
            await services.store.bury_gateways([membership.member.id])
            await membership.rejoin(membership.member)
        assert harness.pinned == {key.file_name for key in harness.keys(window)}
        freed, warnings = await removal.remove(released.pins, originals=True)
    assert (freed, len(harness.pinned)) == (0, CHUNKS)
    assert "another one removes the rest" in warnings[0]
    async with another_gateway(services) as other:
        await other.claims.release_strays()
    assert harness.pinned == set()


async def test_thaw_of_a_window_that_is_deleted_meanwhile_leaves_no_pin(harness: Cached) -> None:
    mine, steps = stepping(harness)
    await mine.window()
    written = {path: path.read_bytes() for path in mine.cache.folder.iterdir()}

    async def happens() -> None:
        async with another_gateway(harness.services) as other:
            await delete(OperationContext(other, TENANT), "w")
        for path, content in written.items():  # by LMCache, from its memory: the thaw makes pins of them
            path.write_bytes(content)

    steps.at, steps.happens = "before check_and_restore", happens
    with pytest.raises(GatewayError, match="just deleted"):
        await thaw(mine.ctx, "w", new_session_id=None, warm="none")
    assert (mine.pinned, mine.claimed) == (set(), False)


async def test_claims_end_once_the_store_can_be_written_again(harness: Cached) -> None:
    services = harness.services
    window = await harness.window()
    claims, keys = services.claims, harness.keys(window)
    with pytest.raises(ZeroDivisionError):
        async with claims.removing([replace(key, salt="other") for key in keys]):
            raise ZeroDivisionError
    assert harness.claimed
    await claims._take_over_if_needed()
    assert not harness.claimed
    await whole(harness, "w")


async def test_only_the_gateway_with_the_lease_sweeps(harness: Cached) -> None:
    store: Store = harness.services.store
    assert await harness.services.leases.keep("sweep")
    async with another_gateway(harness.services) as other:
        assert not await other.leases.keep("sweep")
        await store.bury_gateways([harness.services.claims._membership.member.id])
        assert await other.leases.keep("sweep")
        assert not await harness.services.leases.keep("sweep")


async def test_one_at_a_time_holds_a_lease(harness: Cached) -> None:
    inside: list[str] = []

    async def work(services: Services, name: str) -> None:
        async with services.leases.hold("proof", 60):
            inside.append(name)
            await asyncio.sleep(0.01)
            inside.append(name)

    async with another_gateway(harness.services) as other:
        await harness.services.claims._membership._renew()
        await asyncio.gather(*(work(services, f"{n}") for n, services in enumerate([harness.services, other] * 3)))
    assert inside[::2] == inside[1::2]

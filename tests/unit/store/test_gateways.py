"""Gateways that share a store: who is alive, what only one may do, and whose turns are in flight; on both databases."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.store.store import Store
from gateway.store.types import Member
from tests.support.store_records import Open

pytestmark = pytest.mark.anyio

A = Member("a", 60.0, 1, 1, "host-a", "")
B = Member("b", 60.0, 1, 1, "host-b", "")
ENDED = replace(A, ttl_s=0.0)


@pytest.fixture
async def others(open_store: Open) -> AsyncIterator[Store]:
    """The same store, as another process has it."""
    async with open_store() as store:
        yield store


async def test_gateways_see_each_other_until_one_leaves(store: Store, others: Store) -> None:
    assert (await store.join_gateways(A))[0] == []
    (seen,), _ = await others.join_gateways(B)
    assert (seen.id, seen.host, seen.alive) == ("a", "host-a", True)
    (seen,) = await store.renew_gateway(A) or []
    assert seen.id == "b"
    await store.bury_gateways(["a"])
    assert await others.renew_gateway(B) == []
    assert await store.renew_gateway(A) is None


async def test_lease_that_was_not_renewed_has_ended(store: Store, others: Store) -> None:
    await store.join_gateways(ENDED)
    (seen,), _ = await others.join_gateways(B)
    assert not seen.alive
    assert await store.renew_gateway(A) is not None, "nobody has acted on the end of its lease: it goes on"
    (seen,) = await others.renew_gateway(B) or []
    assert seen.alive
    await store.renew_gateway(ENDED)
    await others.bury_gateways([])
    assert await store.renew_gateway(A) is None


async def test_gateway_looks_at_the_others_with_each_renewal(store: Store, others: Store) -> None:
    await store.join_gateways(A)
    (seen,), joined = await others.join_gateways(B)
    assert seen.looked_at <= joined
    await store.renew_gateway(A)
    (seen,) = await others.renew_gateway(B) or []
    assert seen.looked_at > joined


async def test_lease_has_one_holder(store: Store, others: Store) -> None:
    for one in (A, B):
        await store.join_gateways(one)
    assert await store.take_lease("sweep", "a", 60)
    assert await store.take_lease("sweep", "a", 60)
    assert not await others.take_lease("sweep", "b", 60)
    assert await others.take_lease("proof", "b", 60)
    assert (await store.has_lease("sweep", "a"), await store.has_lease("sweep", "b")) == (True, False)
    await others.drop_lease("sweep", "b")
    assert not await others.take_lease("sweep", "b", 60), "nobody drops another's lease"
    await store.drop_lease("sweep", "a")
    assert await others.take_lease("sweep", "b", 60)


async def test_lease_ends_with_its_time_or_its_gateway(store: Store, others: Store) -> None:
    for one in (A, B):
        await store.join_gateways(one)
    assert await store.take_lease("load", "a", 0)
    assert await others.take_lease("load", "b", 0)
    assert await store.take_lease("sweep", "a", 60)
    await others.bury_gateways(["a"])
    assert await others.take_lease("sweep", "b", 60)
    await others.renew_gateway(replace(B, ttl_s=0.0))
    await store.join_gateways(A)
    assert await store.take_lease("sweep", "a", 60), "B's lease as a gateway has ended, though it is not buried"


async def test_of_many_that_want_a_lease_one_gets_it(store: Store, others: Store) -> None:
    for one in (A, B):
        await store.join_gateways(one)
    for name in map(str, range(20)):
        got = await asyncio.gather(store.take_lease(name, "a", 60), others.take_lease(name, "b", 60))
        assert sorted(got) == [False, True]


async def test_open_turns_are_those_of_other_living_gateways(store: Store, others: Store) -> None:
    for one in (A, B):
        await store.join_gateways(one)
    await store.write_open_turns("a", [(b"1", False), (b"2", False), (b"3", True)], [])
    assert sorted(await others.open_turns_elsewhere("b", [b"1", b"2", b"4"])) == [b"1", b"2"]
    assert await store.open_turns_elsewhere("a", [b"1", b"2", b"4"]) == []
    assert (await others.ended_batches_elsewhere("b"), await store.ended_batches_elsewhere("a")) == ([b"3"], [])
    await store.write_open_turns("a", [(b"1", False)], [b"2", b"3"])
    assert await others.open_turns_elsewhere("b", [b"1", b"2", b"3"]) == [b"1"]
    assert await others.open_turns_elsewhere("b", [b"%d" % number for number in range(2000)]) == [b"1"]
    await others.bury_gateways(["a"])
    assert await others.open_turns_elsewhere("b", [b"1"]) == []

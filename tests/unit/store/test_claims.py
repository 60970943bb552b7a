"""Claims on objects: what is being pinned is not removed, what is being removed is not pinned; on both databases."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.store.store import Store
from gateway.store.types import Claimed, ClaimLost, Member, Text
from tests.support.store_records import TENANT, Open, add, manifest, says, window
from tests.support.tier_harness import key, keys

pytestmark = pytest.mark.anyio

A = Member("a", 60.0, 1, 1, "host-a", "")
B = Member("b", 60.0, 1, 1, "host-b", "")
TEXT = Text(says("said", "so"))


@pytest.fixture
async def others(store: Store, open_store: Open) -> AsyncIterator[Store]:
    """The same store, as gateway B has it."""
    await store.join_gateways(A)
    async with open_store() as opened:
        await opened.join_gateways(B)
        yield opened


def removed(claimed: Claimed) -> set[str]:
    """What was claimed to be removed."""
    return set(map(str, claimed.keys))


async def test_what_is_being_pinned_is_not_removed(store: Store, others: Store) -> None:
    assert await store.claim(A, "freeze", keys(3), write=False)
    claimed = await others.claim_removal(B, "sweep", keys(4))
    assert (removed(claimed), claimed.busy) == ({str(key(3))}, 3)
    await store.end_claim("freeze")
    assert (await others.claim_removal(B, "again", keys(4))).busy == 1, "its own claim counts, too"


async def test_what_is_being_removed_is_not_pinned(store: Store, others: Store) -> None:
    await others.claim_removal(B, "sweep", keys(2))
    assert not await store.claim(A, "freeze", keys(3), write=False)
    assert await store.claim(A, "other", [key(2), key(0, salt="other")], write=False)
    await others.end_claim("sweep")
    assert await store.claim(A, "freeze", keys(3), write=False)


async def test_several_may_keep_an_object_and_only_one_may_write_it(store: Store, others: Store) -> None:
    assert await store.claim(A, "one", keys(2), write=False)
    assert await others.claim(B, "two", keys(2), write=False)
    assert not await others.claim(B, "import", keys(1), write=True)
    assert await others.claim(B, "import", [key(5)], write=True)
    assert not await store.claim(A, "three", [key(5)], write=False)


async def test_what_a_window_holds_is_not_removed(store: Store, others: Store) -> None:
    await add(store, "w", keys(2), salt=key(0).salt, pin_salt=key(0).salt)
    claimed = await others.claim_removal(B, "sweep", keys(3))
    assert (removed(claimed), claimed.busy) == ({str(key(2))}, 0)


async def test_window_is_committed_only_under_its_claim(store: Store, others: Store) -> None:
    assert await store.claim(A, "freeze", keys(3), write=False)
    made = window("w", salt=key(0).salt, pin_salt=key(0).salt)
    added, left = await store.add_claimed_window(A, "freeze", made, manifest("w", keys(2)), TEXT)
    assert added is not None
    assert removed(left) == {str(key(2))}, "what was pinned after a chunk that is missing"
    with pytest.raises(ClaimLost):
        await store.add_claimed_window(A, "freeze", replace(made, name="x", manifest="m-x"), manifest("x"), TEXT)
    assert await store.window(TENANT, "x") is None
    assert (await others.claim_removal(B, "sweep", keys(2))).keys == ()


async def test_commit_that_is_done_again_is_the_same_window(store: Store, others: Store) -> None:
    assert await store.claim(A, "freeze", keys(2), write=False)
    made = window("w")
    for _ in range(2):
        added, left = await store.add_claimed_window(A, "freeze", made, manifest("w", keys(2)), TEXT)
        assert (added and added.manifest, left.keys) == ("m-w", ())


async def test_name_that_is_taken_leaves_the_claim(store: Store, others: Store) -> None:
    await add(store, "w")
    assert await store.claim(A, "freeze", keys(2), write=False)
    added, _ = await store.add_claimed_window(A, "freeze", window("w", manifest="m-x"), manifest("x", keys(2)), TEXT)
    assert added is None
    assert (await others.claim_removal(B, "sweep", keys(2))).busy == 2
    assert removed(await store.claim_removal(A, "end", keys(2), ending="freeze")) == set(map(str, keys(2)))


async def test_deletion_claims_what_nobody_needs(store: Store, others: Store) -> None:
    await add(store, "w", keys(3))
    assert await others.claim(B, "freeze", [key(1)], write=False)
    released, claimed = await store.delete_claimed_window(A, "deletion", TENANT, "w")
    assert released is not None
    assert (set(released.pins), set(claimed.keys), claimed.busy) == (set(keys(3)), {key(0), key(2)}, 1)
    assert not await others.claim(B, "again", [key(0)], write=False)
    assert await store.delete_claimed_window(A, "twice", TENANT, "w") == (None, Claimed())


async def test_claims_of_an_ended_gateway_are_taken_over(store: Store, others: Store) -> None:
    await add(store, "w", [key(0)], salt=key(0).salt, pin_salt=key(0).salt)
    assert await store.claim(A, "freeze", keys(4), write=False)
    assert await others.claim(B, "mine", [key(1)], write=False)
    await store.claim_removal(A, "sweep", [key(9)])
    assert not await others.any_dead_claims()
    assert (await others.take_over_claims(B, "none")).keys == ()
    await others.bury_gateways(["a"])
    assert await others.any_dead_claims()
    taken = await others.take_over_claims(B, "taken")
    assert (removed(taken), taken.busy) == ({str(key(2)), str(key(3)), str(key(9))}, 1)
    assert not await others.any_dead_claims()
    made = window("late", salt=key(0).salt, pin_salt=key(0).salt)
    with pytest.raises(ClaimLost):
        await store.add_claimed_window(A, "freeze", made, manifest("late", keys(4)), TEXT)
    with pytest.raises(ClaimLost):
        await store.claim(A, "new", keys(1), write=False)


async def test_abandoned_claims_are_taken_over_by_their_own_gateway(store: Store, others: Store) -> None:
    assert await store.claim(A, "lost", keys(2), write=False)
    assert removed(await store.take_over_claims(A, "new", ["lost", "never made"])) == set(map(str, keys(2)))
    await store.end_claim("new")
    assert (await others.claim_removal(B, "sweep", keys(2))).busy == 0


async def test_everything_is_claimed_only_by_a_gateway_that_is_alone(store: Store, others: Store) -> None:
    assert not await store.claim_everything(A, "all")
    await store.bury_gateways(["b"])
    assert await store.claim(A, "freeze", keys(1), write=False)
    assert not await store.claim_everything(A, "all")
    await store.end_claim("freeze")
    assert await store.claim_everything(A, "all")
    await others.join_gateways(B)
    assert not await others.claim(B, "freeze", keys(1), write=False)
    await store.end_claim("all")
    assert await others.claim(B, "freeze", keys(1), write=False)


async def test_of_a_freeze_and_a_removal_at_once_one_gets_the_object(store: Store, others: Store) -> None:
    for number in range(30):
        kept, claimed = await asyncio.gather(
            store.claim(A, f"keep-{number}", [key(number)], write=False),
            others.claim_removal(B, f"remove-{number}", [key(number)]),
        )
        assert kept != bool(claimed.keys)


async def test_of_a_commit_and_a_removal_at_once_the_window_keeps_its_objects(store: Store, others: Store) -> None:
    salt = key(0).salt
    for number in range(30):
        name, held = f"w{number}", [key(number)]
        assert await store.claim(A, name, held, write=False)
        made = window(name, salt=salt, pin_salt=salt)
        (added, _), claimed = await asyncio.gather(
            store.add_claimed_window(A, name, made, manifest(name, held), TEXT),
            others.claim_removal(B, f"remove-{number}", held),
        )
        assert (added is not None, claimed.keys) == (True, ())

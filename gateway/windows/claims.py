"""Claims on KV objects, so that nobody removes what is being pinned, on any machine (`gateway.store.claim_rows`).

A claim is two short transactions, one at each end. Between them nothing is locked: no window can be added without its
claim, and nothing is removed that is claimed. So a gateway that dies, or was stopped and comes back after its lease,
has at worst pinned something for nothing, which another one removes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import uuid4

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.pins import Pins
from gateway.kv.tiers.base import TierFull
from gateway.records import Manifest, Session, Window
from gateway.runtime.clock import since_boot
from gateway.store.membership import Membership
from gateway.store.store import Store
from gateway.store.types import Claimed, ClaimLost, Member, Released, StoreUnavailable, Text

log = logging.getLogger(__name__)

T = TypeVar("T")
_POLL_S = 0.01  # a removal takes milliseconds
_TRIED = 3  # a claim is lost only if the process is stopped, or the store away, for longer than a lease
_AT_ONCE = 32  # objects removed between two looks at the lease
_AWAY = "this gateway was away for longer than its lease lasts: another one removes the rest"


class Claims:
    """The claims of this gateway."""

    def __init__(self, store: Store, pins: Pins, membership: Membership) -> None:
        self._store = store
        self._pins = pins
        self._membership = membership
        self._abandoned: set[str] = set()  # claims that could not be ended: the store was away
        self._peers: frozenset[str] = frozenset()  # as of the last heartbeat
        membership.watch(self._take_over_if_needed)

    @asynccontextmanager
    async def keep(self, keys: Sequence[ObjectKey], *, write: bool = False) -> AsyncIterator["Claim"]:
        """Wait until nobody removes or writes any of `keys`, and let nobody do so during the block, which may pin them.

        To `write` pins oneself, nobody else may keep them either. What the block has not committed (`Claim.commit`) is
        unpinned after it, unless a window or another claim names it. Raises `storage_full` if a tier is full.
        """
        claim = Claim(self, await self._claim(keys, write=write) if keys else None)
        try:
            yield claim
        except TierFull as error:
            hint = "free space, or delete windows that are not needed"
            raise GatewayError("storage_full", str(error), hint=hint) from error
        finally:
            try:
                await self._end(claim, keys)
            except StoreUnavailable as error:
                log.warning("a claim could not be ended, and will be once the store can be written: %s", error.message)

    async def commit_under(
        self, keys: Sequence[ObjectKey], pin: Callable[["Claim"], Awaitable[T]], *, write: bool = False
    ) -> T:
        """Let `pin` pin `keys` and commit them, under a claim (`keep`); once more if the claim is lost meanwhile."""
        for _ in range(_TRIED):
            try:
                async with self.keep(keys, write=write) as claim:
                    return await pin(claim)
            except ClaimLost:
                log.warning("a claim was lost before what it was for was committed: it is done again")
        raise GatewayError(
            "session_busy", "this gateway does not renew its lease in time", hint="try again in a moment"
        )

    @asynccontextmanager
    async def removing(self, keys: Sequence[ObjectKey]) -> AsyncIterator["Removal"]:
        """Claim those of `keys` that neither a window nor another claim names, for the block to remove."""
        claimed, _ = await self._write(lambda one: self._store.claim_removal(one.member, one.id, keys))
        async with self._removal(claimed) as removal:
            yield removal

    @asynccontextmanager
    async def deleting(
        self, tenant: str, name: str, *, expired_by: float | None = None, automatic_of: str | None = None
    ) -> AsyncIterator[tuple[Released | None, "Removal"]]:
        """Delete a window (`Store.delete_window`), and claim what nothing needs any more for the block to remove."""
        (released, claimed), _ = await self._write(
            lambda one: self._store.delete_claimed_window(
                one.member, one.id, tenant, name, expired_by=expired_by, automatic_of=automatic_of
            )
        )
        async with self._removal(claimed) as removal:
            yield released, removal

    async def release_strays(self) -> int:
        """Unpin what gateways left that have ended; and if no other is alive, whatever no window holds.

        Returns how many objects that were.
        """
        return await self._take_over() + await self._sweep()

    async def add(
        self, claimed: "_Mine", window: Window, manifest: Manifest, text: Text, session: Session | None, *, wanted: bool
    ) -> tuple[Window | None, Claimed]:
        """See `Claim.commit`."""
        return await self._store.add_claimed_window(
            claimed.member, claimed.id, window, manifest, text, session=session, wanted=wanted
        )

    async def add_unclaimed(
        self, window: Window, manifest: Manifest, text: Text, session: Session | None, *, wanted: bool
    ) -> Window | None:
        """See `Claim.commit`."""
        return await self._store.add_window(window, manifest, text, session=session, wanted=wanted)

    async def _claim(self, keys: Sequence[ObjectKey], *, write: bool) -> "_Mine":
        while True:
            claimed, mine = await self._write(lambda one: self._store.claim(one.member, one.id, keys, write=write))
            if claimed:
                return mine
            await asyncio.sleep(_POLL_S)

    async def _write(self, work: Callable[["_Mine"], Awaitable[T]]) -> tuple[T, "_Mine"]:
        """Do a transaction that claims something; return its result, and under which id and lease it did.

        It renews our lease, or gets us a new one.
        """
        while True:
            began, mine = since_boot(), _Mine(uuid4().hex, self._membership.member)
            try:
                result = await work(mine)
            except ClaimLost:
                await self._membership.rejoin(mine.member)
            except BaseException:
                self._abandoned.add(mine.id)  # it may have been committed all the same
                raise
            else:
                if mine.member is self._membership.member:
                    self._membership.renewed(began)
                return result, mine

    async def _end(self, claim: "Claim", keys: Sequence[ObjectKey]) -> None:
        """Unpin what was pinned and not committed, and end the claim."""
        if claim.left is not None:
            left = claim.left
        elif claim.mine is not None:
            mine = claim.mine
            try:
                left, _ = await self._write(
                    lambda one: self._store.claim_removal(one.member, one.id, keys, ending=mine.id)
                )
            except BaseException:
                self._abandoned.add(mine.id)  # with the next heartbeat it ends
                raise
        else:
            return
        async with self._removal(left) as removal:
            _, warnings = await removal.remove(left.keys, originals=False)
        for warning in warnings:
            log.warning("could not unpin what no window holds: %s", warning)

    @asynccontextmanager
    async def _removal(self, claimed: Claimed) -> AsyncIterator["Removal"]:
        removal = Removal(self._pins, self._membership, claimed)
        try:
            yield removal
            if removal.lost:
                self._abandoned.add(claimed.id)  # should it be ours all the same, we remove the rest later
            elif claimed.id:
                await self._store.end_claim(claimed.id)
        except BaseException:
            if claimed.id:
                self._abandoned.add(claimed.id)  # with the next heartbeat we remove the rest
            raise

    async def _take_over_if_needed(self) -> None:
        before, self._peers = self._peers, frozenset(one.id for one in self._membership.peers)
        if before - self._peers:
            await self._discard_unfinished()
        if (self._abandoned or await self._store.any_dead_claims()) and (freed := await self._take_over()):
            log.warning("unpinned %d objects that a gateway left which has ended", freed)

    async def _discard_unfinished(self) -> None:
        for warning in await self._pins.discard_unfinished(self._membership.running):
            log.warning("could not remove pins that were never finished: %s", warning)

    async def _take_over(self) -> int:
        abandoned = frozenset(self._abandoned)
        claimed, _ = await self._write(lambda one: self._store.take_over_claims(one.member, one.id, abandoned))
        self._abandoned -= abandoned
        async with self._removal(claimed) as removal:
            await removal.remove(claimed.keys, originals=False)
        return len(claimed.keys)

    async def _sweep(self) -> int:
        alone, mine = await self._write(lambda one: self._store.claim_everything(one.member, one.id))
        if not alone:
            return 0
        try:
            swept, warnings = await self._pins.sweep(await self._store.held_objects())
        finally:
            await self._store.end_claim(mine.id)
        for warning in warnings:
            log.warning("could not check for stray pins: %s", warning)
        return swept


@dataclass(frozen=True, slots=True)
class _Mine:
    """A claim, and the lease under which it was made."""

    id: str
    member: Member


@dataclass(slots=True)
class Claim:
    """A claim on objects that are being pinned. `left` is what to unpin once it is known."""

    claims: Claims
    mine: _Mine | None
    left: Claimed | None = None

    async def commit(
        self, window: Window, manifest: Manifest, text: Text, *, session: Session | None = None, wanted: bool = True
    ) -> Window | None:
        """Add a window (see `Store.add_window`) while the claim still stands. Raises ClaimLost if it does not.

        What was claimed and is not part of the window is unpinned when the block ends.
        """
        if self.mine is None:
            return await self.claims.add_unclaimed(window, manifest, text, session, wanted=wanted)
        added, left = await self.claims.add(self.mine, window, manifest, text, session, wanted=wanted)
        if added is not None:
            self.left = left
        return added


@dataclass(slots=True)
class Removal:
    """Objects that were claimed to be removed: `claimed.keys`."""

    pins: Pins
    membership: Membership
    claimed: Claimed
    lost: bool = field(default=False)

    async def remove(
        self, keys: Sequence[ObjectKey], *, originals: bool, only: Collection[str] | None = None
    ) -> tuple[int, list[str]]:
        """Remove those of `keys` that were claimed: the pins, with `originals` LMCache's objects too.

        Returns the bytes freed, and warnings. Stops if our lease may have ended.
        """
        mine = set(self.claimed.keys)
        freed, warnings = 0, dict[str, None]()
        for batch in _batches([key for key in keys if key in mine]):
            if not await self.membership.still_holds(self.claimed.gateway):
                self.lost = True
                warnings[_AWAY] = None
                break
            more, trouble = await self.pins.remove(batch, originals=originals, only=only)
            freed += more
            warnings |= dict.fromkeys(trouble)
        return freed, list(warnings)


def _batches(keys: Sequence[ObjectKey]) -> Iterator[Sequence[ObjectKey]]:
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))

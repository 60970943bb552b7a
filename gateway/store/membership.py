"""This gateway's lease in the store, by which it and the others that share the store know that they are alive.

It is renewed every 2 s and lasts 10 s, by the database's clock. A gateway that does not renew it in time, because it
was stopped or the store was away, finds that out before it goes on: the others have removed what it had begun.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

from gateway.errors import StartError
from gateway.runtime import own_process
from gateway.runtime.clock import since_boot
from gateway.store.store import Store
from gateway.store.types import Member, Peer, StoreUnavailable

log = logging.getLogger(__name__)

PROTOCOL = 1  # how gateways share a store: raised by a change that those before it cannot share one with
OLDEST = 1  # the oldest protocol that this one can share a store with
TTL_S = 10.0
_BEATS = 5  # in `ttl_s`


async def _nothing_to_do() -> None:
    return


class Membership:
    """One of the gateways that share the store. `peers` are the others, as of the last heartbeat."""

    def __init__(self, store: Store, *, ttl_s: float = TTL_S, protocol: int = PROTOCOL, oldest: int = OLDEST) -> None:
        self._store = store
        self._beat_s = ttl_s / _BEATS
        self._trusted_s = ttl_s / 2
        self._renewed_at = since_boot()
        self._joined_at = 0.0  # by the database's clock
        self._on_beat: Callable[[], Awaitable[None]] = _nothing_to_do
        self._joining = asyncio.Lock()
        self.member = Member(uuid4().hex, ttl_s, protocol, oldest, socket.gethostname(), own_process.identity())
        self.peers: Sequence[Peer] = ()

    async def __aenter__(self) -> "Membership":
        """Join. Raises StartError if a gateway is alive that this one cannot share the store with."""
        try:
            await self._join()
        except StoreUnavailable as error:  # the gateway starts with a full disk, too
            log.warning("the store could not record that this gateway uses it: %s", error.message)
        if refusal := next(filter(None, (_incompatible(self.member, peer) for peer in self.peers)), ""):
            await self._leave()
            raise StartError(refusal)
        self._task = asyncio.create_task(self._beat(), name="heartbeat")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._leave()

    def watch(self, on_beat: Callable[[], Awaitable[None]]) -> None:
        """Call `on_beat` with each heartbeat: another gateway may have ended."""
        self._on_beat = on_beat

    def holds(self, gateway: str) -> bool:
        """Whether the lease under which something was claimed has certainly not ended yet."""
        return gateway == self.member.id and since_boot() - self._renewed_at < self._trusted_s

    async def still_holds(self, gateway: str) -> bool:
        """Whether the lease holds (`holds`), renewing it if that is not certain."""
        if not self.holds(gateway):
            with suppress(StoreUnavailable):
                await self._renew()
        return self.holds(gateway)

    def renewed(self, since: float) -> None:
        """The lease was renewed by a transaction that began then (`since_boot`)."""
        self._renewed_at = max(self._renewed_at, since)

    async def rejoin(self, lost: Member) -> None:
        """Join again, under another id: the lease has ended, and the others may have acted on that."""
        async with self._joining:
            if self.member is not lost:  # another task has done it
                return
            log.warning("this gateway was away for longer than its lease lasts (%g s): it joins again", lost.ttl_s)
            self.member = replace(lost, id=uuid4().hex)
            await self._join()

    async def running(self) -> set[str]:
        """The processes (`own_process.tag`) whose gateways are alive now, this one too. Raises StoreUnavailable."""
        await self._renew()
        return {own_process.tag(process) for process in (self.member.process, *(one.process for one in self.peers))}

    async def wait_until_seen(self) -> None:
        """Return when every other gateway knows of this one, which takes a heartbeat. Raises StoreUnavailable."""
        while any(one.looked_at <= self._joined_at for one in self.peers):
            await asyncio.sleep(self._beat_s / _BEATS)
            await self._renew()

    async def _join(self) -> None:
        began = since_boot()
        others, self._joined_at = await self._store.join_gateways(self.member)
        self.renewed(began)
        await self._see(others)

    async def _leave(self) -> None:
        with suppress(StoreUnavailable):
            await self._store.bury_gateways([self.member.id])

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await self._renew()
                await self._on_beat()
            except StoreUnavailable as error:
                log.warning("the lease of this gateway could not be renewed: %s", error.message)
            except Exception:  # must not end: the next beat may succeed
                log.exception("the lease of this gateway could not be renewed")

    async def _renew(self) -> None:
        began, member = since_boot(), self.member
        others = await self._store.renew_gateway(member)
        if others is None:
            return await self.rejoin(member)
        self.renewed(began)
        return await self._see(others)

    async def _see(self, others: Sequence[Peer]) -> None:
        ended = [one for one in others if not one.alive or own_process.has_ended(one.process)]
        self.peers = [one for one in others if one not in ended]
        if ended:
            await self._store.bury_gateways([one.id for one in ended if one.alive])


def _incompatible(own: Member, peer: Peer) -> str:
    """Why a gateway cannot share the store with another one; empty if it can."""
    if peer.protocol >= own.oldest and own.protocol >= peer.oldest:
        return ""
    age = "older" if peer.protocol < own.protocol else "newer"
    return (
        f"a gateway of an {age} version uses the store (host {peer.host}, protocol {peer.protocol}; this one: "
        f"{own.protocol}), and the two cannot share it: stop all of those before you start this one"
    ).replace("an newer", "a newer")

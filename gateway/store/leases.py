"""What only one of the gateways that share a store may do at a time."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from gateway.store.membership import Membership
from gateway.store.store import Store
from gateway.store.types import StoreUnavailable

log = logging.getLogger(__name__)

_POLL_S = 0.02
_ALWAYS_S = 1e9


class Leases:
    """Leases in the store. They end with the gateway, so one that is killed keeps nobody waiting for long."""

    def __init__(self, store: Store, membership: Membership) -> None:
        self._store = store
        self._membership = membership
        self._here: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by name, while in use

    async def keep(self, name: str) -> bool:
        """Take a lease until this gateway ends; return whether it has it now. Raises StoreUnavailable."""
        gateway = self._membership.member.id
        # One that it has already is only read: on a full disk nothing can be written.
        return await self._store.has_lease(name, gateway) or await self._store.take_lease(name, gateway, _ALWAYS_S)

    @asynccontextmanager
    async def hold(self, name: str, for_s: float) -> AsyncIterator[None]:
        """Wait for a lease, and hold it for the block, at most `for_s`; without it while the store is away.

        Of two gateways of which one has just joined, both may hold it: it is a courtesy, no protection.
        """
        async with self._here.setdefault(name, asyncio.Lock()):  # the tasks of this gateway among themselves
            if not self._membership.peers:
                yield
                return
            gateway = self._membership.member.id
            try:
                await self._wait_for(name, gateway, for_s)
                yield
            finally:
                await self._drop(name, gateway)

    async def _wait_for(self, name: str, gateway: str, for_s: float) -> None:
        try:
            while not await self._store.take_lease(name, gateway, for_s):  # noqa: ASYNC110 - other hosts wake no task
                await asyncio.sleep(_POLL_S)
        except StoreUnavailable as error:
            log.warning("the lease %s could not be taken: %s", name, error.message)

    async def _drop(self, name: str, gateway: str) -> None:
        try:
            await self._store.drop_lease(name, gateway)
        except StoreUnavailable as error:
            log.warning("the lease %s could not be dropped, and ends by itself: %s", name, error.message)

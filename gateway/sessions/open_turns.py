"""Turns in flight as the gateways that share a PostgreSQL see each other's: rows of a table, written in the background.

A turn's rows are written when it begins, one for each `LockKey`, and deleted once it is recorded; nobody waits for
that but the first byte of a reply (`visible`), which takes the engine longer. So whoever has read a reply, in whole or
in part, finds its turn through every other gateway: recorded, or here. Rows of a gateway that has ended do not count.
Nothing is asked while no other gateway is alive.
"""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress

from blake3 import blake3

from gateway.sessions.in_flight import LockKey
from gateway.store.membership import Membership
from gateway.store.store import Store
from gateway.store.types import StoreUnavailable

log = logging.getLogger(__name__)

_KEY_BYTES = 16
_RETRY_S = 0.5
_VISIBLE_S = 2.0  # a store that takes longer is in trouble, and a reply matters more


class OpenTurns:
    """This gateway's rows, and queries for those of the others."""

    def __init__(self, store: Store, membership: Membership) -> None:
        self._store = store
        self._membership = membership
        self._turns: dict[bytes, int] = {}  # by key, how many turns have it
        self._over: set[bytes] = set()  # keys of batches that are over and not recorded yet
        self._written: dict[bytes, bool] = {}  # rows in the table, and whether they are of a batch
        self._written_as = ""  # the lease that they belong to
        self._asked = self._done = 0  # numbers of changes: made, and in the table
        self._changed = asyncio.Event()
        self._progress = asyncio.Condition()

    async def __aenter__(self) -> "OpenTurns":
        self._task = asyncio.create_task(self._run(), name="open turns")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task  # its rows end with the gateway's lease

    def acquire(self, keys: Iterable[LockKey]) -> None:
        """A turn with these keys begins."""
        for key in map(_digest, keys):
            self._turns[key] = self._turns.get(key, 0) + 1
        self._change()

    def release(self, keys: Iterable[LockKey]) -> None:
        """A turn with these keys has been recorded."""
        for key in map(_digest, keys):
            self._turns[key] -= 1
            if not self._turns[key]:
                del self._turns[key]
        self._change()

    def mark_ended(self, batch: int) -> None:
        """Turns of a batch are over and not recorded yet."""
        self._over.add(self._batch(batch))
        self._change()

    def mark_recorded(self, batch: int) -> None:
        """All turns of a batch are recorded."""
        self._over.discard(self._batch(batch))
        self._change()

    @property
    def lags(self) -> bool:
        """Whether another gateway may ask for our turns."""
        return bool(self._membership.peers)

    async def visible(self) -> None:
        """Wait until other gateways see the turns that have begun by now, at most 2 s."""
        goal = self._asked
        with suppress(TimeoutError):
            async with asyncio.timeout(_VISIBLE_S), self._progress:
                await self._progress.wait_for(lambda: self._done >= goal)

    async def held(self, keys: Iterable[LockKey]) -> set[LockKey]:
        """Those of `keys` that a turn of another gateway has."""
        if not self.lags:
            return set()
        by_digest = {_digest(key): key for key in keys}
        found = await self._store.open_turns_elsewhere(self._membership.member.id, list(by_digest))
        return {by_digest[one] for one in found}

    async def any(self) -> bool:
        """Whether another gateway is in any turn."""
        return self.lags and await self._store.any_open_turn_elsewhere(self._membership.member.id)

    async def ended(self) -> set[int]:
        """The other gateways' batches that are over and not recorded yet."""
        if not self.lags:
            return set()
        found = await self._store.ended_batches_elsewhere(self._membership.member.id)
        return {int.from_bytes(one, "big") for one in found}

    def _batch(self, batch: int) -> bytes:
        return _digest(("over", self._membership.member.id, str(batch)))

    def _change(self) -> None:
        self._asked += 1
        self._changed.set()

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            goal = self._asked
            try:
                await self._write()
            except StoreUnavailable as error:
                log.warning("turns in flight could not be shown to the other gateways: %s", error.message)
                self._changed.set()
                await asyncio.sleep(_RETRY_S)
                continue
            async with self._progress:
                self._done = goal
                self._progress.notify_all()

    async def _write(self) -> None:
        gateway = self._membership.member.id
        if gateway != self._written_as:  # the rows under the former lease do not count any more
            self._written, self._written_as = {}, gateway
        wanted = dict.fromkeys(self._turns, False) | dict.fromkeys(self._over, True)
        new = [(key, over) for key, over in wanted.items() if key not in self._written]
        old = [key for key in self._written if key not in wanted]
        if new or old:
            await self._store.write_open_turns(gateway, new, old)
        self._written = wanted


def _digest(key: tuple[str, ...]) -> bytes:
    return blake3("\0".join(key).encode()).digest(_KEY_BYTES)

"""Sessions on the request path: what one is, under which salt it runs, and whether it is in a turn.

A turn is in flight from its beginning until it is recorded. This process counts its own; where there are other workers,
the first turn of a session here takes a lock that they see, and the last one drops it (`gateway.inflight`).
"""

import asyncio
from collections import Counter
from dataclasses import dataclass

from gateway import salts
from gateway.errors import GatewayError
from gateway.inflight import TurnLocks
from gateway.records import Session
from gateway.store.contract import Store

_POLL_S = 0.005  # the kernel wakes nobody when another worker drops a lock


@dataclass(frozen=True, slots=True)
class SaltRule:
    """How salts are made: the secret, and whether a lineage or a whole tenant shares one."""

    secret: bytes
    per_tenant: bool

    def of(self, tenant: str, lineage: str, fingerprint: str, client_salt: str = "") -> str:
        """Return the salt of a lineage."""
        return salts.salt(self.secret, tenant, "" if self.per_tenant else lineage, fingerprint, client_salt)


class Sessions:
    """Sessions as this process sees them. `locks` is None where it is the only worker."""

    def __init__(self, store: Store, locks: TurnLocks | None = None) -> None:
        self._store = store
        self._locks = locks
        self._in_flight: Counter[tuple[str, str]] = Counter()
        self._lineages: Counter[tuple[str, str]] = Counter()  # the same turns, by the lineage that they belong to
        self._quiet = asyncio.Event()  # set and replaced whenever a turn ends

    async def open(self, tenant: str, session_id: str) -> Session:
        """Return the session, or what it will be once its first turn is recorded.

        A session that nobody has seen begins its own lineage, named after it, so that two first requests at once agree.
        """
        return await self._store.session(tenant, session_id) or Session(tenant, session_id, lineage=session_id)

    def enter(self, tenant: str, session_id: str, lineage: str) -> None:
        """A turn begins."""
        first = _add(self._in_flight, (tenant, session_id))
        first_of_lineage = _add(self._lineages, (tenant, lineage))
        if self._locks is None:
            return
        if first:
            self._locks.hold("session", tenant, session_id)
        if first_of_lineage:
            self._locks.hold("lineage", tenant, lineage)

    def leave(self, tenant: str, session_id: str, lineage: str) -> None:
        """A turn is over and recorded."""
        last = _drop(self._in_flight, (tenant, session_id))
        last_of_lineage = _drop(self._lineages, (tenant, lineage))
        if last:
            self._quiet.set()
            self._quiet = asyncio.Event()
        if self._locks is None:
            return
        if last:
            self._locks.let_go("session", tenant, session_id)
        if last_of_lineage:
            self._locks.let_go("lineage", tenant, lineage)

    @property
    def alone(self) -> bool:
        """Whether this process is the only worker, and so knows of every turn by itself."""
        return self._locks is None

    @property
    def in_flight(self) -> int:
        """Turns that are going on or wait to be recorded."""
        return self._in_flight.total()

    async def going_on(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage is going on: in a turn just now, or not frozen since its last."""
        if (tenant, lineage) in self._lineages:
            return True
        if self._locks is not None and self._locks.elsewhere("lineage", tenant, lineage):
            return True
        return await self._store.lineage_in_use(tenant, lineage)

    async def at_rest(self, tenant: str, session_id: str, wait_s: float) -> None:
        """Return when no turn of the session is going on in any worker. Raises `session_busy` after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                await self._rest(tenant, session_id)
        except TimeoutError as error:
            raise GatewayError(
                "session_busy",
                f"session {session_id!r} has been in a turn for {wait_s:g} s",
                hint="freeze it when the reply is complete",
            ) from error

    async def recorded_elsewhere(self, tenant: str, session_id: str, wait_s: float) -> None:
        """Return when no other worker has a turn of the session, or after `wait_s`: a long one is not waited for.

        Without a session it is about the turns of all.
        """
        if self._locks is None:
            return
        end = asyncio.get_running_loop().time() + wait_s
        while self._elsewhere(tenant, session_id) and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    async def _rest(self, tenant: str, session_id: str) -> None:
        while self._in_flight[tenant, session_id] or self._elsewhere(tenant, session_id):
            if self._in_flight[tenant, session_id]:
                await self._quiet.wait()
            else:
                await asyncio.sleep(_POLL_S)

    def _elsewhere(self, tenant: str, session_id: str) -> bool:
        # The lock is held until the turn is recorded. So who finds none here also finds every turn in the store, those
        # of the other workers too, for which `Turns.settle` cannot speak.
        if self._locks is None:
            return False
        return self._locks.elsewhere("session", tenant, session_id) if session_id else self._locks.any_elsewhere()


def _add(counter: Counter[tuple[str, str]], key: tuple[str, str]) -> bool:
    counter[key] += 1
    return counter[key] == 1


def _drop(counter: Counter[tuple[str, str]], key: tuple[str, str]) -> bool:
    counter[key] -= 1
    if counter[key] > 0:
        return False
    del counter[key]
    return True

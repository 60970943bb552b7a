"""Sessions on the request path: what one is, under which salt it runs, and whether it is in a turn."""

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass

from gateway import salts
from gateway.errors import GatewayError
from gateway.records import Session
from gateway.store.contract import Store


@dataclass(frozen=True, slots=True)
class SaltRule:
    """How salts are made: the secret, and whether a lineage or a whole tenant shares one."""

    secret: bytes
    per_tenant: bool

    def of(self, tenant: str, lineage: str, fingerprint: str, client_salt: str = "") -> str:
        """Return the salt of a lineage."""
        return salts.salt(self.secret, tenant, "" if self.per_tenant else lineage, fingerprint, client_salt)


class Sessions:
    """Sessions as this process sees them. What is in flight is of this process; everything else is in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
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
        self._in_flight[tenant, session_id] += 1
        self._lineages[tenant, lineage] += 1

    def leave(self, tenant: str, session_id: str, lineage: str) -> None:
        """A turn is over and recorded."""
        if _drop(self._in_flight, (tenant, session_id)):
            self._quiet.set()
            self._quiet = asyncio.Event()
        _drop(self._lineages, (tenant, lineage))

    def in_turn(self, tenant: str, session_id: str) -> bool:
        """Whether the session is in a turn, or has one that waits to be recorded."""
        return (tenant, session_id) in self._in_flight

    @property
    def in_flight(self) -> int:
        """Turns that are going on or wait to be recorded."""
        return self._in_flight.total()

    async def going_on(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage is going on: in a turn just now, or not frozen since its last."""
        return (tenant, lineage) in self._lineages or await self._store.lineage_in_use(tenant, lineage)

    async def at_rest(self, tenant: str, session_id: str, wait_s: float) -> None:
        """Return when no turn of the session is going on. Raises `session_busy` after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                while self._in_flight[tenant, session_id]:
                    await self._quiet.wait()
        except TimeoutError as error:
            raise GatewayError(
                "session_busy",
                f"session {session_id!r} has been in a turn for {wait_s:g} s",
                hint="freeze it when the reply is complete",
            ) from error


def new_id() -> str:
    """Name a session that came without an id."""
    return f"s-{secrets.token_hex(12)}"


def _drop(counter: Counter[tuple[str, str]], key: tuple[str, str]) -> bool:
    counter[key] -= 1
    if counter[key] > 0:
        return False
    del counter[key]
    return True

"""Turns in flight: from their beginning until they are recorded, by session, lineage and question.

Turns of other workers are known by the locks that they hold (`gateway.sessions.in_flight`).
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from gateway.errors import GatewayError
from gateway.records import Session
from gateway.sessions.in_flight import LockKey, TurnLocks
from gateway.sessions.prefix_chain import ConversationPrefix
from gateway.sessions.session_match import SessionMatch
from gateway.store.store import Store

_POLL_S = 0.005  # the kernel wakes nobody when another worker drops a lock

Key = TypeVar("Key")


class ActiveTurns:
    """Turns in flight as this process sees them. `locks` is None where it is the only worker."""

    def __init__(self, store: Store, locks: TurnLocks | None = None) -> None:
        self._store = store
        self._locks = locks
        self._in_flight: Counter[tuple[str, str]] = Counter()
        self._lineages: Counter[tuple[str, str]] = Counter()  # the same turns, by the lineage that they belong to
        self._heads: dict[tuple[str, str], bytes] = {}  # of what is in flight: the store may not know it yet
        self._asking: dict[tuple[str, str], list[bytes | None]] = {}  # of the same: the link of what each turn asks
        self._questions: Counter[tuple[str, bytes | None]] = Counter()  # the same links, by themselves
        self._turn_ended = asyncio.Event()  # set and replaced whenever a turn ends

    def begin(self, match: SessionMatch) -> None:
        """A turn begins."""
        session = match.session
        key = session.tenant, session.id
        if self._locks is not None:
            self._locks.acquire(_lock_keys(match))
        self._in_flight[key] += 1
        self._lineages[session.tenant, session.lineage] += 1
        asked = match.asked
        self._asking.setdefault(key, []).append(asked)
        self._questions[session.tenant, asked] += 1
        if session.first_message_hash is not None:
            self._heads.setdefault(key, session.first_message_hash)

    def end(self, match: SessionMatch) -> None:
        """A turn is over and recorded."""
        session = match.session
        key = session.tenant, session.id
        asked = match.asked
        self._asking[key].remove(asked)
        _drop(self._questions, (session.tenant, asked))
        if _drop(self._in_flight, key):
            del self._asking[key]
            self._heads.pop(key, None)
            self._turn_ended.set()
            self._turn_ended = asyncio.Event()
        _drop(self._lineages, (session.tenant, session.lineage))
        if self._locks is not None:
            self._locks.release(_lock_keys(match))

    @contextmanager
    def under_way(self, tenant: str, lineage: str) -> Iterator[None]:
        """In the block KV is made under a salt of the lineage, though by no turn of a session: none of it is swept."""
        mark: LockKey = ("lineage", tenant, lineage)
        if self._locks is not None:
            self._locks.acquire([mark])
        self._lineages[tenant, lineage] += 1
        try:
            yield
        finally:
            _drop(self._lineages, (tenant, lineage))
            if self._locks is not None:
                self._locks.release([mark])

    def has_turn_in_flight(self, tenant: str, session_id: str) -> bool:
        """Whether the session is in a turn, or has one that waits to be recorded."""
        return (tenant, session_id) in self._in_flight or self._held_elsewhere(("session", tenant, session_id))

    @property
    def in_flight(self) -> int:
        """Turns that are going on or wait to be recorded."""
        return self._in_flight.total()

    async def is_active(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage is going on: in a turn just now, or not frozen since its last."""
        return self.lineage_has_turn_in_flight(tenant, lineage) or await self._store.lineage_in_use(tenant, lineage)

    def lineage_has_turn_in_flight(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage, known or new, is in a turn or has one that waits to be recorded."""
        return (tenant, lineage) in self._lineages or self._held_elsewhere(("lineage", tenant, lineage))

    async def wait_until_idle(self, tenant: str, session_id: str, wait_s: float) -> None:
        """Return when no turn of the session is going on in any worker. Raises `session_busy` after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                await self._wait_until_idle(tenant, session_id)
        except TimeoutError as error:
            raise GatewayError(
                "session_busy",
                f"session {session_id!r} has been in a turn for {wait_s:g} s",
                hint="try again when its reply is complete",
            ) from error

    async def _wait_until_idle(self, tenant: str, session_id: str) -> None:
        # The lock is held until the turn is recorded: who finds none here finds every turn in the store, those of the
        # other workers too.
        while self._in_flight[tenant, session_id] or self._held_elsewhere(("session", tenant, session_id)):
            if self._in_flight[tenant, session_id]:
                await self._turn_ended.wait()
            else:
                await asyncio.sleep(_POLL_S)

    def is_in_turn(self, session: Session | None) -> bool:
        return session is not None and self.has_turn_in_flight(session.tenant, session.id)

    def is_asked(self, tenant: str, asked: bytes) -> bool:
        """Whether a turn that is going on, of whatever session, asks the very same."""
        return self._questions[tenant, asked] > 0 or self._held_elsewhere(("question", tenant, asked.hex()))

    def busy_with_other_request(self, session: Session | None, request: ConversationPrefix) -> bool:
        """Whether a session is asking just now, and nothing that `request` repeats or goes on from."""
        if session is None or not self.is_in_turn(session):
            return False
        here = self._asking.get((session.tenant, session.id), ())
        if any(one in request.prefix_hashes for one in here):
            return False
        return not any(
            self._held_elsewhere(_of(session.tenant, "asked", session.id, link)) for link in request.prefix_hashes
        )

    def first_message_hash(self, tenant: str, session_id: str) -> bytes | None:
        """The hash of the first message of a session that is in flight here, None where it is not known."""
        return self._heads.get((tenant, session_id))

    def first_message_elsewhere(self, tenant: str, session_id: str, head: bytes) -> bool:
        """Whether another worker is in a turn of the session, which began with this message."""
        return self._held_elsewhere(_of(tenant, "head", session_id, head))

    def has_turn_elsewhere(self, tenant: str, session_id: str) -> bool:
        """Whether another worker is in a turn of the session."""
        return self._held_elsewhere(("session", tenant, session_id))

    def _held_elsewhere(self, mark: LockKey) -> bool:
        return self._locks is not None and self._locks.held_elsewhere(mark)


def _lock_keys(match: SessionMatch) -> list[LockKey]:
    """What tells other workers of a turn: whose it is, and what they would have to know of a session they do not."""
    session = match.session
    keys: list[LockKey] = [
        ("session", session.tenant, session.id),
        ("lineage", session.tenant, session.lineage),
    ]
    if match.asked is not None:
        keys.append(_of(session.tenant, "asked", session.id, match.asked))
        keys.append(("question", session.tenant, match.asked.hex()))
    if match.is_new and session.first_message_hash is not None:
        keys.append(_of(session.tenant, "head", session.id, session.first_message_hash))
    return keys


def _of(tenant: str, what: Literal["asked", "head"], session_id: str, digest: bytes) -> LockKey:
    return what, tenant, f"{session_id}\0{digest.hex()}"


def _drop(counter: Counter[Key], key: Key) -> bool:
    counter[key] -= 1
    if counter[key] > 0:
        return False
    del counter[key]
    return True

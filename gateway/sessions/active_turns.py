"""Turns in flight, from their beginning until they are recorded: by session, lineage and request.

Turns of other workers are known by the locks that they hold (`gateway.sessions.in_flight`).
"""

import asyncio
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
    """Turns in flight, as this process knows them. `locks` is None if it is the only worker."""

    def __init__(self, store: Store, locks: TurnLocks | None = None) -> None:
        self._store = store
        self._locks = locks
        self._by_session: dict[tuple[str, str], list[SessionMatch]] = {}
        self._lineages: dict[tuple[str, str], int] = {}  # turns in each lineage
        self._requests: dict[tuple[str, bytes | None], int] = {}  # turns by the hash of their request
        self._turn_ended = asyncio.Event()

    def begin(self, match: SessionMatch) -> None:
        """A turn begins."""
        session = match.session
        if self._locks is not None:
            self._locks.acquire(_lock_keys(match))
        self._by_session.setdefault((session.tenant, session.id), []).append(match)
        _add(self._lineages, (session.tenant, session.lineage))
        _add(self._requests, (session.tenant, match.request_hash))

    def end(self, match: SessionMatch) -> None:
        """The turn that began with this match has been recorded."""
        session = match.session
        turns = self._by_session[session.tenant, session.id]
        turns.remove(match)
        if not turns:
            del self._by_session[session.tenant, session.id]
            self._turn_ended.set()
        _remove(self._lineages, (session.tenant, session.lineage))
        _remove(self._requests, (session.tenant, match.request_hash))
        if self._locks is not None:
            self._locks.release(_lock_keys(match))

    @contextmanager
    def protect_lineage(self, tenant: str, lineage: str) -> Iterator[None]:
        """In the block KV is made under a salt of the lineage, though not by a turn of a session: none is swept."""
        key: LockKey = ("lineage", tenant, lineage)
        if self._locks is not None:
            self._locks.acquire([key])
        _add(self._lineages, (tenant, lineage))
        try:
            yield
        finally:
            _remove(self._lineages, (tenant, lineage))
            if self._locks is not None:
                self._locks.release([key])

    def has_turn_in_flight(self, tenant: str, session_id: str) -> bool:
        """Whether the session is in a turn, or has one that waits to be recorded."""
        return (tenant, session_id) in self._by_session or self._held_elsewhere(("session", tenant, session_id))

    @property
    def in_flight(self) -> int:
        """Turns that are running or wait to be recorded."""
        return sum(map(len, self._by_session.values()))

    async def is_active(self, tenant: str, lineage: str, salt: str) -> bool:
        """Whether a session of the lineage is in a turn, or has this salt and has not been frozen since its last."""
        in_flight = self.lineage_has_turn_in_flight(tenant, lineage)
        return in_flight or await self._store.active_session(tenant, lineage, salt) is not None

    def lineage_has_turn_in_flight(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage, known or new, is in a turn or has one that waits to be recorded."""
        return (tenant, lineage) in self._lineages or self._held_elsewhere(("lineage", tenant, lineage))

    async def wait_until_idle(self, tenant: str, session_id: str, wait_s: float) -> None:
        """Return when no worker has a turn of the session in flight. Raises `session_busy` after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                # A lock is held until the turn is recorded: if there is none, the store has every turn of all workers.
                while self.has_turn_in_flight(tenant, session_id):
                    if (tenant, session_id) in self._by_session:
                        self._turn_ended.clear()
                        await self._turn_ended.wait()
                    else:
                        await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise GatewayError(
                "session_busy",
                f"session {session_id!r} has been in a turn for {wait_s:g} s",
                hint="try again when its reply is complete",
            ) from error

    def has_request_in_flight(self, tenant: str, request_hash: bytes) -> bool:
        """Whether a turn of any session sends the same request right now."""
        here = (tenant, request_hash) in self._requests
        return here or self._held_elsewhere(("request", tenant, request_hash.hex()))

    def busy_with_other_request(self, session: Session | None, request: ConversationPrefix) -> bool:
        """Whether a session is in a turn, but none that `request` repeats or continues."""
        if session is None or not self.has_turn_in_flight(session.tenant, session.id):
            return False
        here = self._by_session.get((session.tenant, session.id), ())
        if any(match.request_hash in request.prefix_hashes for match in here):
            return False
        keys = (_of(session.tenant, "session request", session.id, one) for one in request.prefix_hashes)
        return not any(map(self._held_elsewhere, keys))

    def named_session(self, tenant: str, session_id: str) -> Session | None:
        """A session in flight in this worker whose first message is known, as it was when its turn began."""
        here = self._by_session.get((tenant, session_id), ())
        return next((match.session for match in here if match.session.first_message_hash is not None), None)

    def first_message_elsewhere(self, tenant: str, session_id: str, head: bytes) -> bool:
        """Whether another worker is in a turn of the session, which began with this message."""
        return self._held_elsewhere(_of(tenant, "first message", session_id, head))

    def has_turn_elsewhere(self, tenant: str, session_id: str) -> bool:
        """Whether another worker is in a turn of the session."""
        return self._held_elsewhere(("session", tenant, session_id))

    def _held_elsewhere(self, key: LockKey) -> bool:
        return self._locks is not None and self._locks.held_elsewhere(key)


def _lock_keys(match: SessionMatch) -> list[LockKey]:
    """What other workers have to know of a turn: whose it is, and how its session is recognised."""
    session = match.session
    keys: list[LockKey] = [("session", session.tenant, session.id), ("lineage", session.tenant, session.lineage)]
    if match.request is not None:
        keys.append(_of(session.tenant, "session request", session.id, match.request.request_hash))
        keys.append(("request", session.tenant, match.request.request_hash.hex()))
    if match.is_new and session.first_message_hash is not None:
        keys.append(_of(session.tenant, "first message", session.id, session.first_message_hash))
    return keys


def _of(tenant: str, what: Literal["session request", "first message"], session_id: str, digest: bytes) -> LockKey:
    return what, tenant, f"{session_id}\0{digest.hex()}"


def _add(counts: dict[Key, int], key: Key) -> None:
    counts[key] = counts.get(key, 0) + 1


def _remove(counts: dict[Key, int], key: Key) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]

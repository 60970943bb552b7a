"""Turns in flight, from their beginning until they are recorded: by session, lineage and request.

Turns of other workers are known by the locks that they hold (`gateway.sessions.in_flight`), those of other gateways by
their rows in the store (`gateway.sessions.open_turns`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, TypeVar

from gateway.errors import GatewayError
from gateway.records import Session
from gateway.sessions.in_flight import NONE, LockKey, TurnsElsewhere
from gateway.sessions.prefix_chain import ConversationPrefix
from gateway.sessions.session_match import SessionMatch
from gateway.store.store import Store

_POLL_S = 0.005  # nobody is woken when a turn elsewhere is recorded
_SETTLE_S = 1.0  # far more than another gateway needs to record a turn

Key = TypeVar("Key")
Found = TypeVar("Found")


class ActiveTurns:
    """Turns in flight, as this process knows them. `elsewhere` is None if no other process shares the store."""

    def __init__(self, store: Store, elsewhere: TurnsElsewhere | None = None) -> None:
        self._store = store
        self._elsewhere = elsewhere
        self._by_session: dict[tuple[str, str], list[SessionMatch]] = {}
        self._lineages: dict[tuple[str, str], int] = {}  # turns in each lineage
        self._requests: dict[tuple[str, bytes | None], int] = {}  # turns by the hash of their request
        self._turn_ended = asyncio.Event()

    def begin(self, match: SessionMatch) -> None:
        """A turn begins."""
        session = match.session
        if self._elsewhere is not None:
            self._elsewhere.acquire(_lock_keys(match))
        self._by_session.setdefault((session.tenant, session.id), []).append(match)
        _add(self._lineages, (session.tenant, session.lineage))
        _add(self._requests, (session.tenant, match.request_hash))

    def seen_by_others(self) -> Callable[[], Awaitable[None]] | None:
        """What to wait for before anything of a reply is sent, so that its turn is found in other gateways too."""
        return self._elsewhere.visible if self._elsewhere is not None and self._elsewhere.lags else None

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
        if self._elsewhere is not None:
            self._elsewhere.release(_lock_keys(match))

    @contextmanager
    def protect_lineage(self, tenant: str, lineage: str) -> Iterator[None]:
        """In the block KV is made under a salt of the lineage, though not by a turn of a session: none is swept."""
        key: LockKey = ("lineage", tenant, lineage)
        if self._elsewhere is not None:
            self._elsewhere.acquire([key])
        _add(self._lineages, (tenant, lineage))
        try:
            yield
        finally:
            _remove(self._lineages, (tenant, lineage))
            if self._elsewhere is not None:
                self._elsewhere.release([key])

    async def has_turn_in_flight(self, tenant: str, session_id: str) -> bool:
        """Whether the session is in a turn, or has one that waits to be recorded."""
        return (tenant, session_id) in self._by_session or await self.has_turn_elsewhere(tenant, session_id)

    @property
    def in_flight(self) -> int:
        """Turns that are running or wait to be recorded."""
        return sum(map(len, self._by_session.values()))

    async def is_active(self, tenant: str, lineage: str, salt: str) -> bool:
        """Whether a session of the lineage is in a turn, or has this salt and has not been frozen since its last."""
        in_flight = await self.lineage_has_turn_in_flight(tenant, lineage)
        return in_flight or await self._store.active_session(tenant, lineage, salt) is not None

    async def lineage_has_turn_in_flight(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage, known or new, is in a turn or has one that waits to be recorded."""
        return (tenant, lineage) in self._lineages or bool(await self._held(("lineage", tenant, lineage)))

    async def wait_until_idle(self, tenant: str, session_id: str, wait_s: float) -> None:
        """Return when no worker has a turn of the session in flight. Raises `session_busy` after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                # It is in flight until it is recorded: if there is none, the store has every turn of all processes.
                while await self.has_turn_in_flight(tenant, session_id):
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

    async def settle(self, tenant: str, session_id: str = "", request_hash: bytes | None = None) -> None:
        """Wait until turns elsewhere of a session, or with this request, are recorded, at most 1 s.

        For a request of a client that may have read their replies: that they are over, others are not told.
        """
        keys: list[LockKey] = [("session", tenant, session_id)] if session_id else []
        if request_hash is not None:
            keys.append(("request", tenant, request_hash.hex()))
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while await self._held(*keys):  # noqa: ASYNC110 - other hosts wake no task
                    await asyncio.sleep(_POLL_S)

    async def wait_for(self, find: Callable[[], Awaitable[Found | None]]) -> Found | None:
        """What `find` finds, asking again while turns elsewhere are in flight that may bring it, at most 1 s."""
        if (found := await find()) is not None or self._elsewhere is None:
            return found
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                # A turn may be recorded between the search and the question, so the search comes last.
                while (waits := await self._elsewhere.any()) and (found := await find()) is None:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)
                return found if waits else await find()
        return found

    async def is_in_flight(self, tenant: str, session_id: str | None, request_hash: bytes) -> bool:
        """Whether a turn of the session, or one of any session that sends the same request, is in flight."""
        if (tenant, request_hash) in self._requests or (tenant, session_id) in self._by_session:
            return True
        session: list[LockKey] = [("session", tenant, session_id)] if session_id is not None else []
        return bool(await self._held(("request", tenant, request_hash.hex()), *session))

    async def busy_with_other_request(self, session: Session | None, request: ConversationPrefix) -> bool:
        """Whether a session is in a turn, but none that `request` repeats or continues."""
        if session is None or not await self.has_turn_in_flight(session.tenant, session.id):
            return False
        here = self._by_session.get((session.tenant, session.id), ())
        if any(match.request_hash in request.prefix_hashes for match in here):
            return False
        keys = [_of(session.tenant, "session request", session.id, one) for one in request.prefix_hashes]
        return not await self._held(*keys)

    def named_session(self, tenant: str, session_id: str) -> Session | None:
        """A session in flight in this worker whose first message is known, as it was when its turn began."""
        here = self._by_session.get((tenant, session_id), ())
        return next((match.session for match in here if match.session.first_message_hash is not None), None)

    async def first_message_elsewhere(self, tenant: str, session_id: str, head: bytes) -> bool:
        """Whether another process is in a turn of the session, which began with this message."""
        return bool(await self._held(_of(tenant, "first message", session_id, head)))

    async def has_turn_elsewhere(self, tenant: str, session_id: str) -> bool:
        """Whether another process is in a turn of the session."""
        return bool(await self._held(("session", tenant, session_id)))

    async def _held(self, *keys: LockKey) -> Collection[LockKey]:
        return NONE if self._elsewhere is None else await self._elsewhere.held(keys)


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

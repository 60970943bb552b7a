"""Sessions on the request path: which one a request belongs to, under which salt, and whether it is in a turn.

A turn is in flight from its beginning until it is recorded. What is in flight in other workers is known by locks that
they hold (`gateway.sessions.in_flight`).
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from gateway.errors import GatewayError
from gateway.records import Session
from gateway.sessions import alias_match, prefix_chain, salts
from gateway.sessions.in_flight import LockKey, TurnLocks
from gateway.sessions.prefix_chain import ClientSessionId, ConversationPrefix, PrefixMatch, Prompt
from gateway.store.store import Store

_POLL_S = 0.005  # the kernel wakes nobody when another worker drops a lock

Key = TypeVar("Key")
ISOLATED = "isolated/"  # begins the lineage of an isolated clone; no session id has a slash, so no other does


@dataclass(frozen=True, slots=True)
class SaltRule:
    """How salts are made: the secret, and whether a lineage or a whole tenant shares one."""

    secret: bytes
    per_tenant: bool

    def of(self, tenant: str, lineage: str, fingerprint: str, client_salt: str = "") -> str:
        """Return the salt of a lineage; an isolated one never shares its tenant's."""
        shared = self.per_tenant and not lineage.startswith(ISOLATED)
        return salts.salt(self.secret, tenant, "" if shared else lineage, fingerprint, client_salt)


@dataclass(frozen=True, slots=True)
class SessionMatch:
    """Where a request belongs: its session, how that was recognised, and the chain that it is part of.

    `request` is the beginning that the request is, where it was needed on the way. `is_new`: no turn has used the
    session yet.
    """

    session: Session
    source: str
    seed: bytes
    request: ConversationPrefix | None = None
    is_new: bool = False

    @property
    def asked(self) -> bytes | None:
        """The chain's link of the whole request, where it was needed."""
        return self.request.asked if self.request else None


class SessionResolver:
    """Sessions as this process sees them. `locks` is None where it is the only worker."""

    def __init__(self, store: Store, locks: TurnLocks | None = None, *, by_prefix: bool = True) -> None:
        self._store = store
        self._by_beginning = by_prefix
        self._locks = locks
        self._in_flight: Counter[tuple[str, str]] = Counter()
        self._lineages: Counter[tuple[str, str]] = Counter()  # the same turns, by the lineage that they belong to
        self._heads: dict[tuple[str, str], bytes] = {}  # of what is in flight: the store may not know it yet
        self._asking: dict[tuple[str, str], list[bytes | None]] = {}  # of the same: the link of what each turn asks
        self._questions: Counter[tuple[str, bytes | None]] = Counter()  # the same links, by themselves
        self._turn_ended = asyncio.Event()  # set and replaced whenever a turn ends

    async def open(self, tenant: str, session_id: str, source: str = "") -> Session:
        """Return the session, or what it will be once its first turn is recorded.

        A session that nobody has seen begins its own lineage, named after it, so that two first requests at once agree.
        """
        known = await self._store.session(tenant, session_id)
        return known or Session(tenant, session_id, lineage=session_id, source=source)

    async def resolve(
        self,
        tenant: str,
        named: ClientSessionId | None,
        prompt: Prompt,
        settle: Callable[[], Awaitable[None]],
    ) -> SessionMatch:
        """Say which session a request belongs to; `settle` waits for the turns that are over."""
        seed = prompt.seed
        if named and named.kind == "session":
            return self._named(await self.open(tenant, named.id, named.source), named, seed)
        if not prompt.messages:
            new = named.id if named and named.kind == "agent" else new_id()
            session = await self.open(tenant, new, named.source if named else "new")
            return SessionMatch(session, session.source, seed, is_new=not session.created_at)
        if named and named.kind == "agent":
            session = await self._of_agent(tenant, named, prompt.head)
            if not session.created_at:
                session = await self._forked(session, prompt.beginning, settle)
            return self._named(session, named, seed)
        return await self._by_prefix(tenant, named, prompt, settle)

    @staticmethod
    def _named(session: Session, named: ClientSessionId, seed: bytes) -> SessionMatch:
        return SessionMatch(session, named.source, seed, is_new=not session.created_at)

    async def _of_agent(self, tenant: str, named: ClientSessionId, head: bytes) -> Session:
        """The session of an agent's id, or one beside it: an agent holds side conversations under the same id.

        What is beside it is the same client's, so it shares the lineage.
        """
        # Asked before the store: what is recorded in between, is found there.
        elsewhere = self._held_elsewhere(("session", tenant, named.id))
        as_there = elsewhere and self._held_elsewhere(_of(tenant, "head", named.id, head))
        session = await self.open(tenant, named.id, named.source)
        began_with = session.head or self._heads.get((tenant, named.id))
        if began_with is None and (as_there or not elsewhere):
            return await self._of_parent(replace(session, head=head), named.parent)
        if began_with == head:
            return session
        beside = await self.open(
            tenant, prefix_chain.subconversation_id(named.id, head), f"{named.source}, beside {named.id}"
        )
        return await self._of_parent(beside, named.id)

    async def _of_parent(self, session: Session, parent_id: str) -> Session:
        """A new session in the lineage of the one that it is a side conversation of."""
        if session.created_at or not parent_id:
            return session
        parent = await self.open(session.tenant, parent_id)
        return replace(session, lineage=parent.lineage, parent=parent.id, engine=parent.engine)

    async def _forked(
        self, new: Session, request: ConversationPrefix, settle: Callable[[], Awaitable[None]]
    ) -> Session:
        """An agent's new session, in the lineage of the conversation that it is a fork of, if it is one."""
        stem = (await self.look_up(new.tenant, request, settle)).session
        if stem is None or stem.id == new.id:  # itself: its first turn was recorded just now
            return stem or new
        return replace(new, lineage=stem.lineage, parent=stem.id, engine=stem.engine)

    async def _by_prefix(
        self,
        tenant: str,
        key: ClientSessionId | None,
        prompt: Prompt,
        settle: Callable[[], Awaitable[None]],
    ) -> SessionMatch:
        request = prompt.beginning
        verdict = await self.look_up(tenant, request, settle)
        if verdict.session and not verdict.forks:
            return SessionMatch(verdict.session, verdict.how, prompt.seed, request)
        session = await self._fresh(tenant, key, verdict)
        return SessionMatch(session, session.source, prompt.seed, request, is_new=True)

    async def look_up(
        self, tenant: str, request: ConversationPrefix, settle: Callable[[], Awaitable[None]]
    ) -> PrefixMatch:
        """Judge a request by what the store knows of its beginning, and by what is going on just now."""
        if not self._by_beginning:  # who knows what others said could go on with it
            return PrefixMatch(None)
        verdict = await self._judge(tenant, request)
        last_reply = request.replies[-1] if request.replies else 0
        asked_now = self._is_asked(tenant, request.asked) or self._is_in_turn(verdict.session)
        if verdict.forks or verdict.depth < last_reply or asked_now:
            await settle()  # the turn that it goes on from, or that has gone on from there, may not be recorded yet
            verdict = await self._judge(tenant, request)
        # Two questions at once after the same reply: one of them is a branch.
        branches = not verdict.forks and self._busy_with_other_request(verdict.session, request)
        return replace(verdict, forks=True, how="fork") if branches else verdict

    def _is_in_turn(self, session: Session | None) -> bool:
        return session is not None and self.has_turn_in_flight(session.tenant, session.id)

    def _is_asked(self, tenant: str, asked: bytes) -> bool:
        """Whether a turn that is going on, of whatever session, asks the very same."""
        return self._questions[tenant, asked] > 0 or self._held_elsewhere(("question", tenant, asked.hex()))

    async def _judge(self, tenant: str, request: ConversationPrefix) -> PrefixMatch:
        verdict = await self._judge_links(tenant, request, request.candidates)
        if prefix_chain.was_answered(request, verdict):
            # Another session may stand where this was asked: the same script, run once more, gets the same replies and
            # asks the same.
            standing = await self._judge_links(tenant, request, request.candidates[1:])
            if request.replies and (standing.forks or not standing.session):
                standing = await self._judge_changed(tenant, request, request.replies[-1] - 1)
            verdict = prefix_chain.likelier(verdict, standing)
        if (verdict.session and not verdict.forks) or not request.replies or verdict.depth >= request.replies[-1]:
            return verdict
        changed = await self._judge_changed(tenant, request, verdict.depth)
        return changed if changed.session or not verdict.session else verdict

    async def _judge_links(self, tenant: str, request: ConversationPrefix, links: Sequence[bytes]) -> PrefixMatch:
        known, candidates = await self._store.sessions_by_prefix(tenant, links)
        # Of sessions at the same point, one that is asking something else just now is the least likely.
        return prefix_chain.match_session(
            request, known, sorted(candidates, key=lambda one: self._busy_with_other_request(one, request))
        )

    async def _judge_changed(self, tenant: str, request: ConversationPrefix, known: int) -> PrefixMatch:
        """Judge a request of which no more than `known` messages are."""
        for reply in request.answered(known):
            found = await self._store.sessions_by_reply_alias(tenant, reply.names)
            if verdict := alias_match.judge(reply, found):
                return verdict
        return PrefixMatch(None)

    def _busy_with_other_request(self, session: Session | None, request: ConversationPrefix) -> bool:
        """Whether a session is asking just now, and nothing that `request` repeats or goes on from."""
        if session is None or not self._is_in_turn(session):
            return False
        here = self._asking.get((session.tenant, session.id), ())
        if any(one in request.prefix_hashes for one in here):
            return False
        return not any(
            self._held_elsewhere(_of(session.tenant, "asked", session.id, link)) for link in request.prefix_hashes
        )

    async def _fresh(self, tenant: str, key: ClientSessionId | None, verdict: PrefixMatch) -> Session:
        """A session for a conversation that nobody has seen: named after the key that it brought, if that is free."""
        if verdict.session:
            parent = verdict.session
            return Session(
                tenant, new_id(), lineage=parent.lineage, source=verdict.how, parent=parent.id, engine=parent.engine
            )
        if key and await self._is_free(tenant, key.id):
            return Session(tenant, key.id, lineage=key.id, source=key.source)
        session_id = new_id()
        return Session(tenant, session_id, lineage=session_id, source=key.source if key else verdict.how)

    async def _is_free(self, tenant: str, session_id: str) -> bool:
        if self.has_turn_in_flight(tenant, session_id):
            return False
        return await self._store.session(tenant, session_id) is None

    def begin(self, place: SessionMatch) -> None:
        """A turn begins."""
        session = place.session
        key = session.tenant, session.id
        if self._locks is not None:
            self._locks.acquire(_marks(place))
        self._in_flight[key] += 1
        self._lineages[session.tenant, session.lineage] += 1
        asked = place.asked
        self._asking.setdefault(key, []).append(asked)
        self._questions[session.tenant, asked] += 1
        if session.head is not None:
            self._heads.setdefault(key, session.head)

    def end(self, place: SessionMatch) -> None:
        """A turn is over and recorded."""
        session = place.session
        key = session.tenant, session.id
        asked = place.asked
        self._asking[key].remove(asked)
        _drop(self._questions, (session.tenant, asked))
        if _drop(self._in_flight, key):
            del self._asking[key]
            self._heads.pop(key, None)
            self._turn_ended.set()
            self._turn_ended = asyncio.Event()
        _drop(self._lineages, (session.tenant, session.lineage))
        if self._locks is not None:
            self._locks.release(_marks(place))

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
                hint="freeze it when the reply is complete",
            ) from error

    async def _wait_until_idle(self, tenant: str, session_id: str) -> None:
        # The lock is held until the turn is recorded: who finds none here finds every turn in the store, those of the
        # other workers too.
        while self._in_flight[tenant, session_id] or self._held_elsewhere(("session", tenant, session_id)):
            if self._in_flight[tenant, session_id]:
                await self._turn_ended.wait()
            else:
                await asyncio.sleep(_POLL_S)

    def _held_elsewhere(self, mark: LockKey) -> bool:
        return self._locks is not None and self._locks.held_elsewhere(mark)


def _marks(place: SessionMatch) -> list[LockKey]:
    """What tells other workers of a turn: whose it is, and what they would have to know of a session they do not."""
    session = place.session
    marks: list[LockKey] = [
        ("session", session.tenant, session.id),
        ("lineage", session.tenant, session.lineage),
    ]
    if place.asked is not None:
        marks.append(_of(session.tenant, "asked", session.id, place.asked))
        marks.append(("question", session.tenant, place.asked.hex()))
    if place.is_new and session.head is not None:
        marks.append(_of(session.tenant, "head", session.id, session.head))
    return marks


def _of(tenant: str, what: Literal["asked", "head"], session_id: str, digest: bytes) -> LockKey:
    return what, tenant, f"{session_id}\0{digest.hex()}"


def new_id() -> str:
    """Name a session that came without an id."""
    return f"s-{secrets.token_hex(12)}"


def _drop(counter: Counter[Key], key: Key) -> bool:
    counter[key] -= 1
    if counter[key] > 0:
        return False
    del counter[key]
    return True


def session_not_found(session_id: str) -> GatewayError:
    """The error for a session that is not there."""
    return GatewayError(
        "session_not_found",
        f"there is no session {session_id!r}",
        hint="GET /admin/sessions lists them",
        details={"session_id": session_id},
    )

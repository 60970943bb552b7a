"""Resolve which session a request belongs to, and the salt of its KV."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.errors import GatewayError
from gateway.records import Session, StoredResponse
from gateway.sessions import alias_match, prefix_chain, salts
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.prefix_chain import ClientSessionId, ConversationPrefix, PrefixMatch, Prompt
from gateway.sessions.recorder import TurnRecorder
from gateway.sessions.session_match import SessionMatch
from gateway.sessions.turn_context import TurnContext
from gateway.store.store import Store

PREVIOUS_RESPONSE = "body previous_response_id"  # how a session that was found by a response is recognised
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


class SessionResolver:
    """Says which session a request belongs to, by its id, the response it continues, or its own beginning."""

    def __init__(self, store: Store, turns: ActiveTurns, recorder: TurnRecorder, *, by_prefix: bool = True) -> None:
        self._store = store
        self._turns = turns
        self._recorder = recorder
        self._by_beginning = by_prefix

    async def open(self, tenant: str, session_id: str, source: str = "") -> Session:
        """Return the session, or what it will be once its first turn is recorded.

        A session that nobody has seen begins its own lineage, named after it, so that two first requests at once agree.
        """
        known = await self._store.session(tenant, session_id)
        return known or Session(tenant, session_id, lineage=session_id, source=source)

    async def resolve(self, turn: TurnContext) -> SessionMatch:
        """Say which session a turn belongs to. A new one's first turn is not in the store until it is recorded."""
        tenant, named, prompt = turn.tenant, turn.client_id, turn.prompt
        seed = prompt.seed
        if turn.previous is not None:
            return await self._after_response(turn.previous, named, seed)
        if named and named.kind == "session":
            return self._named(await self.open(tenant, named.id, named.source), named, seed)
        if not prompt.messages:
            new = named.id if named and named.kind == "agent" else new_id()
            session = await self.open(tenant, new, named.source if named else "new")
            return SessionMatch(session, session.source, seed, is_new=not session.created_at)
        if named and named.kind == "agent":
            session = await self._of_agent(tenant, named, prompt.head)
            if not session.created_at:
                session = await self._forked(session, prompt.beginning)
            return self._named(session, named, seed)
        return await self._by_prefix(tenant, named, prompt)

    async def _after_response(self, before: StoredResponse, named: ClientSessionId | None, seed: bytes) -> SessionMatch:
        """The session of a response while that is its last answer and no turn follows it yet, else a fork: another
        session in the same lineage, so that what both share is found in the cache. A session id from the client wins.
        """
        tenant = before.tenant
        by_client = named if named and named.kind == "session" else None
        given = by_client or ClientSessionId("session", before.session_id, PREVIOUS_RESPONSE)
        if self._turns.has_turn_in_flight(tenant, given.id):
            await self._recorder.flush()  # where the session is by now decides whether this is a fork
        session = await self.open(tenant, given.id, given.source)
        in_turn = self._turns.has_turn_in_flight(tenant, given.id)
        if not session.created_at and not in_turn:  # nobody has seen it yet
            return SessionMatch(replace(session, lineage=before.lineage), given.source, seed, is_new=True)
        if by_client or (session.transcript == before.transcript and not in_turn):
            return SessionMatch(session, given.source, seed)
        fork = Session(
            tenant, new_id(), lineage=before.lineage, source="fork", parent=session.id, engine=session.engine
        )
        return SessionMatch(fork, "fork", seed, is_new=True)

    @staticmethod
    def _named(session: Session, named: ClientSessionId, seed: bytes) -> SessionMatch:
        return SessionMatch(session, named.source, seed, is_new=not session.created_at)

    async def _of_agent(self, tenant: str, named: ClientSessionId, head: bytes) -> Session:
        """The session of an agent's id, or one beside it: an agent holds side conversations under the same id.

        What is beside it is the same client's, so it shares the lineage.
        """
        # Asked before the store: what is recorded in between, is found there.
        elsewhere = self._turns.has_turn_elsewhere(tenant, named.id)
        as_there = elsewhere and self._turns.first_message_elsewhere(tenant, named.id, head)
        session = await self.open(tenant, named.id, named.source)
        began_with = session.first_message_hash or self._turns.first_message_hash(tenant, named.id)
        if began_with is None and (as_there or not elsewhere):
            return await self._of_parent(replace(session, first_message_hash=head), named.parent)
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

    async def _forked(self, new: Session, request: ConversationPrefix) -> Session:
        """An agent's new session, in the lineage of the conversation that it is a fork of, if it is one."""
        stem = (await self.look_up(new.tenant, request)).session
        if stem is None or stem.id == new.id:  # itself: its first turn was recorded just now
            return stem or new
        return replace(new, lineage=stem.lineage, parent=stem.id, engine=stem.engine)

    async def _by_prefix(self, tenant: str, key: ClientSessionId | None, prompt: Prompt) -> SessionMatch:
        request = prompt.beginning
        verdict = await self.look_up(tenant, request)
        if verdict.session and not verdict.forks:
            return SessionMatch(verdict.session, verdict.how, prompt.seed, request)
        session = await self._fresh(tenant, key, verdict)
        return SessionMatch(session, session.source, prompt.seed, request, is_new=True)

    async def look_up(self, tenant: str, request: ConversationPrefix) -> PrefixMatch:
        """Judge a request by what the store knows of its beginning, and by what is going on just now."""
        if not self._by_beginning:  # who knows what others said could go on with it
            return PrefixMatch(None)
        verdict = await self._judge(tenant, request)
        last_reply = request.replies[-1] if request.replies else 0
        asked_now = self._turns.is_asked(tenant, request.asked) or self._turns.is_in_turn(verdict.session)
        if verdict.forks or verdict.depth < last_reply or asked_now:
            await (
                self._recorder.flush()
            )  # the turn that it goes on from, or that has gone on from there, may not be recorded yet
            verdict = await self._judge(tenant, request)
        # Two questions at once after the same reply: one of them is a branch.
        branches = not verdict.forks and self._turns.busy_with_other_request(verdict.session, request)
        return replace(verdict, forks=True, how="fork") if branches else verdict

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
            request, known, sorted(candidates, key=lambda one: self._turns.busy_with_other_request(one, request))
        )

    async def _judge_changed(self, tenant: str, request: ConversationPrefix, known: int) -> PrefixMatch:
        """Judge a request of which no more than `known` messages are."""
        for reply in request.answered(known):
            found = await self._store.sessions_by_reply_alias(tenant, reply.names)
            if verdict := alias_match.judge(reply, found):
                return verdict
        return PrefixMatch(None)

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
        if self._turns.has_turn_in_flight(tenant, session_id):
            return False
        return await self._store.session(tenant, session_id) is None


def new_id() -> str:
    """Name a session that came without an id."""
    return f"s-{secrets.token_hex(12)}"


def session_not_found(session_id: str) -> GatewayError:
    """The error for a session that is not there."""
    return GatewayError(
        "session_not_found",
        f"there is no session {session_id!r}",
        hint="`GET /admin/sessions` lists them",
        details={"session_id": session_id},
    )

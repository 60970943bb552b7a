"""Resolve which session a request belongs to."""

import secrets
from collections.abc import Callable, Sequence

from msgspec import structs

from gateway.errors import GatewayError
from gateway.records import Session, StoredResponse, subconversation_id, subconversation_source
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.client_ids import ClientSessionId
from gateway.sessions.prefix_chain import ConversationPrefix, Prompt
from gateway.sessions.recorder import TurnRecorder
from gateway.sessions.session_match import (
    NO_MATCH,
    PrefixMatch,
    SessionMatch,
    match_by_prefix,
    match_reply,
    more_likely,
    was_answered,
)
from gateway.sessions.turn_context import TurnContext
from gateway.sessions.turn_gate import TurnGate
from gateway.store.store import Store

_PREVIOUS_RESPONSE = "body previous_response_id"  # the source of a session that was found by a response


class SessionResolver:
    """Finds the session of a request by its id, by the response that it continues, or by its prefix."""

    def __init__(self, store: Store, turns: ActiveTurns, recorder: TurnRecorder, *, by_prefix: bool = True) -> None:
        self._store = store
        self._turns = turns
        self._recorder = recorder
        self._by_prefix = by_prefix
        self._gate = TurnGate()

    async def enter(self, turn: TurnContext) -> Callable[[], None]:
        """Wait for other requests of the conversation to find their session, if reads of the store wait.

        Returns what lets the next one in. Call it when the turn has begun, or will not.
        """
        if not self._store.reads_wait:
            return _nothing
        client_id = turn.client_id
        named = client_id.id if client_id and client_id.kind != "key" else ""
        return await self._gate.enter((turn.tenant, named or turn.prompt.head))

    async def open(self, tenant: str, session_id: str, source: str = "") -> Session:
        """Return the session, or what it will be once its first turn is recorded.

        A new session begins its own lineage, named after it, so that two first requests at once agree.
        """
        stored = await self._store.session(tenant, session_id)
        return stored or Session(tenant, session_id, lineage=session_id, source=source)

    async def resolve(self, turn: TurnContext, *, may_displace: bool = True) -> SessionMatch:
        """Return the session that a turn belongs to. A new one is not in the store until its first turn is recorded.

        `may_displace`: it may get an agent's id that another session has (`SessionMatch.displaces`).
        """
        tenant, client_id, prompt = turn.tenant, turn.client_id, turn.prompt
        kind = client_id.kind if client_id else ""
        displaces = False
        if turn.previous is not None:
            return await self._after_response(turn.previous, client_id, prompt.seed)
        if prompt.messages and kind in ("", "key"):
            return await self._find_by_prefix(tenant, client_id, prompt)
        if client_id is None or kind == "key":
            session = await self.open(tenant, new_id(), client_id.source if client_id else "new")
        elif kind == "session" or not prompt.messages:
            session = await self.open(tenant, client_id.id, client_id.source)
        else:
            session, displaces = await self._of_agent(tenant, client_id, prompt, may_displace=may_displace)
            if not session.created_at:
                session = await self._in_lineage_of_stem(session, prompt.prefix)
        source = client_id.source if client_id and (prompt.messages or kind == "session") else session.source
        return SessionMatch(session, source, prompt.seed, is_new=not session.created_at, displaces=displaces)

    async def _after_response(
        self, before: StoredResponse, client_id: ClientSessionId | None, seed: bytes
    ) -> SessionMatch:
        """The session of a response while that is its last and has no successor yet, else a fork: another session in
        the same lineage, so that their common history is found in the cache. A session id from the client wins.
        """
        tenant = before.tenant
        by_client = client_id if client_id and client_id.kind == "session" else None
        target = by_client or ClientSessionId("session", before.session_id, _PREVIOUS_RESPONSE)
        if await self._turns.has_turn_in_flight(tenant, target.id):
            await self._turns.settle(tenant, target.id)
            await self._recorder.flush()  # whether this is a fork depends on the session's last turn
        session = await self.open(tenant, target.id, target.source)
        in_turn = await self._turns.has_turn_in_flight(tenant, target.id)
        if not session.created_at and not in_turn:
            return SessionMatch(structs.replace(session, lineage=before.lineage), target.source, seed, is_new=True)
        if by_client or (session.transcript == before.transcript and not in_turn):
            return SessionMatch(session, target.source, seed)
        fork = Session(tenant, new_id(), before.lineage, source="fork", parent=session.id, engine=session.engine)
        return SessionMatch(fork, "fork", seed, is_new=True)

    async def _of_agent(
        self, tenant: str, client_id: ClientSessionId, prompt: Prompt, *, may_displace: bool
    ) -> tuple[Session, bool]:
        """The session of an agent's id, or that of a side conversation: agents have them under the same id.

        A side conversation is the same client's, so it shares the lineage. Also returns whether the session takes the
        id from another one: a title, say, that was asked for before the first turn of its chat arrived.
        """
        head = prompt.head
        # Checked before the store is read: a turn that is recorded in between is found there.
        elsewhere = await self._turns.has_turn_elsewhere(tenant, client_id.id)
        same_elsewhere = elsewhere and await self._turns.first_message_elsewhere(tenant, client_id.id, head)
        session = await self.open(tenant, client_id.id, client_id.source)
        holder = session if session.first_message_hash else self._turns.named_session(tenant, client_id.id)
        if holder is None and (same_elsewhere or not elsewhere):
            return await self._in_lineage_of(_asked(session, prompt), client_id.parent), False
        if holder is not None and holder.first_message_hash == head:
            return session, False
        side_id = subconversation_id(client_id.id, head)
        side = await self.open(tenant, side_id, subconversation_source(client_id.source, client_id.id))
        side = await self._in_lineage_of(side, client_id.id)
        if may_displace and holder is not None and holder.is_single_message and prompt.continues:
            parent = client_id.parent or None
            return _asked(structs.replace(side, id=client_id.id, source=client_id.source, parent=parent), prompt), True
        return side, False

    async def _in_lineage_of(self, session: Session, parent_id: str) -> Session:
        """A new session in the lineage of the one that it is a side conversation of."""
        if session.created_at or not parent_id:
            return session
        return _child(session, await self.open(session.tenant, parent_id))

    async def _in_lineage_of_stem(self, new: Session, request: ConversationPrefix) -> Session:
        """An agent's new session, in the lineage of the conversation that it is a fork of, if it is one."""
        stem = (await self.look_up(new.tenant, request)).session
        if stem is None or stem.id == new.id:  # itself: its first turn was recorded just now
            return stem or new
        return _child(new, stem)

    async def _find_by_prefix(self, tenant: str, key: ClientSessionId | None, prompt: Prompt) -> SessionMatch:
        request = prompt.prefix
        match = await self.look_up(tenant, request)
        if match.session and not match.forks:
            return SessionMatch(match.session, match.how, prompt.seed, request)
        session = await self._new_session(tenant, key, match)
        return SessionMatch(session, session.source, prompt.seed, request, is_new=True)

    async def look_up(self, tenant: str, request: ConversationPrefix) -> PrefixMatch:
        """Match a request by what the store knows of its prefix, and by the turns in flight."""
        if not self._by_prefix:  # anybody who knows a conversation could continue it
            return NO_MATCH
        # A turn that was recorded between two reads is found by its reply, though not by its prefix.
        recording = self._store.reads_wait and self._turns.in_flight
        match = await self._match(tenant, request)
        last_reply = request.replies[-1] if request.replies else 0
        known = match.session.id if match.session else None
        unknown_reply = match.forks or match.depth < last_reply
        unsettled = unknown_reply or (recording and match.how != "prefix")
        if unsettled or await self._turns.is_in_flight(tenant, known, request.request_hash):
            # The turn before this one, or another one after that, may not be recorded yet.
            if unknown_reply and last_reply > 1:
                await self._turns.settle(tenant, request_hash=request.prefix_hashes[last_reply - 2])
            await self._recorder.flush()
            match = await self._match(tenant, request)
        # Of two questions at once after the same reply, one is a branch.
        branches = not match.forks and await self._turns.busy_with_other_request(match.session, request)
        return structs.replace(match, forks=True, how="fork") if branches else match

    async def _match(self, tenant: str, request: ConversationPrefix) -> PrefixMatch:
        match = await self._match_prefix(tenant, request, request.candidates)
        if was_answered(request, match):
            # Another session may have reached the point before this request: the same script, run once more, gets the
            # same replies and sends the same requests.
            continued = await self._match_prefix(tenant, request, request.candidates[1:])
            if request.replies and (continued.forks or not continued.session):
                continued = await self._match_replies(tenant, request, request.replies[-1] - 1)
            match = more_likely(match, continued)
        if (match.session and not match.forks) or not request.replies or match.depth >= request.replies[-1]:
            return match
        changed = await self._match_replies(tenant, request, match.depth)
        return changed if changed.session or not match.session else match

    async def _match_prefix(self, tenant: str, request: ConversationPrefix, hashes: Sequence[bytes]) -> PrefixMatch:
        known, candidates = await self._store.sessions_by_prefix(tenant, hashes)
        if len(candidates) > 1:  # of sessions at the same point, one that is busy with another request is least likely
            busy = {one.id: await self._turns.busy_with_other_request(one, request) for one in candidates}
            candidates = sorted(candidates, key=lambda one: busy[one.id])
        return match_by_prefix(request, known, candidates)

    async def _match_replies(self, tenant: str, request: ConversationPrefix, known: int) -> PrefixMatch:
        """Match a request by its replies after the first `known` messages."""
        for reply in request.answered(known):
            sessions = await self._store.sessions_by_reply_alias(tenant, reply.aliases)
            if match := match_reply(reply, sessions):
                return match
        return NO_MATCH

    async def _new_session(self, tenant: str, key: ClientSessionId | None, match: PrefixMatch) -> Session:
        """A session for a new conversation or a fork; a new one is named after the client's key, if that is free."""
        if match.session:
            return _child(Session(tenant, new_id(), lineage="", source=match.how), match.session)
        if key and await self._is_free(tenant, key.id):
            return Session(tenant, key.id, lineage=key.id, source=key.source)
        session_id = new_id()
        return Session(tenant, session_id, lineage=session_id, source=key.source if key else match.how)

    async def _is_free(self, tenant: str, session_id: str) -> bool:
        if await self._turns.has_turn_in_flight(tenant, session_id):
            return False
        return await self._store.session(tenant, session_id) is None


def _nothing() -> None:
    """No other request waits."""


def _asked(session: Session, prompt: Prompt) -> Session:
    """An agent's session as other requests see it from now on, before its first turn is recorded."""
    return structs.replace(session, first_message_hash=prompt.head, last_request_hash=prompt.prefix.request_hash)


def _child(session: Session, parent: Session) -> Session:
    return structs.replace(session, lineage=parent.lineage, parent=parent.id, engine=parent.engine)


def new_id() -> str:
    """An id for a session that came without one."""
    return f"s-{secrets.token_hex(12)}"


def session_not_found(session_id: str) -> GatewayError:
    """The error for a session that does not exist."""
    return GatewayError(
        "session_not_found",
        f"there is no session {session_id!r}",
        hint="`GET /admin/sessions` lists them",
        details={"session_id": session_id},
    )

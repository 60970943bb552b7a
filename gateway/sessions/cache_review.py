"""Review a finished turn before it is recorded: how good was the estimate, and did the prompt hit the cache?

Runs in the recorder's task. The previous turn is read from the store only if fewer tokens were found than expected.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from gateway.records import Message, Session, Usage
from gateway.runtime.offload import Offload
from gateway.sessions import misses
from gateway.sessions.completed_turn import ParsedTurn, Review
from gateway.sessions.misses import PreviousTurn, TurnCacheStats
from gateway.sessions.token_estimator import Estimator
from gateway.sessions.turn_context import TurnContext
from gateway.store.store import Store

_SESSIONS = 4096
_USUAL_CHUNK = 256  # LMCache's default, for a cache that has not reported its own yet, or no cache


@dataclass(frozen=True, slots=True)
class _Before:
    """A session's previous turn, None if there is none, and when it was over."""

    turn: PreviousTurn | None
    at: float


class CacheReviewer:
    """Reviews finished turns. `chunk_size` returns that of the cache, 0 if it is not known."""

    def __init__(self, store: Store, estimator: Estimator, chunk_size: Callable[[], int]) -> None:
        self._store = store
        self._estimator = estimator
        self._offload = Offload()
        self._chunk_size = chunk_size
        self._last: dict[tuple[str, str], _Before] = {}  # of this worker's turns, without messages
        self._unrecorded: dict[tuple[str, str], tuple[Sequence[Message], Mapping[str, Any]]] = {}

    async def review(self, turn: ParsedTurn, *, heavy: bool = False) -> Review:
        """Estimate a turn's prompt, and explain what it found in the cache; a `heavy` turn is compared in a thread."""
        ended, usage = turn.turn, turn.reply.usage
        if usage is None or not turn.whole:
            return Review()
        model, frame = ended.call.model, ended.call.whole_frame
        before = await self._before(ended)
        ahead = self._estimator.estimate_next_turn
        estimate = await self._offload.run(
            heavy, ahead, model, before.turn.tokens if before.turn else 0, turn.whole, frame
        )
        self._estimator.observe(model, estimate, usage.prompt)
        if before.turn is None and ended.match.session.parent:
            before = await self._of_parent(ended, turn.whole, frame)
        evidence = await self._evidence(turn, usage, before, frame)
        miss = await self._offload.run(heavy, misses.explain_miss, evidence)
        if turn.messages is not None:
            self._keep(ended, usage, turn.messages, frame)
        return Review(estimate.tokens, miss.expected, str(miss))

    def recorded(self) -> None:
        """All reviewed turns are in the store now."""
        self._unrecorded.clear()

    def _keep(self, ended: TurnContext, usage: Usage, messages: Sequence[Message], frame: Mapping[str, Any]) -> None:
        key = _key(ended)
        if len(self._last) >= _SESSIONS and key not in self._last:
            self._last.clear()
        left = PreviousTurn(
            tokens=usage.prompt + usage.completion,
            prompt=usage.prompt,
            salt=ended.salt,
            fingerprint=ended.fingerprint,
            engine=ended.engine,
        )
        self._last[key] = _Before(left, ended.ended_at)
        self._unrecorded[key] = messages, frame

    async def _before(self, ended: TurnContext) -> _Before:
        """The previous turn, which may not have been recorded yet when the session was read."""
        session, key = ended.match.session, _key(ended)
        just = None if ended.match.displaces else self._last.get(key)  # that may be of another session
        if just is None or not session.last_active_at < just.at <= ended.started_at:
            return _Before(_previous_turn(session), session.last_active_at)
        if not session.created_at and key not in self._unrecorded:
            # It was new when it was read: perhaps because a session of that id had been deleted.
            now = await self._store.session(*key)
            if now is None or now.last_active_at < just.at:
                return _Before(None, 0.0)
        return just

    async def _of_parent(self, ended: TurnContext, whole: Sequence[Message], frame: Mapping[str, Any]) -> _Before:
        """What a new session shares with its parent: both have one salt."""
        new = ended.match.session
        parent = await self._store.session(new.tenant, new.parent or "")
        left = _previous_turn(parent) if parent else None
        if parent is None or parent.transcript is None or left is None or left.salt != ended.salt:
            return _Before(None, 0.0)
        messages, had = await self._store.messages(parent.transcript), {}
        if parent.frame:
            had = dict(await self._store.frame(parent.frame))
        left = structs.replace(left, messages=messages, frame=had)
        return _Before(misses.shared(left, whole, frame), parent.last_active_at)

    async def _evidence(
        self, turn: ParsedTurn, usage: Usage, before: _Before, frame: Mapping[str, Any]
    ) -> TurnCacheStats:
        ended = turn.turn
        evidence = TurnCacheStats(
            prompt=usage.prompt,
            cached=usage.cached,
            chunk_size=self._chunk_size() or _USUAL_CHUNK,
            messages=turn.whole,
            before=before.turn,
            frame=frame,
            salt=ended.salt,
            fingerprint=ended.fingerprint,
            engine=ended.engine,
            idle_s=max(0.0, ended.started_at - before.at),
        )
        if before.turn is None or before.turn.messages is not None or not evidence.missed:
            return evidence
        # Messages here may also be those of a concurrent turn, which is not the previous one.
        just = self._unrecorded.get(_key(ended)) if before is self._last.get(_key(ended)) else None
        messages, known = just or await self._recorded(ended, before)
        return structs.replace(evidence, before=structs.replace(before.turn, messages=messages, frame=known))

    async def _recorded(
        self, ended: TurnContext, before: _Before
    ) -> tuple[Sequence[Message] | None, dict[str, Any] | None]:
        """The conversation after the previous turn; None if that is not known any more."""
        session: Session | None = ended.match.session
        if before.at > ended.match.session.last_active_at:
            session = await self._store.session(*_key(ended))
        if session is None or session.transcript is None or session.last_active_at > ended.started_at:
            return None, None
        # A concurrent turn may have replaced the transcript; then nothing is known.
        messages = await self._store.messages(session.transcript) or None
        return messages, dict(await self._store.frame(session.frame)) if session.frame and messages else None


def _key(ended: TurnContext) -> tuple[str, str]:
    return ended.match.session.tenant, ended.match.session.id


def _previous_turn(session: Session) -> PreviousTurn | None:
    """The session's last turn, or the window that it was thawed from."""
    if not session.token_count:
        return None
    return PreviousTurn(
        tokens=session.token_count,
        prompt=session.prompt_tokens or session.token_count,
        salt=session.salt,
        fingerprint=session.fingerprint,
        engine=session.engine,
    )

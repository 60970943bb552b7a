"""What is to be learned from a finished turn, before it is recorded: was its prompt estimated well, and did it hit?

Runs in the turns task. What came before is read from the store only if fewer tokens were found than expected.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway import misses
from gateway.dialects.contract import Call
from gateway.misses import Evidence, Left
from gateway.records import Message, Session, Turn, Usage
from gateway.store.contract import Finished, Store
from gateway.tokens import Estimator

_ENDS = 4096
_USUAL_CHUNK = 256  # LMCache's own default, where the cache has not said yet, or there is none


@dataclass(frozen=True, slots=True)
class _Before:
    """A session as a turn found it; `messages` and `frame` where they need not be read from the store."""

    session: Session
    messages: Sequence[Message] | None = None
    frame: Mapping[str, Any] | None = None


class Reviews:
    """Looks at finished turns. `chunk_size` gives the cache's, 0 where it is not known."""

    def __init__(self, store: Store, estimator: Estimator, chunk_size: Callable[[], int]) -> None:
        self._store = store
        self._estimator = estimator
        self._chunk_size = chunk_size
        self._unrecorded: dict[tuple[str, str], _Before] = {}
        self._ends: dict[tuple[str, str], float] = {}  # when the last turns of sessions were over

    async def of(self, finished: Finished, call: Call) -> Finished:
        """Return the turn with its estimate and the verdict on what it found in the cache."""
        turn = finished.turn
        if turn.usage is None or not call.messages:
            return finished
        before = await self._before(finished.session, turn)
        estimate = self._estimator.ahead(turn.model, before.session.token_count, call.whole, call.whole_frame)
        self._estimator.observe(turn.model, estimate, turn.usage.prompt)
        miss = misses.why(await self._evidence(finished, call, before, turn.usage))
        if finished.messages is not None:
            self._keep(_after(finished, turn.usage))
        reviewed = replace(turn, estimated_tokens=estimate.tokens, expected_tokens=miss.expected, miss=str(miss))
        return replace(finished, turn=reviewed)

    def recorded(self) -> None:
        """All that was looked at is in the store now."""
        self._unrecorded.clear()

    def _keep(self, after: _Before) -> None:
        key = after.session.tenant, after.session.id
        self._unrecorded[key] = after
        if len(self._ends) >= _ENDS:
            self._ends.clear()
        self._ends[key] = after.session.last_active_at

    async def _before(self, session: Session, turn: Turn) -> _Before:
        """What the turn found. When its session was read, the turn before may not have been recorded yet."""
        key = turn.tenant, turn.session_id
        if self._ends.get(key, 0.0) <= session.last_active_at:
            return _Before(session)
        just = self._unrecorded.get(key)
        if just is not None and just.session.last_active_at <= turn.started_at:
            return just
        now = await self._store.session(turn.tenant, turn.session_id)
        return _Before(now if now is not None and now.last_active_at <= turn.started_at else session)

    async def _evidence(self, finished: Finished, call: Call, before: _Before, usage: Usage) -> Evidence:
        session, turn = before.session, finished.turn
        evidence = Evidence(
            prompt=usage.prompt,
            cached=usage.cached,
            chunk_size=self._chunk_size() or _USUAL_CHUNK,
            messages=call.whole,
            before=_left(before),
            frame=call.whole_frame,
            salt=finished.salt,
            fingerprint=finished.fingerprint,
            engine=turn.engine,
            idle_s=max(0.0, turn.started_at - session.last_active_at),
        )
        left = evidence.before
        if left is None or left.messages is not None or session.transcript is None or not evidence.missed:
            return evidence
        # A turn that ran beside this one may have taken the transcript away; then nothing is said of it.
        messages = await self._store.messages(session.transcript) or None
        frame = await self._store.frame(session.frame) if session.frame and messages else None
        return replace(evidence, before=replace(left, messages=messages, frame=frame))


def _left(before: _Before) -> Left | None:
    """What the session's last turn left, or the window that it is thawed from."""
    session = before.session
    if not session.token_count:
        return None
    return Left(
        tokens=session.token_count,
        prompt=session.prompt_tokens or session.token_count,
        messages=before.messages,
        frame=before.frame,
        salt=session.salt,
        fingerprint=session.fingerprint,
        engine=session.engine,
    )


def _after(finished: Finished, usage: Usage) -> _Before:
    """The session as the next turn will find it."""
    turn = finished.turn
    session = replace(
        finished.session,
        token_count=usage.prompt + usage.completion,
        prompt_tokens=usage.prompt,
        salt=finished.salt,
        fingerprint=finished.fingerprint,
        engine=turn.engine,
        last_active_at=turn.started_at + turn.duration_ms / 1000,
    )
    return _Before(session, finished.messages, finished.frame)

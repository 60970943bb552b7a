"""What is to be learned from a finished turn, before it is recorded: was its prompt estimated well, and did it hit?

Runs in the turns task. What came before is read from the store only if fewer tokens were found than expected.
"""

from collections.abc import Callable
from dataclasses import replace

from gateway import misses
from gateway.dialects.contract import Call
from gateway.misses import Evidence, Left
from gateway.records import Session, Turn, Usage
from gateway.store.contract import Finished, Store
from gateway.tokens import Estimator

_USUAL_CHUNK = 256  # LMCache's own default, where the cache has not said yet, or there is none


class Reviews:
    """Looks at finished turns. `chunk_size` gives the cache's, 0 where it is not known."""

    def __init__(self, store: Store, estimator: Estimator, chunk_size: Callable[[], int]) -> None:
        self._store = store
        self._estimator = estimator
        self._chunk_size = chunk_size

    async def of(self, finished: Finished, call: Call) -> Finished:
        """Return the turn with its estimate and the verdict on what it found in the cache."""
        turn = finished.turn
        if turn.usage is None or not call.messages:
            return finished
        session = await self._before(finished.session, turn)
        estimate = self._estimator.ahead(turn.model, session.token_count, call.whole, call.whole_frame)
        self._estimator.observe(turn.model, estimate, turn.usage.prompt)
        miss = misses.why(await self._evidence(finished, call, session, turn.usage))
        reviewed = replace(turn, estimated_tokens=estimate.tokens, expected_tokens=miss.expected, miss=str(miss))
        return replace(finished, turn=reviewed)

    async def _before(self, session: Session, turn: Turn) -> Session:
        """The session as the turn found it: when it was read, the turn before may not have been recorded yet."""
        now = await self._store.session(session.tenant, session.id)
        return now if now is not None and now.last_active_at <= turn.started_at else session

    async def _evidence(self, finished: Finished, call: Call, session: Session, usage: Usage) -> Evidence:
        evidence = Evidence(
            prompt=usage.prompt,
            cached=usage.cached,
            chunk_size=self._chunk_size() or _USUAL_CHUNK,
            messages=call.whole,
            before=_left(session),
            frame=call.whole_frame,
            salt=finished.salt,
            fingerprint=finished.fingerprint,
            engine=finished.turn.engine,
            idle_s=max(0.0, finished.turn.started_at - session.last_active_at),
        )
        if evidence.before is None or session.transcript is None or not evidence.missed:
            return evidence
        # A turn that ran beside this one may have taken the transcript away; then nothing is said of it.
        messages = await self._store.messages(session.transcript) or None
        frame = await self._store.frame(session.frame) if session.frame and messages else None
        return replace(evidence, before=replace(evidence.before, messages=messages, frame=frame))


def _left(session: Session) -> Left | None:
    """What the session's last turn left, or the window that it is thawed from."""
    if session.transcript is None or not session.token_count:
        return None
    return Left(
        tokens=session.token_count,
        prompt=session.prompt_tokens or session.token_count,
        salt=session.salt,
        fingerprint=session.fingerprint,
        engine=session.engine,
    )

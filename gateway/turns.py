"""Finished turns, off the request path: one bounded queue, one task, one transaction for whatever waits.

A turn is put here exactly once, whether it completed, failed or was abandoned. Parsing the recorded reply happens
here too: on the path its bytes were only kept.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from gateway import identity
from gateway.dialects.contract import Call, Dialect, Reply
from gateway.errors import GatewayError
from gateway.inflight import TurnLocks
from gateway.records import Message, Outcome, StoredResponse, Trace, Turn
from gateway.reviews import Reviews
from gateway.sessions import Place, Sessions
from gateway.store.contract import Finished, Store
from gateway.telemetry import Telemetry

log = logging.getLogger(__name__)

_TURNS_PER_RECORD = 256
# A turn that is recorded alone costs six times one of a burst (a commit, and threads that hand over to each other), and
# the next request pays for it.
_GATHER_S = 0.02
_OTHERS_S = 1.0  # far more than another worker needs for turns that are over: `_GATHER_S`, and a commit
_POLL_S = 0.005
_READ_AT_ONCE = 4  # replies read before streams have their turn again
_STOP_S = 10.0
_NO_MISSES = frozenset({"", "none", "first-turn", "shorter-than-chunk"})  # nothing could have been found


@dataclass(frozen=True, slots=True)
class Ended:
    """What the relay knows of a turn when it is over. `chunks` is None when the reply was too large to keep."""

    place: Place
    fingerprint: str
    salt: str
    dialect: Dialect
    call: Call
    outcome: Outcome
    status: int
    started_at: float
    duration_ms: float
    streamed: bool
    chunks: Sequence[bytes] | None
    detail: str = ""
    engine: str = ""
    overhead_s: float = 0.0  # our own work before the engine was asked
    normalised: tuple[str, ...] = ()  # rules that took something from the front of the prompt


class Turns:
    """Takes finished turns to the store."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        reviews: Reviews,
        telemetry: Telemetry,
        locks: TurnLocks | None,
        *,
        room: int,
    ) -> None:
        self._store = store
        self._reviews = reviews
        self._sessions = sessions
        self._telemetry = telemetry
        self._locks = locks
        self._batch = 0  # that of the turns which are over now, where there are other workers
        self._batch_is_told = False
        self._queue: asyncio.Queue[Ended] = asyncio.Queue()
        self._recorded = 0  # turns that have left the queue, ever
        self._finished = 0  # turns that have entered it
        self._progress = asyncio.Condition()
        self._hurry = asyncio.Event()  # somebody waits for the record
        self._room = asyncio.Semaphore(room)
        self._on_recorded: Callable[[str, str], None] = lambda tenant, session_id: None

    async def __aenter__(self) -> "Turns":
        self._task = asyncio.create_task(self._run(), name="turns")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hurry.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await self._queue.join()
        if self._queue.qsize():
            log.error("%d finished turns were not recorded: the store did not take them", self._queue.qsize())
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def watch(self, on_recorded: Callable[[str, str], None]) -> None:
        """Have `on_recorded` called with tenant and session of each turn that is recorded; it must not wait."""
        self._on_recorded = on_recorded

    async def enter(self, place: Place) -> None:
        """A turn begins; waits while too many finished ones are still unrecorded."""
        await self._room.acquire()
        self._sessions.enter(place)

    def finish(self, ended: Ended) -> None:
        """A turn is over. Never waits, so it may be called from a cancelled request's clean-up."""
        self._finished += 1
        if self._locks and not self._batch_is_told:
            self._locks.over(self._batch)
            self._batch_is_told = True
        self._queue.put_nowait(ended)

    async def settle(self) -> None:
        """Return when every turn that is over by now has been recorded: who has read a reply, finds its turn.

        That goes for the turns of other workers too, unless one of them does not get on.
        """
        theirs = self._locks.over_elsewhere() if self._locks else set()
        goal = self._finished
        if self._recorded < goal:
            self._hurry.set()
        async with self._progress:
            await self._progress.wait_for(lambda: self._recorded >= goal)
        if self._locks and theirs:
            await _recorded_elsewhere(self._locks, theirs)

    @property
    def unrecorded(self) -> int:
        """Turns that are over and wait for the store."""
        return self._finished - self._recorded

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await self._gather()
            while len(batch) < _TURNS_PER_RECORD and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            closed = self._close_batch()
            finished = [await self._reviewed(*one) async for one in _all(batch)]
            await self._record(finished)
            self._reviews.recorded()
            for ended, one in zip(batch, finished, strict=True):
                self._count(ended, one)
                self._sessions.leave(ended.place)
                self._on_recorded(one.turn.tenant, one.turn.session_id)
                self._room.release()
                self._queue.task_done()
            if self._locks and closed is not None:
                self._locks.recorded(closed)
            async with self._progress:
                self._recorded += len(batch)
                self._progress.notify_all()

    def _count(self, ended: Ended, finished: Finished) -> None:
        turn = finished.turn
        self._telemetry.turn(turn, ended.dialect.name, ended.overhead_s, served=bool(ended.fingerprint))
        reason, _, _ = turn.miss.partition(":")
        if reason not in _NO_MISSES:
            self._telemetry.missed(reason)

    def _close_batch(self) -> int | None:
        """End the batch that others know of, unless turns of it still wait in the queue; return which it was."""
        if not self._locks or self._queue.qsize():
            return None
        self._batch, self._batch_is_told, closed = self._batch + 1, False, self._batch
        return closed

    async def _gather(self) -> None:
        """Wait a moment for more turns, unless enough are there or somebody is waiting for one."""
        if self._queue.qsize() < _TURNS_PER_RECORD:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self._hurry.wait()
        self._hurry.clear()

    async def _reviewed(self, ended: Ended, finished: Finished) -> Finished:
        try:
            return await self._reviews.of(finished, ended.call)
        except Exception:
            # What it came after may be taken away at any time, and no review is worth a turn.
            log.exception("could not review a turn of session %s", ended.place.session.id)
            return finished

    async def _record(self, finished: list[Finished]) -> None:
        try:
            await self._store.record(finished)
        except Exception:
            if len(finished) > 1:
                for one in finished:  # one that cannot be recorded must not cost the others
                    await self._record([one])
                return
            (one,) = finished
            log.exception("could not record a turn of session %s", one.turn.session_id)
            if one.messages is not None or one.response:  # perhaps it is the transcript: the turn was, all the same
                turn = replace(one.turn, detail="the transcript could not be kept")
                await self._record([replace(one, turn=turn, messages=None, response=None)])


async def _recorded_elsewhere(locks: TurnLocks, turns: set[int]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_OTHERS_S):
            while turns & locks.over_elsewhere():  # noqa: ASYNC110 - the kernel wakes no task
                await asyncio.sleep(_POLL_S)


async def _all(batch: Sequence[Ended]) -> AsyncIterator[tuple[Ended, Finished]]:
    for number, ended in enumerate(batch, 1):
        yield ended, _finished(ended)
        if number % _READ_AT_ONCE == 0:
            await asyncio.sleep(0)


def _finished(ended: Ended) -> Finished:
    session, whole = ended.place.session, ended.call.whole if ended.call.messages else []
    try:
        reply = _reply(ended)
        # Without the reply the next turn's prompt is not known, so the transcript stays where it was.
        messages = ended.call.followed_by(reply.message) if reply.message and ended.call.messages else None
    except Exception:
        # An engine may send anything; one odd reply must not cost the other turns of the batch.
        log.exception("could not read a reply of session %s", session.id)
        reply, messages = Reply(None, None, "the reply could not be read"), None
    turn = Turn(
        tenant=session.tenant,
        session_id=session.id,
        model=ended.call.model,
        outcome="engine_error" if reply.error else "completed" if reply.message else ended.outcome,
        status=ended.status,
        started_at=ended.started_at,
        duration_ms=ended.duration_ms,
        usage=reply.usage,
        detail=ended.detail or reply.error,
        source=ended.place.source,
        engine=ended.engine,
    )
    response = _response(ended, whole, reply)
    return Finished(
        turn=turn,
        session=session,
        fingerprint=ended.fingerprint,
        salt=ended.salt,
        messages=messages,
        frame=ended.call.whole_frame,
        trace=_trace(ended, whole, reply),
        normalised=" ".join(ended.normalised),
        response=response,
        asked=ended.call.storage.items if ended.call.storage and response else (),
    )


def _response(ended: Ended, whole: Sequence[Message], reply: Reply) -> StoredResponse | None:
    """The answer to keep, where its API keeps answers and the client did not say otherwise."""
    storage, answer, session = ended.call.storage, reply.answer, ended.place.session
    if storage is None or not storage.keep or answer is None or not isinstance(answer.get("id"), str):
        return None
    return StoredResponse(
        tenant=session.tenant,
        id=answer["id"],
        session_id=session.id,
        lineage=session.lineage,
        created_at=ended.started_at,
        answer={**answer, "previous_response_id": storage.previous, "store": True},
        instructed=whole[:1] == [{"role": "system", "content": storage.instructions}],
    )


def _trace(ended: Ended, whole: Sequence[Message], reply: Reply) -> Trace:
    try:
        return identity.trace(ended.place.seed, whole, reply.message, ended.place.asked, ended.place.roots)
    except GatewayError:
        # Who names the session need not send messages that can be told apart.
        return Trace(b"", b"", None)


def _reply(ended: Ended) -> Reply:
    if ended.chunks is None or ended.outcome not in ("completed", "client_gone"):
        return Reply(None, None)
    if ended.outcome == "completed":
        return ended.dialect.reply(ended.chunks, streamed=ended.streamed)
    # Codex closes the connection at the last event, before the stream has ended: it has had its answer.
    reply = ended.dialect.reply(ended.chunks, streamed=True) if ended.streamed else Reply(None, None)
    return reply if reply.message and not reply.error else Reply(None, None)

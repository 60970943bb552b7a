"""Record finished turns off the request path: one bounded queue, one task, one transaction per batch.

A turn is put here exactly once, whether it completed, failed or was abandoned. Parsing the recorded reply happens
here too: on the path its bytes were only kept.

While the store cannot be written (a full disk), finished turns wait in memory and are tried again, and no new turn
begins: what was answered is recorded, and what could not be recorded is not answered.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from gateway.errors import GatewayError
from gateway.metrics import Metrics
from gateway.runtime.offload import Offload
from gateway.sessions import completed_turn
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.cache_review import CacheReviewer
from gateway.sessions.completed_turn import ParsedTurn, Review
from gateway.sessions.in_flight import TurnLocks
from gateway.sessions.turn_context import TurnContext
from gateway.store.store import Store
from gateway.store.types import StoreUnavailable, TurnRecord

log = logging.getLogger(__name__)

_TURNS_PER_RECORD = 256
# A turn that is recorded alone costs six times one of a burst (a commit, and threads that hand over to each other), and
# the next request pays for it.
_GATHER_S = 0.02
_OTHERS_S = 1.0  # far more than an engine needs to end a stream, or another worker for `_GATHER_S` and a commit
_POLL_S = 0.005
_READ_AT_ONCE = 4  # replies read before streams have their turn again
_STOP_S = 10.0
_TRY_AGAIN_S = 0.5  # between two attempts while the store cannot be written
_COMPLAIN_EVERY_S = 60.0
_NO_MISSES = frozenset({"", "none", "first-turn", "shorter-than-chunk"})  # nothing could have been found


class TurnRecorder:
    """Takes finished turns to the store."""

    def __init__(
        self,
        store: Store,
        turns: ActiveTurns,
        reviews: CacheReviewer,
        telemetry: Metrics,
        locks: TurnLocks | None,
        *,
        room: int,
    ) -> None:
        self._store = store
        self._reviews = reviews
        self._offload = Offload()
        self._turns = turns
        self._telemetry = telemetry
        self._locks = locks
        self._batch = 0  # that of the turns which are over now, where there are other workers
        self._batch_is_told = False
        self._queue: asyncio.Queue[TurnContext] = asyncio.Queue()
        self._replied: set[TurnContext] = set()  # clients have their replies, the store has not
        self._recorded = 0  # turns that have left the queue, ever
        self._finished = 0  # turns that have entered it
        self._progress = asyncio.Condition()
        self._flush_requested = asyncio.Event()  # somebody waits for the record
        self._capacity = room
        self._trouble: StoreUnavailable | None = None  # why the store does not take turns just now
        self._complained = -_COMPLAIN_EVERY_S
        self._ending = asyncio.Event()
        self._on_recorded: Callable[[str, str], None] = lambda tenant, session_id: None

    async def __aenter__(self) -> "TurnRecorder":
        self._task = asyncio.create_task(self._run(), name="turns")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._flush_requested.set()
        self._ending.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await self._queue.join()
        if self.unrecorded:
            log.error("%d finished turns were not recorded: the store did not accept them", self.unrecorded)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def watch(self, on_recorded: Callable[[str, str], None]) -> None:
        """Have `on_recorded` called with tenant and session of each turn that is recorded; it must not wait."""
        self._on_recorded = on_recorded

    def begin(self, turn: TurnContext) -> None:
        """A turn begins. Raises `rate_limited` when too many wait for the store, `storage_full` when it takes none."""
        if (trouble := self._trouble) is not None:
            full = trouble.code == "storage_full"
            hint = "free space there, or delete windows and sessions that are not needed" if full else ""
            raise GatewayError(trouble.code, f"the turn could not be recorded: {trouble.message}", hint=hint)
        if self.unrecorded >= self._capacity:
            raise GatewayError(
                "rate_limited",
                f"{self.unrecorded} finished turns wait for the store",
                hint="try again in a moment; turn_queue sets the maximum",
            )
        self._turns.begin(turn.match)

    @property
    def trouble(self) -> str:
        """Why turns cannot be recorded just now; empty where they can."""
        return self._trouble.message if self._trouble else ""

    def mark_reply_sent(self, turn: TurnContext) -> None:
        """A client gets the last event of its reply just now; the engine has still to end the stream."""
        self._replied.add(turn)
        self._tell_others()

    def enqueue(self, turn: TurnContext) -> None:
        """A turn is over. Never waits, so it may be called from a cancelled request's clean-up."""
        self._finished += 1
        self._tell_others()
        self._queue.put_nowait(turn)

    def _tell_others(self) -> None:
        if self._locks and not self._batch_is_told:
            self._locks.mark_ended(self._batch)
            self._batch_is_told = True

    async def flush(self) -> None:
        """Return when every turn that is over by now has been recorded: who has read a reply, finds its turn.

        That goes for streams that have yet to be ended, and for the turns of other workers, unless one of those does
        not get on. While the store cannot be written nobody waits for it.
        """
        theirs = self._locks.ended_elsewhere() if self._locks else set()
        goal, replied = self._finished, self._replied.copy()
        if replied or self._recorded < goal:
            self._flush_requested.set()
        async with self._progress:
            await self._progress.wait_for(lambda: self._recorded >= goal or self._trouble is not None)
            if replied:
                try:
                    async with asyncio.timeout(_OTHERS_S):
                        await self._progress.wait_for(lambda: not replied & self._replied or self._trouble is not None)
                except TimeoutError:  # an engine that hangs: nobody waits for it again
                    self._replied -= replied
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
            closed = self._close_batch(set(batch))
            finished = [await self._to_store(turn) async for turn in _all(batch)]
            await self._record(finished)
            self._reviews.recorded()
            for turn, one in zip(batch, finished, strict=True):
                self._count(turn, one)
                self._replied.discard(turn)
                self._turns.end(turn.match)
                self._on_recorded(one.turn.tenant, one.turn.session_id)
                self._queue.task_done()
            if self._locks and closed is not None:
                self._locks.mark_recorded(closed)
            async with self._progress:
                self._recorded += len(batch)
                self._progress.notify_all()

    def _count(self, turn: TurnContext, finished: TurnRecord) -> None:
        self._telemetry.count_turn(finished.turn, turn.dialect.name, turn.overhead_s, served=bool(turn.fingerprint))
        reason, _, _ = finished.turn.miss.partition(":")
        if reason not in _NO_MISSES:
            self._telemetry.count_miss(reason)

    def _close_batch(self, taken: set[TurnContext]) -> int | None:
        """End the batch that others know of, unless turns of it are still to come; return which it was."""
        if not self._locks or self._queue.qsize() or self._replied - taken:
            return None
        self._batch, self._batch_is_told, closed = self._batch + 1, False, self._batch
        return closed

    async def _gather(self) -> None:
        """Wait a moment for more turns, unless enough are there or somebody is waiting for one."""
        if self._queue.qsize() < _TURNS_PER_RECORD:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self._flush_requested.wait()
        self._flush_requested.clear()

    async def _to_store(self, turn: TurnContext) -> TurnRecord:
        """What the store is to keep of a turn; a large one is read and hashed beside the event loop."""
        if not turn.heavy:
            parsed = completed_turn.parse(turn)
            return completed_turn.to_record(parsed, await self._review(parsed))
        parsed = await self._offload.run(True, completed_turn.parse, turn)
        return await self._offload.run(True, completed_turn.to_record, parsed, await self._review(parsed))

    async def _review(self, turn: ParsedTurn) -> Review:
        try:
            return await self._reviews.review(turn)
        except Exception:
            # What it came after may be taken away at any time, and no review is worth a turn.
            log.exception("could not review a turn of session %s", turn.turn.match.session.id)
            return Review()

    async def _record(self, finished: list[TurnRecord]) -> None:
        try:
            await self._record_when_possible(finished)
        except Exception:
            if len(finished) > 1:
                for one in finished:  # one that cannot be recorded must not cost the others
                    await self._record([one])
                return
            (one,) = finished
            if self._may_complain():
                log.exception("could not record a turn of session %s", one.turn.session_id)
            if one.messages is None and not one.response:
                self._telemetry.count_lost_turn()
                return
            # Perhaps it is the transcript that cannot be kept: the turn was, all the same.
            turn = replace(one.turn, detail="the transcript could not be kept")
            await self._record([replace(one, turn=turn, messages=None, response=None)])

    async def _record_when_possible(self, finished: list[TurnRecord]) -> None:
        """Record turns, however long it takes until the store can be written."""
        while True:
            try:
                await self._store.record(finished, last=self._ending.is_set())
            except StoreUnavailable as error:
                await self._set_trouble(error)
            else:
                await self._set_trouble(None)
                return
            await self._wait_to_try_again()

    async def _wait_to_try_again(self) -> None:
        if self._ending.is_set():
            await asyncio.sleep(_TRY_AGAIN_S)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_TRY_AGAIN_S):
                await self._ending.wait()

    async def _set_trouble(self, error: StoreUnavailable | None) -> None:
        if error is None and self._trouble is None:
            return
        if error is None:
            log.warning("turns are recorded again")
        elif self._trouble is None:
            log.error("turns cannot be recorded, and new ones are refused until they can: %s", error.message)
        self._trouble = error
        async with self._progress:
            self._progress.notify_all()

    def _may_complain(self) -> bool:
        """Whether the last complaint is a while ago: what one turn fails for, many may."""
        now = time.monotonic()
        if now - self._complained < _COMPLAIN_EVERY_S:
            return False
        self._complained = now
        return True


async def _recorded_elsewhere(locks: TurnLocks, turns: set[int]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_OTHERS_S):
            while turns & locks.ended_elsewhere():  # noqa: ASYNC110 - the kernel wakes no task
                await asyncio.sleep(_POLL_S)


async def _all(batch: Sequence[TurnContext]) -> AsyncIterator[TurnContext]:
    for number, one in enumerate(batch, 1):
        yield one
        if number % _READ_AT_ONCE == 0:
            await asyncio.sleep(0)

"""Record finished turns off the request path: one bounded queue, one task, one transaction per batch.

Every turn gets here exactly once, whether it completed, failed or was abandoned. Its reply is parsed here too; the
request path only keeps the bytes.

While the store cannot be written (a full disk), finished turns wait in memory and are retried, and new turns are
refused: the gateway answers only turns that it can record.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from msgspec import structs

from gateway.errors import GatewayError
from gateway.runtime.offload import Offload
from gateway.sessions import completed_turn, turn_spans
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.cache_review import CacheReviewer
from gateway.sessions.completed_turn import ParsedTurn, Review
from gateway.sessions.in_flight import TurnsElsewhere
from gateway.sessions.turn_context import TurnContext
from gateway.store.store import Store
from gateway.store.types import StoreUnavailable, TurnRecord
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.trace_context import Span
from gateway.telemetry.traces import Traces

log = logging.getLogger(__name__)

_NONE: Collection[int] = frozenset()
OnRecorded = Callable[[str, str, Span | None], None]

_TURNS_PER_RECORD = 256
# A turn that is recorded alone costs six times one of a burst (a commit, and switches between threads), and the next
# request pays for it.
_GATHER_S = 0.03
_OTHERS_S = 1.0  # far more than an engine needs to end a stream, or another worker for `_GATHER_S` and a commit
_POLL_S = 0.005
_PARSED_AT_ONCE = 4  # replies that are parsed before the event loop serves streams again
_STOP_S = 10.0
_RETRY_S = 0.5  # between two attempts while the store cannot be written
_LOG_EVERY_S = 60.0
_NOT_MISSES = frozenset({"", "none", "first-turn", "shorter-than-chunk"})  # nothing could have been found


class TurnRecorder:
    """Records finished turns in the store. At most `max_pending` may wait for it."""

    def __init__(
        self,
        store: Store,
        turns: ActiveTurns,
        reviews: CacheReviewer,
        telemetry: Metrics,
        elsewhere: TurnsElsewhere | None,
        traces: Traces,
        *,
        max_pending: int,
    ) -> None:
        self._store = store
        self._reviews = reviews
        self._offload = Offload()
        self._turns = turns
        self._telemetry = telemetry
        self._elsewhere = elsewhere
        self._traces = traces
        self._batch = 0  # the number of the batch that turns which end now belong to, for the other workers
        self._batch_is_marked = False
        self._queue: asyncio.Queue[TurnContext] = asyncio.Queue()
        self._replied: set[TurnContext] = set()  # clients have the replies, the store has not
        self._recorded = 0  # turns that have left the queue, ever
        self._finished = 0  # turns that have entered it
        self._progress = asyncio.Condition()
        self._flush_requested = asyncio.Event()
        self._max_pending = max_pending
        self._trouble: StoreUnavailable | None = None  # why the store does not accept turns
        self._logged = -_LOG_EVERY_S
        self._ending = asyncio.Event()
        self._on_recorded: OnRecorded = lambda tenant, session_id, span: None

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

    def watch(self, on_recorded: OnRecorded) -> None:
        """Call `on_recorded` with tenant, session and span of each recorded turn; it must not block."""
        self._on_recorded = on_recorded

    def begin(self, turn: TurnContext) -> None:
        """A turn begins. Raises `rate_limited` if too many wait for the store, `storage_full` if it accepts none."""
        if (trouble := self._trouble) is not None:
            full = trouble.code == "storage_full"
            hint = "free space there, or delete windows and sessions that are not needed" if full else ""
            raise GatewayError(trouble.code, f"no new turns: they could not be recorded: {trouble.message}", hint=hint)
        if self.unrecorded >= self._max_pending:
            raise GatewayError(
                "rate_limited",
                f"too many finished turns ({self.unrecorded}) wait for the store",
                hint="try again in a moment; turn_queue sets the maximum",
            )
        self._turns.begin(turn.match)

    @property
    def trouble(self) -> str:
        """Why turns cannot be recorded; empty if they can."""
        return self._trouble.message if self._trouble else ""

    def mark_reply_sent(self, turn: TurnContext) -> None:
        """A client gets the last event of its reply; the engine has yet to end the stream."""
        self._replied.add(turn)
        self._mark_batch()

    def enqueue(self, turn: TurnContext) -> None:
        """A turn is over. Never waits, so it may be called from a cancelled request's clean-up."""
        self._finished += 1
        self._mark_batch()
        self._queue.put_nowait(turn)

    def _mark_batch(self) -> None:
        if self._elsewhere is not None and not self._batch_is_marked:
            self._elsewhere.mark_ended(self._batch)
            self._batch_is_marked = True

    async def flush(self) -> None:
        """Wait until all turns that are over by now are recorded: a client that has read a reply finds its turn.

        Streams that the engine has yet to end count, and turns of other workers; both are waited for at most 1 s. Does
        not wait while the store cannot be written.
        """
        theirs = _NONE if self._elsewhere is None else await self._elsewhere.ended()
        goal, replied = self._finished, self._replied.copy()
        if replied or self._recorded < goal:
            self._flush_requested.set()
        async with self._progress:
            await self._progress.wait_for(lambda: self._recorded >= goal or self._trouble is not None)
            if replied:
                try:
                    async with asyncio.timeout(_OTHERS_S):
                        await self._progress.wait_for(lambda: not replied & self._replied or self._trouble is not None)
                except TimeoutError:  # an engine that hangs: it is not waited for again
                    self._replied -= replied
        if self._elsewhere is not None and theirs:
            await _recorded_elsewhere(self._elsewhere, theirs)

    @property
    def unrecorded(self) -> int:
        """The number of turns that are over and wait for the store."""
        return self._finished - self._recorded

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await self._gather()
            while len(batch) < _TURNS_PER_RECORD and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            closed = self._close_batch(set(batch))
            finished = []
            for number, turn in enumerate(batch, 1):
                finished.append(await self._to_record(turn))
                if number % _PARSED_AT_ONCE == 0:
                    await asyncio.sleep(0)
            await self._record(finished)
            self._reviews.recorded()
            for turn, one in zip(batch, finished, strict=True):
                self._count(turn, one)
                self._replied.discard(turn)
                self._turns.end(turn.match)
                self._on_recorded(one.turn.tenant, one.turn.session_id, turn.span)
                self._queue.task_done()
            if self._elsewhere is not None and closed is not None:
                self._elsewhere.mark_recorded(closed)
            async with self._progress:
                self._recorded += len(batch)
                self._progress.notify_all()

    def _count(self, turn: TurnContext, finished: TurnRecord) -> None:
        self._telemetry.count_turn(finished.turn, turn.dialect.name, turn.overhead_s, served=bool(turn.fingerprint))
        reason, _, _ = finished.turn.miss.partition(":")
        if reason not in _NOT_MISSES:
            self._telemetry.count_miss(reason)
        if turn.span is not None:
            try:
                turn_spans.record(self._traces, turn, turn.span, finished.turn)
            except Exception:  # the turns of a batch must be recorded, whatever becomes of their spans
                log.exception("could not make the spans of a turn of session %s", finished.turn.session_id)

    def _close_batch(self, taken: set[TurnContext]) -> int | None:
        """End the batch that other workers see and return its number; None if turns of it are yet to come."""
        if self._elsewhere is None or self._queue.qsize() or self._replied - taken:
            return None
        self._batch, self._batch_is_marked, closed = self._batch + 1, False, self._batch
        return closed

    async def _gather(self) -> None:
        """Wait a moment for more turns, unless there are enough or a flush is requested."""
        if self._queue.qsize() < _TURNS_PER_RECORD:
            timer = asyncio.get_running_loop().call_later(_GATHER_S, self._flush_requested.set)
            await self._flush_requested.wait()
            timer.cancel()
        self._flush_requested.clear()

    async def _to_record(self, turn: TurnContext) -> TurnRecord:
        """The record of a turn; a large one is parsed and hashed in a thread."""
        heavy = turn.heavy
        parsed = await self._offload.run(heavy, completed_turn.parse, turn)
        review = await self._review(parsed, heavy=heavy)
        return await self._offload.run(heavy, completed_turn.to_record, parsed, review)

    async def _review(self, turn: ParsedTurn, *, heavy: bool) -> Review:
        try:
            return await self._reviews.review(turn, heavy=heavy)
        except Exception:
            # The turn before may be deleted at any time, and a turn matters more than its review.
            log.exception("could not review a turn of session %s", turn.turn.match.session.id)
            return Review()

    async def _record(self, finished: list[TurnRecord]) -> None:
        try:
            await self._record_when_possible(finished)
        except Exception:
            if len(finished) > 1:
                for one in finished:  # one that cannot be recorded must not affect the others
                    await self._record([one])
                return
            (one,) = finished
            if self._should_log():
                log.exception("could not record a turn of session %s", one.turn.session_id)
            if one.messages is None and not one.response:
                self._telemetry.count_lost_turn()
                return
            # Perhaps only the transcript cannot be stored.
            turn = structs.replace(one.turn, detail="the transcript could not be kept")
            await self._record([structs.replace(one, turn=turn, messages=None, response=None)])

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
            if self._ending.is_set():
                await asyncio.sleep(_RETRY_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
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

    def _should_log(self) -> bool:
        """Whether the last error was logged a while ago: many turns may fail for one reason."""
        now = time.monotonic()
        if now - self._logged < _LOG_EVERY_S:
            return False
        self._logged = now
        return True


async def _recorded_elsewhere(elsewhere: TurnsElsewhere, turns: Collection[int]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_OTHERS_S):
            while not set(turns).isdisjoint(await elsewhere.ended()):  # noqa: ASYNC110 - other processes wake no task
                await asyncio.sleep(_POLL_S)

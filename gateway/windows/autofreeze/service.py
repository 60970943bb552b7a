"""Automatic freezing: recorded turns and a sweep -> observations -> policies -> windows.freeze, in the background.

Every worker checks every session; a claim in the store lets only one of them freeze it. Sessions to freeze wait in a
short queue: the sweep waits for a free place, a turn does not, and what it leaves out the sweep finds later.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import GatewayError, StartError
from gateway.records import Session, Window
from gateway.store.types import FreezeCandidate
from gateway.telemetry import genai
from gateway.telemetry.trace_context import Span
from gateway.telemetry.traces import clean
from gateway.windows.autofreeze import rules
from gateway.windows.autofreeze.policy_runner import NamedPolicy, Opinion, PolicyRunner
from gateway.windows.autofreeze.rules import Rules
from gateway.windows.context import OperationContext, Services
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming, freeze_automatically
from policies.contract import Event, Observation

log = logging.getLogger(__name__)

_AT_ONCE = 2  # freezes of this process: each has the engine compute a tail, and requests come first
_MAX_DUE = 256  # sessions that wait for them
_MAX_TOUCHED = 4096  # sessions whose turns were recorded and that were not checked yet
_GATHER_S = 0.1
_PAGE = 256
_HORIZON_S = 7 * 86400.0  # older sessions were checked before; their KV is not worth a prefill now
_CLAIM_S = 300.0  # more than a freeze takes; a claim outlives only a worker that was killed
_FIRST_RETRY_S, _LAST_RETRY_S = 30.0, 3600.0
_PAUSE_FACTOR = 20  # seconds of pause after a sweep that took one

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Check:
    """What the policies decide about a session now, and the window that would result."""

    observation: Observation
    opinions: Sequence[Opinion]
    window_name: str
    held_back: str


class AutofreezeService:
    """Opened last and closed first: while it closes, all other services still work."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._runner = PolicyRunner()
        self._stored: str | None = None  # rules set at run time
        self._configured = rules.from_settings(services.settings)
        self._touched: set[Key] = set()
        self._causes: dict[Key, Span] = {}  # of the last turns that were traced
        self._has_touched = asyncio.Event()
        self._due: asyncio.Queue[tuple[FreezeCandidate, str]] = asyncio.Queue(_MAX_DUE)
        self._pending: set[Key] = set()  # in that queue, or being frozen
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    async def __aenter__(self) -> "AutofreezeService":
        """Raises StartError if a policy in the settings cannot be created."""
        try:
            self._set(self._configured)
        except GatewayError as error:
            raise StartError(f"setting auto_freeze_policies: {error.message}") from error
        await self._reload()
        self._services.recorder.watch(self._touch)
        jobs = [self._sweep, self._check_touched, *[self._freeze_due] * _AT_ONCE]
        self._tasks = [asyncio.create_task(self._repeat(job), name="autofreeze") for job in jobs]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Freeze what the policies decide at shutdown, within `shutdown_freeze_s`."""
        self._ending = True
        sweep, touched, *freezers = self._tasks
        await _stop([sweep, touched])
        timeout_s = self._services.settings.shutdown_freeze_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._finish()
        except TimeoutError:
            log.warning("not every session was frozen at shutdown: shutdown_freeze_s (%g s) ran out", timeout_s)
        await _stop(freezers)

    async def _finish(self) -> None:
        if self._rules.enabled:
            await self._services.recorder.flush()
            await self._freeze_all("shutdown")
        await self._due.join()

    async def _repeat(self, job: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await job()
            except Exception:  # of the store, for example
                log.exception("automatic freezing failed")
                await asyncio.sleep(self._services.settings.auto_freeze_every_s)

    # The rules.

    async def current(self) -> tuple[Rules, Mapping[str, Any]]:
        """The rules, and the fields that were set at run time."""
        await self._reload()
        return self._rules, orjson.loads(self._stored or "{}")

    async def change(self, changes: Mapping[str, Any]) -> list[str]:
        """Set fields of the rules, for all workers and after a restart. Raises `invalid_request`. Returns warnings."""
        _, before = await self.current()
        after = {**before, **changes}
        changed = rules.with_changes(self._configured, after)
        rules.build_policies(changed, self._custom_policies)
        limits, warnings = await self._limits()
        rules.check_limits(changed, limits)
        await self._services.store.set_auto_freeze(orjson.dumps(after).decode())
        await self._reload()
        return warnings

    async def reset(self) -> None:
        """Discard the rules set at run time: the settings apply again."""
        await self._services.store.set_auto_freeze(None)
        await self._reload()

    @property
    def _custom_policies(self) -> tuple[str, ...]:
        return self._services.settings.auto_freeze_policies

    async def _limits(self) -> tuple[dict[str, int], list[str]]:
        try:
            models = await self._services.engines.models()
        except GatewayError as error:
            return {}, [f"{error.message}: thresholds were not compared with the models' context limits"]
        return {name: model.context_limit for name, model in models.items() if model.context_limit}, []

    async def _reload(self) -> None:
        """Apply the rules that any worker has set."""
        text = await self._services.store.auto_freeze()
        if text == self._stored:
            return
        self._stored = text
        try:
            self._set(rules.with_changes(self._configured, orjson.loads(text or "{}")))
        except GatewayError as error:  # a custom policy is not listed any more
            log.warning("the rules of automatic freezing set at run time are invalid: %s; the settings apply", error)
            self._set(self._configured)

    def _set(self, new: Rules) -> None:
        self._policies: list[NamedPolicy] = rules.build_policies(new, self._custom_policies)
        self._rules = new

    # Checking.

    async def preview(self, tenant: str, session_id: str) -> Check | None:
        """Evaluate the policies for a session, and change nothing. None: there is no such session."""
        await self._reload()
        await self._services.recorder.flush()
        rows = await self._services.store.freeze_candidates([(tenant, session_id)])
        if not rows:
            return None
        now = time.time()
        observation = self._observation(rows[0], "sweep", now)
        opinions = await self._runner.opinions(self._policies, observation)
        return Check(observation, opinions, self._window_name(rows[0].session), self._held_back(rows[0], now))

    def _held_back(self, row: FreezeCandidate, now: float) -> str:
        if not self._rules.enabled:
            return "automatic freezing is off"
        if row.session.transcript is None:
            return "it has no finished turn yet"
        if row.session.state != "active":
            return f"it is {row.session.state} and has not continued since"
        if self._is_too_short(row.session):
            return f"it is shorter than one chunk ({self._chunk_size} tokens): a window of it would hold no KV"
        if self._must_wait(row, now):
            reason = f"its last freeze failed, {row.failures} in a row" if row.failures else "cool-down"
            return f"{reason}: not for {row.not_before - now:.0f} s"
        return ""

    @property
    def _chunk_size(self) -> int:
        """Tokens; 0 where windows hold no KV at all, only text, and where it is not known yet."""
        cache = self._services.cache
        return cache.chunk_size if cache and self._services.pins.tiers else 0

    def _is_too_short(self, session: Session) -> bool:
        return session.token_count < self._chunk_size

    def _must_wait(self, row: FreezeCandidate, now: float) -> bool:
        """Whether a cool-down, or a wait after a failure, is in progress; one that would end too late is ignored."""
        return now < row.not_before <= self._latest(now)

    def _latest(self, now: float) -> float:
        """The latest end of a wait that begins now: a later one was set while the clock was wrong."""
        return now + max(self._rules.cooldown_seconds, _LAST_RETRY_S)

    def _touch(self, tenant: str, session_id: str, span: Span | None) -> None:
        if span is not None:
            self._causes.pop((tenant, session_id), None)
            self._causes[tenant, session_id] = span
            if len(self._causes) > _MAX_TOUCHED:
                del self._causes[next(iter(self._causes))]
        if len(self._touched) < _MAX_TOUCHED:
            self._touched.add((tenant, session_id))
            self._has_touched.set()

    async def _check_touched(self) -> None:
        await self._has_touched.wait()
        await asyncio.sleep(_GATHER_S)
        self._has_touched.clear()
        touched, self._touched = self._touched, set()
        await self._reload()
        if not self._rules.enabled:
            return
        rows = await self._services.store.freeze_candidates(touched)
        active = [row for row in rows if row.session.state == "active" and row.session.transcript is not None]
        async for row, reason in self._sessions_to_freeze(active, "turn"):
            if not self._due.full():
                self._put(row, reason)

    async def _sweep(self) -> None:
        started = time.monotonic()
        await self._reload()
        waited = await self._freeze_all("sweep") if self._rules.enabled else 0.0
        work = time.monotonic() - started - waited
        await asyncio.sleep(max(self._services.settings.auto_freeze_every_s, work * _PAUSE_FACTOR))

    async def _freeze_all(self, event: Event) -> float:
        """Queue every session that the policies would freeze; return the seconds spent waiting for the queue."""
        since, before, waited = time.time() - _HORIZON_S, None, 0.0
        while page := await self._services.store.unfrozen(since, before, _PAGE):
            async for row, reason in self._sessions_to_freeze(page, event):
                waited += await self._wait_for_queue()
                self._put(row, reason)
            last = page[-1].session
            before = last.last_active_at, last.tenant, last.id
        return waited

    async def _wait_for_queue(self) -> float:
        started = time.monotonic()
        while self._due.full():  # noqa: ASYNC110 - a queue can only be waited for by putting
            await asyncio.sleep(_GATHER_S)
        return time.monotonic() - started

    def _put(self, row: FreezeCandidate, reason: str) -> None:
        self._pending.add(_key(row))
        self._due.put_nowait((row, reason))

    async def _sessions_to_freeze(
        self, rows: Sequence[FreezeCandidate], event: Event
    ) -> AsyncIterator[tuple[FreezeCandidate, str]]:
        now = time.time()
        for row in rows:
            if row.session.token_count < row.covered_tokens:
                await self._services.store.lower_covered_tokens(row.session)
        long = [r for r in rows if _key(r) not in self._pending and not self._is_too_short(r.session)]
        ready = [r for r in long if self._ending or not self._must_wait(r, now)]
        observations = [self._observation(row, event, now) for row in ready]
        decisions = await self._runner.decide(self._policies, observations) if ready else []
        for row, decision in zip(ready, decisions, strict=False):
            if decision is not None:
                yield row, decision.reason

    def _observation(self, row: FreezeCandidate, event: Event, now: float) -> Observation:
        session = row.session
        model = self._services.engines.known(session.model)
        return Observation(
            event=event,
            session_id=session.id,
            model=session.model,
            turn_count=session.turn_count,
            token_count=session.token_count,
            covered_tokens=min(row.covered_tokens, session.token_count),
            context_limit=model.context_limit if model else None,
            # A turn in the future was recorded while the clock was wrong; the session would not be idle until then.
            idle_s=abs(now - session.last_active_at),
            age_s=max(0.0, now - session.created_at),
        )

    # Freezing.

    async def _freeze_due(self) -> None:
        row, reason = await self._due.get()
        try:
            await self._freeze(row, reason)
        except Exception:
            log.exception("session %s could not be frozen automatically", row.session.id)
        finally:
            self._pending.discard(_key(row))
            self._due.task_done()

    async def _freeze(self, row: FreezeCandidate, reason: str) -> None:
        session = row.session
        if await self._services.turns.has_turn_in_flight(session.tenant, session.id):
            return  # it is checked again when that is recorded
        try:
            await self.freeze_now(row, reason, cool=not self._ending)
        except GatewayError as error:
            problem = f"{error.message}; not again for {retry_after(row.failures):g} s"
            log.warning("session %s could not be frozen automatically: %s", session.id, problem)

    async def freeze_now(self, row: FreezeCandidate, reason: str, *, cool: bool = False) -> Window | None:
        """Freeze a session into an automatic window, whatever the policies decide; with `cool` not in its cool-down.

        None: another worker freezes it, or it has changed. Raises what `freeze` raises.
        """
        session, store = row.session, self._services.store
        now = time.time()
        until, latest = now + _CLAIM_S, self._latest(now)
        if not await store.claim_freeze(session, now=now, until=until, latest=latest, cool=cool):
            return None
        cause, about = self._causes.pop(_key(row), None), {genai.REASON: clean(reason)}
        with self._services.traces.automatic("automatic freeze", cause, about):
            return await self._freeze_claimed(row, reason)

    async def _freeze_claimed(self, row: FreezeCandidate, reason: str) -> Window:
        session, store = row.session, self._services.store
        try:
            about = rules.description(reason)
            naming = Naming(self._window_name(session), about, self._rules.tags, self._rules.ttl_seconds)
            ctx = OperationContext(self._services, session.tenant)
            window, _ = await freeze_automatically(ctx, session.id, naming)
        except Exception:
            await self._report_failure(row)
            raise
        await store.report_freeze(session, window=window.name, not_before=time.time() + self._rules.cooldown_seconds)
        log.info("session %s was frozen as %s: %s", session.id, window.name, reason)
        await self._supersede(session.tenant, session.id)
        return window

    async def _report_failure(self, row: FreezeCandidate) -> None:
        """Release the claim, and have the session tried again later."""
        not_before = time.time() + retry_after(row.failures)
        await self._services.store.report_freeze(row.session, window=None, not_before=not_before)

    def _window_name(self, session: Session) -> str:
        return rules.window_name(self._rules.naming_pattern, session.id, session.turn_count, time.time())

    async def _supersede(self, tenant: str, session_id: str) -> None:
        """Delete the automatic windows of a session beyond the last `keep`."""
        names = await self._services.store.auto_windows(tenant, session_id)
        for name in names[self._rules.keep :]:
            try:
                await delete(OperationContext(self._services, tenant), name, automatic_of=session_id)
            except GatewayError as error:  # deleted by someone else, or a tier is down: the next freeze tries again
                log.warning("the superseded window %s was not deleted: %s", name, error.message)
            else:
                log.info("the superseded window %s was deleted", name)


def retry_after(failures: int) -> float:
    """Seconds until a session is tried again, by the number of failures before this one."""
    return min(_FIRST_RETRY_S * 2.0 ** min(failures, 16), _LAST_RETRY_S)


def _key(row: FreezeCandidate) -> Key:
    return row.session.tenant, row.session.id


async def _stop(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

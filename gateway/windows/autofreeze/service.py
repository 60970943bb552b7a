"""Automatic freezing: recorded turns and a sweep -> observations -> policies -> windows.freeze, in the background.

Every worker looks at every session; a claim in the store has only one of them freeze it. What is to be frozen waits in
a short queue: the sweep waits for room in it, a turn does not, and what it leaves out the sweep finds later.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import GatewayError, StartError
from gateway.records import AUTO_TAG, Session
from gateway.store.types import Unfrozen
from gateway.windows.autofreeze import rules as rules_of
from gateway.windows.autofreeze.policy_runner import Named, Opinion, PolicyRunner
from gateway.windows.autofreeze.rules import Rules
from gateway.windows.context import Services
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming
from gateway.windows.naming import freeze_automatically
from policies.contract import Event, Observation

log = logging.getLogger(__name__)

_AT_ONCE = 2  # freezes of this process: each has the engine compute a tail, and requests come first
_ROOM = 256  # decisions that wait for them
_TOUCHED = 4096  # sessions whose turns were recorded and that nobody has looked at yet
_GATHER_S = 0.1
_PAGE = 256
_HORIZON_S = 7 * 86400.0  # what is older was looked at when it was young; its KV is not worth a prefill now
_CLAIM_S = 300.0  # more than a freeze takes; a claim outlives only a worker that was killed
_FIRST_RETRY_S, _LAST_RETRY_S = 30.0, 3600.0
_REST_SHARE = 20  # a sweep that took a second is followed by so many of rest

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Check:
    """What the policies say of a session now, and what would come of it."""

    seen: Observation
    opinions: Sequence[Opinion]
    window_name: str
    held_back: str


class AutofreezeService:
    """Opened last and closed first: at its end the other parts still work."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._deciding = PolicyRunner()
        self._text: str | None = None  # as the store has it
        self._configured = rules_of.from_settings(services.settings)
        self._touched: set[Key] = set()
        self._news = asyncio.Event()
        self._due: asyncio.Queue[tuple[Unfrozen, str]] = asyncio.Queue(_ROOM)
        self._waiting: set[Key] = set()  # sessions in that queue, or being frozen
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    async def __aenter__(self) -> "AutofreezeService":
        """Raises StartError where a policy of the settings cannot be made."""
        try:
            self._set(self._configured)
        except GatewayError as error:
            raise StartError(f"setting auto_freeze_policies: {error.message}") from error
        await self._reload()
        self._services.recorder.watch(self._touch)
        work = [self._sweep, self._look_at_touched, *[self._freeze_due] * _AT_ONCE]
        self._tasks = [asyncio.create_task(self._for_ever(one), name="autofreeze") for one in work]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Freeze what the policies say at the end, within `shutdown_freeze_s`."""
        self._ending = True
        sweep, touched, *freezers = self._tasks
        await _stop([sweep, touched])
        within = self._services.settings.shutdown_freeze_s
        try:
            async with asyncio.timeout(within):
                await self._finish()
        except TimeoutError:
            log.warning("not every session was frozen at shutdown: shutdown_freeze_s (%g s) ran out", within)
        await _stop(freezers)

    async def _finish(self) -> None:
        if self._rules.enabled:
            await self._services.recorder.flush()
            await self._freeze_all("shutdown")
        await self._due.join()

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do one round after the other; a store that fails must not end it."""
        while True:
            try:
                await work()
            except Exception:
                log.exception("automatic freezing failed")
                await asyncio.sleep(self._services.settings.auto_freeze_every_s)

    # The rules.

    async def current(self) -> tuple[Rules, Mapping[str, Any]]:
        """The rules, and those of their fields that were set at run time."""
        await self._reload()
        return self._rules, orjson.loads(self._text or "{}")

    async def change(self, given: Mapping[str, Any]) -> list[str]:
        """Set fields of the rules, for all workers and after a restart. Raises `invalid_request`. Returns warnings."""
        _, before = await self.current()
        after = {**before, **given}
        rules = rules_of.with_changes(self._configured, after)
        rules_of.build_policies(rules, self._custom_policies)
        limits, warnings = await self._limits()
        rules_of.check_limits(rules, limits)
        await self._services.store.set_auto_freeze(orjson.dumps(after).decode())
        await self._reload()
        return warnings

    async def reset(self) -> None:
        """Forget what was set at run time: the settings hold again."""
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
        """Take over what any worker has set."""
        text = await self._services.store.auto_freeze()
        if text == self._text:
            return
        self._text = text
        try:
            self._set(rules_of.with_changes(self._configured, orjson.loads(text or "{}")))
        except GatewayError as error:  # a policy was there when it was set, and is not any more
            log.warning("the rules of automatic freezing set at run time do not fit: %s; the settings hold", error)
            self._set(self._configured)

    def _set(self, rules: Rules) -> None:
        self._policies: list[Named] = rules_of.build_policies(rules, self._custom_policies)
        self._rules = rules

    # Looking.

    async def check(self, tenant: str, session_id: str) -> Check | None:
        """Ask the policies about a session, and change nothing. None: there is no such session."""
        await self._reload()
        await self._services.recorder.flush()
        found = await self._services.store.unfrozen_sessions([(tenant, session_id)])
        if not found:
            return None
        (one,) = found
        now = time.time()
        seen = self._observation(one, "sweep", now)
        name = rules_of.window_name(self._rules.naming_pattern, session_id, one.session.turn_count, now)
        return Check(seen, await self._deciding.opinions(self._policies, seen), name, self._held_back(one, now))

    def _held_back(self, one: Unfrozen, now: float) -> str:
        if not self._rules.enabled:
            return "automatic freezing is off"
        if one.session.transcript is None:
            return "it has no finished turn yet"
        if one.session.state != "active":
            return f"it is {one.session.state} and has not continued since"
        if self._is_held(one, now):
            why = f"its last freeze failed, {one.failures} in a row" if one.failures else "cool-down"
            return f"{why}: not for {one.not_before - now:.0f} s"
        return ""

    def _is_held(self, one: Unfrozen, now: float) -> bool:
        """Whether a cool-down, or the wait after a failure, is going on; one that ends too late to be true is over."""
        return now < one.not_before <= self._latest(now)

    def _latest(self, now: float) -> float:
        """When any wait that begins now is over: what ends later was set while the clock was wrong."""
        return now + max(self._rules.cooldown_seconds, _LAST_RETRY_S)

    def _touch(self, tenant: str, session_id: str) -> None:
        if len(self._touched) < _TOUCHED:
            self._touched.add((tenant, session_id))
            self._news.set()

    async def _look_at_touched(self) -> None:
        await self._news.wait()
        await asyncio.sleep(_GATHER_S)
        self._news.clear()
        touched, self._touched = self._touched, set()
        await self._reload()
        if not self._rules.enabled:
            return
        rows = await self._services.store.unfrozen_sessions(touched)
        async for one, reason in self._sessions_to_freeze([row for row in rows if _goes_on(row)], "turn"):
            if not self._due.full():
                self._put(one, reason)

    async def _sweep(self) -> None:
        began = time.monotonic()
        await self._reload()
        waited = await self._freeze_all("sweep") if self._rules.enabled else 0.0
        work = time.monotonic() - began - waited
        await asyncio.sleep(max(self._services.settings.auto_freeze_every_s, work * _REST_SHARE))

    async def _freeze_all(self, event: Event) -> float:
        """Put every session in the queue that the policies would freeze; return how long it waited for room."""
        since, before, waited = time.time() - _HORIZON_S, None, 0.0
        while page := await self._services.store.unfrozen(since, before, _PAGE):
            async for one, reason in self._sessions_to_freeze(page, event):
                waited += await self._room()
                self._put(one, reason)
            last = page[-1].session
            before = last.last_active_at, last.tenant, last.id
        return waited

    async def _room(self) -> float:
        began = time.monotonic()
        while self._due.full():  # noqa: ASYNC110 - a queue tells of its room only to one who puts
            await asyncio.sleep(_GATHER_S)
        return time.monotonic() - began

    def _put(self, one: Unfrozen, reason: str) -> None:
        self._waiting.add(_key(one))
        self._due.put_nowait((one, reason))

    async def _sessions_to_freeze(self, rows: Sequence[Unfrozen], event: Event) -> AsyncIterator[tuple[Unfrozen, str]]:
        now = time.time()
        for row in rows:
            if row.session.token_count < row.covered_tokens:
                await self._services.store.uncover(row.session)
        ripe = [row for row in rows if _key(row) not in self._waiting and (self._ending or not self._is_held(row, now))]
        seen = [self._observation(row, event, now) for row in ripe]
        decisions = await self._deciding.evaluate(self._policies, seen) if ripe else []
        for one, decision in zip(ripe, decisions, strict=False):
            if decision is not None:
                yield one, decision.reason

    def _observation(self, one: Unfrozen, event: Event, now: float) -> Observation:
        session = one.session
        model = self._services.engines.known(session.model)
        return Observation(
            event=event,
            session_id=session.id,
            model=session.model,
            turn_count=session.turn_count,
            token_count=session.token_count,
            covered_tokens=min(one.covered_tokens, session.token_count),
            context_limit=model.context_limit if model else None,
            # A turn of the future was recorded while the clock was wrong, and would not be idle until that time comes.
            idle_s=abs(now - session.last_active_at),
            age_s=max(0.0, now - session.created_at),
        )

    # Freezing.

    async def _freeze_due(self) -> None:
        one, reason = await self._due.get()
        try:
            await self._freeze(one, reason)
        except Exception:
            log.exception("session %s could not be frozen automatically", one.session.id)
        finally:
            self._waiting.discard(_key(one))
            self._due.task_done()

    async def _freeze(self, one: Unfrozen, reason: str) -> None:
        session, store = one.session, self._services.store
        if self._services.turns.has_turn_in_flight(session.tenant, session.id):
            return  # it is looked at again when that is recorded
        now = time.time()
        until, latest = now + _CLAIM_S, self._latest(now)
        if not await store.claim_freeze(session, now=now, until=until, latest=latest, cool=not self._ending):
            return
        try:
            window, _ = await freeze_automatically(
                self._services, session.tenant, session.id, self._naming(session, reason)
            )
        except GatewayError as error:
            wait = await self._report_failure(one)
            why = f"{error.message}; not again for {wait:g} s"
            log.warning("session %s could not be frozen automatically: %s", session.id, why)
            return
        except Exception:
            await self._report_failure(one)
            raise
        cool = time.time() + self._rules.cooldown_seconds
        await store.report_freeze(session, window=window.name, not_before=cool)
        log.info("session %s was frozen as %s: %s", session.id, window.name, reason)
        await self._supersede(session.tenant, session.id)

    async def _report_failure(self, one: Unfrozen) -> float:
        """Give the claim back; return the seconds until the session is tried again."""
        wait = retry_after(one.failures)
        await self._services.store.report_freeze(one.session, window=None, not_before=time.time() + wait)
        return wait

    def _naming(self, session: Session, reason: str) -> Naming:
        name = rules_of.window_name(self._rules.naming_pattern, session.id, session.turn_count, time.time())
        return Naming(name, rules_of.description(reason), (AUTO_TAG,), self._rules.ttl_seconds)

    async def _supersede(self, tenant: str, session_id: str) -> None:
        """Delete the automatic windows of a session beyond the last `keep`."""
        names = await self._services.store.auto_windows(tenant, session_id)
        for name in names[self._rules.keep :]:
            try:
                await delete(self._services, tenant, name, automatic_of=session_id)
            except GatewayError as error:  # somebody was faster, or a tier is away: the next freeze tries again
                log.warning("the superseded window %s was not deleted: %s", name, error.message)
            else:
                log.info("the superseded window %s was deleted", name)


def retry_after(failures: int) -> float:
    """Seconds until a session is tried again after so many failures before this one."""
    return min(_FIRST_RETRY_S * 2.0 ** min(failures, 16), _LAST_RETRY_S)


def _key(one: Unfrozen) -> Key:
    return one.session.tenant, one.session.id


def _goes_on(one: Unfrozen) -> bool:
    return one.session.state == "active" and one.session.transcript is not None


async def _stop(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""Run policies in a thread of their own, so that one that fails or hangs delays no request."""

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from gateway.validation.shown import shown
from policies.contract import Freeze, Observation, Policy

log = logging.getLogger(__name__)

T = TypeVar("T")
NamedPolicy = tuple[str, Policy]
_TIMEOUT_S = 10.0  # for a page of sessions; built-in policies take microseconds for each
_LOG_EVERY_S = 60.0  # a policy that fails would fail for each session


class _WrongAnswer(TypeError):
    """A policy has returned something other than a decision."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one policy decided about a session, or why it could not decide."""

    policy: str
    decision: Freeze | None
    error: str = ""


class PolicyRunner:
    """Calls policies in one thread at a time; while it hangs, nothing is decided."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._running: Future[object] | None = None
        self._logged_at: dict[str, float] = {}

    async def decide(self, policies: Sequence[NamedPolicy], observations: Sequence[Observation]) -> list[Freeze | None]:
        """For each session the first decision to freeze it; an empty list if the policies did not return in time."""

        def first(observation: Observation) -> Freeze | None:
            opinions = (self._ask(name, policy, observation) for name, policy in policies)
            return next((opinion.decision for opinion in opinions if opinion.decision), None)

        return await self._run_off_loop(lambda: [first(one) for one in observations]) or []

    async def opinions(self, policies: Sequence[NamedPolicy], observation: Observation) -> list[Opinion]:
        """The opinion of each policy on one session; an empty list as above."""
        return (
            await self._run_off_loop(lambda: [self._ask(name, policy, observation) for name, policy in policies]) or []
        )

    async def _run_off_loop(self, work: Callable[[], T]) -> T | None:
        async with self._lock:
            if self._running is not None and not self._running.done():
                return None
            future: Future[T] = Future()
            threading.Thread(target=_settle, args=(future, work), name="policies", daemon=True).start()
            self._running = future  # type: ignore[assignment]
            waiting = asyncio.wrap_future(future)
            if not (await asyncio.wait({waiting}, timeout=_TIMEOUT_S))[0]:
                log.error("the policies have not decided within %g s: nothing is frozen until they do", _TIMEOUT_S)
                return None
            return waiting.result()

    def _ask(self, name: str, policy: Policy, observation: Observation) -> Opinion:
        try:
            return Opinion(name, _checked(policy.decide(observation)))
        except _WrongAnswer as error:
            if self._should_log(name):
                log.error("policy %s: %s", name, error)  # noqa: TRY400 - its traceback shows nothing of the policy
            return Opinion(name, None, str(error))
        except BaseException as error:  # SystemExit too: it must not end the thread
            if self._should_log(name):
                log.exception("policy %s failed for session %s", name, observation.session_id)
            return Opinion(name, None, "".join(traceback.format_exception_only(error)).strip())

    def _should_log(self, name: str) -> bool:
        now = time.monotonic()
        if now - self._logged_at.get(name, -_LOG_EVERY_S) < _LOG_EVERY_S:
            return False
        self._logged_at[name] = now
        return True


def _checked(decision: object) -> Freeze | None:
    """Return what a policy decided. Raises _WrongAnswer, or whatever the policy's object raises."""
    if decision is None or (isinstance(decision, Freeze) and isinstance(decision.reason, str)):
        return decision
    raise _WrongAnswer(f"decide() must return Freeze(reason) or None, not {shown(decision)}")


def _settle(future: "Future[T]", work: Callable[[], T]) -> None:
    """Set the future to the result of `work`, or to its failure: until then nothing else is decided."""
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - a SystemExit passed on to the event loop would end the process
        future.set_exception(RuntimeError(f"the policies failed: {error!r}"))

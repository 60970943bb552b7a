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
Named = tuple[str, Policy]
_PATIENCE_S = 10.0  # for a page of sessions; ours take microseconds for each
_COMPLAIN_EVERY_S = 60.0  # a policy that fails would fail for each session


class _WrongAnswer(TypeError):
    """A policy has returned something other than a decision."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one policy says of a session: a decision, or none, or why it could not decide."""

    policy: str
    decision: Freeze | None
    error: str = ""


class PolicyRunner:
    """One thread at a time asks; while it hangs, nothing is decided."""

    def __init__(self) -> None:
        self._alone = asyncio.Lock()
        self._late: Future[object] | None = None
        self._complained: dict[str, float] = {}

    async def evaluate(self, policies: Sequence[Named], seen: Sequence[Observation]) -> list[Freeze | None]:
        """For each session the first decision to freeze it; an empty list where the policies did not come back."""

        def first(one: Observation) -> Freeze | None:
            return next((o.decision for named in policies if (o := self._ask(named, one)).decision), None)

        return await self._run_off_loop(lambda: [first(one) for one in seen]) or []

    async def opinions(self, policies: Sequence[Named], seen: Observation) -> list[Opinion]:
        """What each policy says of one session; an empty list as above."""
        return await self._run_off_loop(lambda: [self._ask(named, seen) for named in policies]) or []

    async def _run_off_loop(self, work: Callable[[], T]) -> T | None:
        async with self._alone:
            if self._late is not None and not self._late.done():
                return None
            return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], T]) -> T | None:
        done: Future[T] = Future()
        threading.Thread(target=_settle, args=(done, work), name="policies", daemon=True).start()
        self._late = done  # type: ignore[assignment]
        waiting = asyncio.wrap_future(done)
        finished, _ = await asyncio.wait({waiting}, timeout=_PATIENCE_S)
        if not finished:
            log.error("the policies have not decided within %g s: nothing is frozen until they do", _PATIENCE_S)
            return None
        return waiting.result()

    def _ask(self, named: Named, seen: Observation) -> Opinion:
        name, policy = named
        try:
            return Opinion(name, _checked(policy.decide(seen)))
        except _WrongAnswer as error:
            if self._should_log(name):
                log.error("policy %s: %s", name, error)  # noqa: TRY400 - where it was found says nothing
            return Opinion(name, None, str(error))
        except BaseException as error:  # also SystemExit, by which a policy may think to end only itself
            if self._should_log(name):
                log.exception("policy %s failed for session %s", name, seen.session_id)
            return Opinion(name, None, "".join(traceback.format_exception_only(error)).strip())

    def _should_log(self, name: str) -> bool:
        now = time.monotonic()
        if now - self._complained.get(name, -_COMPLAIN_EVERY_S) < _COMPLAIN_EVERY_S:
            return False
        self._complained[name] = now
        return True


def _checked(decision: object) -> Freeze | None:
    """Return what a policy decided. Raises _WrongAnswer, and whatever an object of the policy's own raises."""
    if decision is None or (isinstance(decision, Freeze) and isinstance(decision.reason, str)):
        return decision
    raise _WrongAnswer(f"decide() must return Freeze(reason) or None, not {shown(decision)}")


def _settle(done: "Future[T]", work: Callable[[], T]) -> None:
    """Do `work` and hand its result on, or its failure: while there is neither, nothing more is decided."""
    try:
        done.set_result(work())
    except BaseException as error:  # noqa: BLE001 - whoever waits gets it, but as no SystemExit: that would end all
        done.set_exception(RuntimeError(f"the policies failed: {error!r}"))

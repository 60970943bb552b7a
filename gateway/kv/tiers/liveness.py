"""Detect within seconds that a server hangs, however long its calls may take, and skip it for a while.

A server that is down refuses connections, which costs nothing. One that hangs (stopped, swapping, cut off without a
reset) makes every call time out, and timeouts are as long as the largest object needs. So the server is pinged while a
call runs.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

_PING_EVERY_S = 0.5  # while a call runs
_SUSPENDED_S = 30.0
_LATE_S = 0.25  # a timeout that fires this late means that this process was stalled, not the server
_TRIES = 3


class Hung(Exception):
    """The server does not respond, or did not a moment ago; the message says so."""


class Liveness:
    """Runs calls to one server, which has to answer a `probe` within `answer_s`."""

    def __init__(
        self, probe: Callable[[], Awaitable[object]], answer_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe = probe
        self._answer_s = answer_s
        self._now = now
        self._until: float | None = None  # suspended until then; None while it is healthy

    @property
    def suspended(self) -> bool:
        """Whether calls are refused just now."""
        return self._until is not None and self._now() < self._until

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` returns, and raise what it raises, but Hung in place of TimeoutError."""
        if self.suspended:
            raise self._hung()
        task = asyncio.ensure_future(self._probe_and_call(call))
        try:
            while not (await asyncio.wait({task}, timeout=_PING_EVERY_S))[0]:
                await self._check()
            return task.result()
        except TimeoutError:
            raise self._suspend() from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            elif not task.cancelled():
                task.exception()  # retrieve a failure that came meanwhile, or asyncio logs it

    async def _probe_and_call(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._until is not None:  # just resumed: a probe is cheaper than the call
            await self._check()
        return await call()

    async def _check(self) -> None:
        """Return if the server responds. Raises TimeoutError, or Hung if another call has suspended it meanwhile."""
        if self.suspended:
            raise self._hung()
        for _ in range(_TRIES):
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._answer_s):
                    await self._probe()
            except TimeoutError:
                if time.monotonic() - began > self._answer_s + _LATE_S:
                    continue
                raise
            self._until = None
            return
        raise TimeoutError

    def _suspend(self) -> Hung:
        if not self.suspended:
            self._until = self._now() + _SUSPENDED_S
            log.warning("a server gave no sign of life for %g s: skipped for %g s", self._answer_s, _SUSPENDED_S)
        return self._hung()

    def _hung(self) -> Hung:
        left = max((self._until or 0.0) - self._now(), 0.0)
        return Hung(f"it hangs (no sign of life for {self._answer_s:g} s), and is skipped for {left:.0f} s")

"""Detect within seconds that a server hangs, however long its calls may take, and skip it for a while.

A server that is down refuses connections, and costs nothing. One that hangs (stopped, swapping, cut off without a word)
takes every call to its timeout, and those are as long as the largest object needs. So while a call goes on, the server
is asked for a sign of life.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

_PATIENCE_S = 0.5  # a call may be so long before the server is asked whether it lives, and between two times
_REST_S = 30.0
_LATE_S = 0.25  # a timeout that comes so late says that this process stood still, and nothing of the server
_TRIES = 3


class Hung(Exception):
    """The server gives no sign of life, or gave none lately; the message says so."""


class Liveness:
    """Runs calls to one server. `probe` asks it for a sign of life, which has to come within `answer_s`."""

    def __init__(
        self, probe: Callable[[], Awaitable[object]], answer_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe = probe
        self._answer_s = answer_s
        self._now = now
        self._until: float | None = None  # left alone until then; None while it is well

    @property
    def resting(self) -> bool:
        """Whether calls are refused just now."""
        return self._until is not None and self._now() < self._until

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` returns, and raise what it raises. Raises Hung, in place of TimeoutError too."""
        if self.resting:
            raise self._hung()
        task = asyncio.ensure_future(self._tried(call))
        try:
            while not (await asyncio.wait({task}, timeout=_PATIENCE_S))[0]:
                await self._ask()
            return task.result()
        except TimeoutError:
            raise self._gave_up() from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            elif not task.cancelled():
                task.exception()  # it may have failed while we asked; asyncio logs what nobody has looked at

    async def _tried(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._until is not None:  # the rest is over: a sign of life comes first, it is cheaper than the call
            await self._ask()
        return await call()

    async def _ask(self) -> None:
        """Return if the server lives. Raises TimeoutError, and Hung where somebody else has found out meanwhile."""
        if self.resting:
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

    def _gave_up(self) -> Hung:
        if not self.resting:
            self._until = self._now() + _REST_S
            log.warning("a server gave no sign of life for %g s: skipped for %g s", self._answer_s, _REST_S)
        return self._hung()

    def _hung(self) -> Hung:
        left = max((self._until or 0.0) - self._now(), 0.0)
        return Hung(f"it hangs (no sign of life for {self._answer_s:g} s), and is skipped for {left:.0f} s")

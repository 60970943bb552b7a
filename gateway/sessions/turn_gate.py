"""Lets one request of a conversation at a time find its session, where the reads of the store wait for a server.

Between two such reads another request of the conversation could find the same, and both would continue one session.
With SQLite nothing happens in between, and nobody waits here.
"""

import asyncio
from collections.abc import Callable, Hashable


class TurnGate:
    """A lock for each key that somebody asks for at the moment."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, tuple[asyncio.Lock, int]] = {}

    async def enter(self, key: Hashable) -> Callable[[], None]:
        """Wait for those that have the key; return what lets the next one in, which may be called again."""
        lock, waiting = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = lock, waiting + 1
        try:
            await lock.acquire()
        except BaseException:
            self._forget(key)
            raise
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                lock.release()
                self._forget(key)

        return leave

    def _forget(self, key: Hashable) -> None:
        lock, waiting = self._locks[key]
        if waiting == 1:
            del self._locks[key]
        else:
            self._locks[key] = lock, waiting - 1

"""Work that would hold up the event loop, done in one thread so that streams continue meanwhile.

One thread, not many: whatever runs in it takes turns with the event loop for Python's global lock, and what waits for
it holds no memory yet.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from gateway.records import Message

P = ParamSpec("P")
T = TypeVar("T")

HEAVY_BYTES = 512 * 1024
"""From this size on, a body is parsed, hashed and written in the thread: some 5 ms, where handing over costs 0.1 ms."""
HEAVY_MESSAGES = 1000


class Offload:
    """The thread. It starts when it is first needed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload")

    async def run(self, heavy: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns: done in the thread where it is `heavy`, else at once."""
        if not heavy:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))


def is_heavy(messages: Sequence[Message]) -> bool:
    """Whether to hash or to compare these messages takes long."""
    return len(messages) > HEAVY_MESSAGES or sum(map(_size, messages)) > HEAVY_BYTES


def _size(message: Message) -> int:
    """Characters of a message, about: its text, or the texts of its parts."""
    content: Any = message.get("content")
    if isinstance(content, list):
        return sum(len(part.get("text") or "") for part in content if type(part) is dict and _has_text(part))
    return len(content) if isinstance(content, str) else 0


def _has_text(part: dict[str, Any]) -> bool:
    return isinstance(part.get("text"), str)

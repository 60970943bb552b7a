"""Work that would block the event loop, done in one thread so that streams continue meanwhile.

One thread, not many: it competes with the event loop for the GIL, and work that waits for it uses no memory yet.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from gateway.records import Message

P = ParamSpec("P")
T = TypeVar("T")

HEAVY_BYTES = 512 * 1024
"""Bodies of at least this size are parsed, hashed and written in the thread: some 5 ms, against 0.1 ms to hand over."""
HEAVY_MESSAGES = 1000


class Offload:
    """The thread, started when it is first needed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload")

    async def run(self, heavy: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns: done in the thread if it is `heavy`, else at once."""
        if not heavy:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))


def is_heavy(messages: Sequence[Message]) -> bool:
    """Whether hashing or comparing these messages takes long."""
    return len(messages) > HEAVY_MESSAGES or sum(map(_size, messages)) > HEAVY_BYTES


def _size(message: Message) -> int:
    """Characters of a message, about: its text, or the texts of its parts."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return len(content)
    texts = [part.get("text") for part in content if type(part) is dict] if isinstance(content, list) else ()
    return sum(len(text) for text in texts if isinstance(text, str))

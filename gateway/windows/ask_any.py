"""Ask without naming a window: the windows that mention most of what is asked are asked, all at once.

Windows without a match are not asked, and of windows with the same best message only the newest is. What one of them
fails with does not affect the others.
"""

import asyncio
import time
from dataclasses import dataclass, replace

from gateway.dialects.search_text import Search
from gateway.errors import GatewayError
from gateway.records import Window
from gateway.runtime.progress import silent
from gateway.store.types import Match
from gateway.windows.ask import Answer, ask
from gateway.windows.context import OperationContext, instrumented

MAX_WINDOWS = 10
DEFAULT_WINDOWS = 3
MAX_TIMEOUT_S = 600
DEFAULT_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Asked:
    """A window that was asked, why, and its answer or the error in place of it."""

    window: Window
    match: Match
    answer: Answer | None
    error: GatewayError | None


@instrumented
async def ask_any(
    ctx: OperationContext, question: str, *, search: str | None = None, max_windows: int = DEFAULT_WINDOWS,
    max_tokens: int | None = None, timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Asked]:  # fmt: skip
    """Ask the best windows for a question, or for another text to `search` for; return them with their answers, the
    best first. There are none if nothing matches. `timeout_s` is for all of them together, `max_tokens` for each."""
    found = await _best_windows(ctx, question, search, max_windows)
    ctx.progress("ask", 0, len(found))
    done = 0

    async def ask_one(window: Window, match: Match) -> Asked:
        nonlocal done
        answer, error = await _ask(replace(ctx, progress=silent), window.name, question, max_tokens, timeout_s)
        done += 1
        ctx.progress("ask", done, len(found))
        return Asked(window, match, answer, error)

    return await asyncio.gather(*(ask_one(*one) for one in found))


async def _best_windows(
    ctx: OperationContext, question: str, search: str | None, count: int
) -> list[tuple[Window, Match]]:
    store, now = ctx.services.store, time.time()
    if search:
        found = await store.best_windows(ctx.tenant, Search(search), count, now)
        if found:
            return found
    return await store.best_windows(ctx.tenant, Search(search or question, every=False), count, now)


async def _ask(
    ctx: OperationContext, name: str, question: str, max_tokens: int | None, timeout_s: float
) -> tuple[Answer | None, GatewayError | None]:
    """The answer of a window, or the error in place of it."""
    try:
        async with asyncio.timeout(timeout_s):
            return await ask(ctx, name, question, max_tokens), None
    except GatewayError as error:
        return None, error
    except TimeoutError:
        message = f"window {name!r} had not answered after {timeout_s:g} s"
        return None, GatewayError("engine_timeout", message, hint="raise `timeout_seconds`, or ask that window alone")

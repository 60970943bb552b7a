"""How often a verb was done, how it ended and how long it took: for whoever did it, through whichever door."""

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from gateway.windows.context import Parts

P = ParamSpec("P")
T = TypeVar("T")
Verb = Callable[Concatenate[Parts, P], Coroutine[Any, Any, T]]


def counted(verb: Verb[P, T]) -> Verb[P, T]:
    """Count the calls of a verb in the metrics, under its function's name."""

    @functools.wraps(verb)
    async def run(parts: Parts, /, *arguments: P.args, **options: P.kwargs) -> T:
        with parts.telemetry.verb(verb.__name__):
            return await verb(parts, *arguments, **options)

    return run

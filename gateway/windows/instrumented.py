"""How often a verb was done, how it ended and how long it took: for whoever did it, through whichever door."""

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from gateway.windows.context import Services

P = ParamSpec("P")
T = TypeVar("T")
OperationFunction = Callable[Concatenate[Services, P], Coroutine[Any, Any, T]]


def instrumented(verb: OperationFunction[P, T]) -> OperationFunction[P, T]:
    """Count the calls of a verb in the metrics, under its function's name."""

    @functools.wraps(verb)
    async def run(parts: Services, /, *arguments: P.args, **options: P.kwargs) -> T:
        with parts.metrics.verb(verb.__name__):
            return await verb(parts, *arguments, **options)

    return run

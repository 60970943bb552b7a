"""Count each operation, its result and its duration, through whichever API it was called."""

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
        with parts.metrics.operation(verb.__name__):
            return await verb(parts, *arguments, **options)

    return run

"""One night for all files: what each does before it, a restart of everything, and what each finds in the morning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.stack.driver import Gateway

if TYPE_CHECKING:
    from tests.stack.conftest import Stack

Evening = Callable[["Stack", Gateway], Iterator[Any]]
Night = dict[Evening, tuple[Gateway, Any]]
"""The gateway of each evening, stopped, and what the evening had to hand on."""

_EVENINGS: list[Evening] = []


def across_restart(evening: Evening) -> Any:
    """Make a fixture of the file that `evening` is in.

    It runs with a gateway of its own up to its `yield`. Then gateway, engine and cache are stopped, what comes after
    the `yield` is done, and all are started again; the fixture is what was yielded. A restart of the engine takes the
    better part of a minute, so that all files share one.
    """
    _EVENINGS.append(evening)

    @pytest.fixture(scope="module", name=evening.__name__)
    def morning(night: Night) -> Iterator[Any]:
        gateway, handed_on = night[evening]
        gateway.start()
        yield handed_on
        gateway.close()

    return morning


def run_restart(stack: Stack, root: Path) -> Night:
    """The evenings of all files that were collected, the restart, and no gateway started yet."""
    evenings, night = [], {}
    for number, evening in enumerate(_EVENINGS):
        gateway = Gateway(stack.settings(root / str(number)), root / f"{number}.log").start()
        going_on = evening(stack, gateway)
        night[evening] = (gateway, next(going_on))
        gateway.stop()
        evenings.append(going_on)
    stack.stop()
    for going_on in evenings:
        next(going_on, None)
    stack.start()
    return night

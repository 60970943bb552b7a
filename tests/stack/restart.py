"""One restart of engine and cache for all files: each prepares something before it, and checks it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.stack.driver import Gateway

if TYPE_CHECKING:
    from tests.stack.conftest import Stack

Preparation = Callable[["Stack", Gateway], Generator[Any]]
Watch = Callable[["Stack", Path], Generator[Any]]

_PREPARATIONS: list[Preparation] = []
_WATCHES: list[Watch] = []


@dataclass
class Restarted:
    """What the preparations and watches of all files yielded before the restart."""

    prepared: dict[Preparation, tuple[Gateway, Any]]  # with its gateway, which is stopped
    watched: dict[Watch, Any]


def across_restart(prepare: Preparation) -> Any:
    """Make a module fixture of a generator that takes the stack and a gateway with an empty store.

    It runs up to its `yield`. Then gateway, engine and cache are stopped, what comes after the `yield` runs, and all
    are started again; the fixture is what was yielded. A restart of the engine takes the better part of a minute, so
    all files share one.
    """
    _PREPARATIONS.append(prepare)

    @pytest.fixture(scope="module", name=prepare.__name__)
    def after(restarted: Restarted) -> Iterator[Any]:
        gateway, yielded = restarted.prepared[prepare]
        gateway.start()
        yield yielded
        gateway.close()

    return after


def across_outage(watch: Watch) -> Any:
    """Make a module fixture of a generator that takes the stack and a folder, and starts a gateway by itself.

    Its gateway runs on while engine and cache are restarted. The generator yields twice: once before they are stopped,
    which gives the fixture its value, and once while they are down. It is closed after the restart's last test.
    """
    _WATCHES.append(watch)

    @pytest.fixture(scope="module", name=watch.__name__)
    def after(restarted: Restarted) -> Any:
        return restarted.watched[watch]

    return after


def run_restart(stack: Stack, root: Path) -> Iterator[Restarted]:
    """Run what the collected files prepare, restart engine and cache, and clean up when the generator is resumed."""
    restarted = Restarted({}, {})
    running: list[Generator[Any]] = []
    try:
        for watch in _WATCHES:
            folder = root / watch.__name__
            folder.mkdir()
            running.append(watch(stack, folder))
            restarted.watched[watch] = next(running[-1])
        for number, prepare in enumerate(_PREPARATIONS):
            gateway = Gateway(stack.settings(root / str(number)), root / f"{number}.log").start()
            running.append(prepare(stack, gateway))
            restarted.prepared[prepare] = (gateway, next(running[-1]))
            gateway.stop()
        stack.stop()
        for generator in running:
            next(generator, None)
        stack.start()
        yield restarted
    finally:
        for generator in running:
            generator.close()
        for gateway, _ in restarted.prepared.values():  # also those whose tests were deselected
            gateway.close()

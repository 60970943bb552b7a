"""How an operation of the store runs: in a thread that reads, in the one that writes, or inline.

An operation is a function that takes a connection (`*_rows.py`). `point_read`, `read`, `write` and `delete` make a
method of it, with the same arguments but for the connection, and the same docstring.
"""

import functools
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from gateway.store.ballast import Reserve

P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
Operation = Callable[Concatenate[sqlite3.Connection, P], T]
Method = Callable[Concatenate["Database", P], Coroutine[Any, Any, T]]


class Database(ABC):
    """Runs work on connections, each piece in one transaction. `store_id` identifies what is stored, permanently."""

    store_id: str

    @abstractmethod
    async def run_inline(self, work: Work[T]) -> T:
        """Read in the event loop: for a point read that a request waits for. Raises StoreUnavailable."""

    @abstractmethod
    async def run_read(self, work: Work[T]) -> T:
        """Read off the event loop, in one snapshot. Raises StoreUnavailable."""

    @abstractmethod
    async def run_write(self, work: Work[T], reserve: Reserve = Reserve.NONE) -> T:
        """Write off the event loop. On a full disk the write may use up to `reserve` of the space set aside.

        Raises StoreUnavailable.
        """


def _method(operation: Operation[P, T], run: Callable[[Database, Work[T]], Coroutine[Any, Any, T]]) -> Method[P, T]:
    @functools.wraps(operation)
    def method(self: Database, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return run(self, lambda db: operation(db, *args, **kwargs))

    return method


def point_read(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that reads a row or two, in microseconds."""
    return _method(operation, lambda database, work: database.run_inline(work))


def read(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that reads."""
    return _method(operation, lambda database, work: database.run_read(work))


def write(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that writes."""
    return _method(operation, lambda database, work: database.run_write(work))


def delete(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that deletes: it has to work on a full disk, too."""
    return _method(operation, lambda database, work: database.run_write(work, Reserve.DELETIONS))

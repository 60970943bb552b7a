"""How an operation of the store runs: in a thread that reads, in the one that writes, or inline.

An operation is a plain function that takes a connection (`*_rows.py`). `read`, `point_read`, `write` and `delete` make
a method of it, with the same arguments but for the connection, and the same docstring. What a database is, and its
threads, is left to whoever implements `Database`.
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
    """Runs work on connections, each piece of it in one transaction. `store_id` names what is stored, for good."""

    store_id: str

    @abstractmethod
    def run_inline(self, work: Work[T]) -> T:
        """Read at once: for a point read that a request waits for. Raises StoreUnavailable."""

    @abstractmethod
    async def run_read(self, work: Work[T]) -> T:
        """Read off the event loop, all of it from one moment. Raises StoreUnavailable."""

    @abstractmethod
    async def run_write(self, work: Work[T], reserve: Reserve = Reserve.NONE) -> T:
        """Write off the event loop. On a full disk up to `reserve` of what is set aside may be used up.

        Raises StoreUnavailable.
        """


def point_read(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that reads a row or two, in microseconds."""

    @functools.wraps(operation)
    async def method(self: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run_inline(lambda db: operation(db, *args, **kwargs))

    return method


def read(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that reads."""

    @functools.wraps(operation)
    async def method(self: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run_read(lambda db: operation(db, *args, **kwargs))

    return method


def write(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that writes."""

    @functools.wraps(operation)
    async def method(self: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run_write(lambda db: operation(db, *args, **kwargs))

    return method


def delete(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that deletes: it has to work on a full disk, too."""

    @functools.wraps(operation)
    async def method(self: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run_write(lambda db: operation(db, *args, **kwargs), Reserve.DELETIONS)

    return method

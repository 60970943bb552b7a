"""How an operation of the store runs: in a snapshot that reads, in a transaction that writes, or inline.

An operation is a coroutine function that takes a `Db` (`*_rows.py`). `point_read`, `read`, `write` and `delete` make a
method of it, with the same arguments but for the `Db`, and the same docstring. SQLite answers at once, so there an
operation never waits (`finish`); PostgreSQL's answers are awaited.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from gateway.dialects.search_text import Search
from gateway.store.ballast import Reserve
from gateway.store.types import StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")


class Db(Protocol):
    """What an operation reads and writes with; its transaction is the caller's.

    Statements have marks `?`, or `?1` where a value is used twice, and are in the SQL that both databases know, with
    the few words that `gateway.store.postgres_sql` translates.
    """

    @property
    def words(self) -> "WordIndex":
        """The full-text index of messages."""

    async def one(self, sql: str, *args: object) -> Any:
        """Return the first row, or None."""

    async def value(self, sql: str, *args: object) -> Any:
        """Return the first column of the first row, or None."""

    async def all(self, sql: str, *args: object) -> list[Any]:
        """Return all rows."""

    async def run(self, sql: str, *args: object) -> int:
        """Change something; return how many rows."""

    async def many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Change something for each of `rows`."""

    async def now(self) -> float:
        """The database's clock, in seconds since 1970."""

    async def lock(self, names: Iterable[str]) -> None:
        """Let no other transaction past this that locks one of these names, until this one is over."""

    async def lock_texts(self) -> None:
        """Called before text that others may be about to refer to is deleted."""


class Hits(NamedTuple):
    """Contents with a match, the best first if they are ranked, else newest first; `truncated`: there may be more."""

    contents: list[bytes]
    truncated: bool


class WordIndex(Protocol):
    """The full-text index of messages, which each database has of its own kind: modules with these functions."""

    async def index_some(self, db: Db, at_once: int) -> bool:
        """Index the next messages; return whether there may be more."""

    async def remove(self, db: Db, content_id: bytes) -> None:
        """Remove a content, which is about to be deleted, from the index."""

    async def hits(self, db: Db, search: Search, *, limit: int, ranked: bool) -> Hits:
        """Return the contents with a match among the newest `limit` that have one."""

    async def windows_with(
        self, db: Db, tenant: str, contents: Sequence[bytes], links: int
    ) -> tuple[int, list[tuple[str, bytes, int]]]:
        """Follow at most so many links from these messages; return how many, and the windows that they lead to.

        Each window is there with the content and the place of the last of these messages that it has.
        """


Work = Callable[[Db], Coroutine[Any, Any, T]]
Operation = Callable[Concatenate[Db, P], Coroutine[Any, Any, T]]
Method = Callable[Concatenate["Database", P], Coroutine[Any, Any, T]]


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits to its end, without an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("an operation of the store waited for something else than its database")


class Database(ABC):
    """Runs work in transactions, one for each piece. `store_id` identifies what is stored, permanently."""

    store_id: str

    @abstractmethod
    async def run_inline(self, work: Work[T]) -> T:
        """Read without a snapshot: for a point read that a request waits for. Raises StoreUnavailable."""

    @abstractmethod
    async def run_read(self, work: Work[T]) -> T:
        """Read in one snapshot. Raises StoreUnavailable."""

    @abstractmethod
    async def run_write(
        self, work: Work[T], reserve: Reserve = Reserve.NONE, *, shared: bool = False, durable: bool = True
    ) -> T:
        """Write in one transaction. It may be done again if it fails, so it must change nothing but the database.

        On a full disk the write may use up to `reserve` of the space set aside. `shared`: other gateways may do such
        writes at the same time; it locks what it reads in order to change it (`Db.lock`), and any text before deleting
        it (`Db.lock_texts`). All other writes are done one after another. Unless `durable`, a crash of
        the machine may undo it. Raises StoreUnavailable.
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


def read_after(operation: Operation[P, T], is_due: Work[bool], due: Work[None]) -> Method[P, T]:
    """Make a method of an operation that reads what something else has to write first, if that is due, and possible."""

    async def run(database: Database, work: Work[T]) -> T:
        async def unless_due(db: Db) -> tuple[T] | None:
            return None if await is_due(db) else (await work(db),)

        found = await database.run_read(unless_due)
        if found:
            return found[0]
        with suppress(StoreUnavailable):
            await database.run_write(due)
        return await database.run_read(work)

    return _method(operation, run)


def write(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that writes."""
    return _method(operation, lambda database, work: database.run_write(work))


def delete(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that deletes: it has to work on a full disk, too."""
    return _method(operation, lambda database, work: database.run_write(work, Reserve.DELETIONS))


def passing(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that writes what means nothing after a crash of the machine; on a full disk too."""
    return _method(operation, lambda database, work: database.run_write(work, Reserve.DELETIONS, durable=False))

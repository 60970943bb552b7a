"""Turn asyncpg's errors into ours, and tell what can be tried again. SQLSTATE codes: PostgreSQL, appendix A."""

import asyncpg

from gateway.store.types import StoreUnavailable

_SERIALIZATION, _DEADLOCK, _UNIQUE, _FOREIGN_KEY = "40001", "40P01", "23505", "23503"
_READ_ONLY, _DISK_FULL, _IDLE = "25006", "53100", "25P03"
# Others wrote at the same time. What was looked up before (a name, say) is looked up again.
_AGAIN = frozenset({_SERIALIZATION, _DEADLOCK, _UNIQUE, _FOREIGN_KEY})
# Classes: connection, authorization, unknown database, resources, intervention of an operator, system.
_UNAVAILABLE = ("08", "28", "3D", "53", "57", "58")
_LOST_STATEMENT = frozenset({"26000", "42P05"})
# asyncpg explains at length what a program that uses it could change.
_LOST = "has lost a prepared statement: behind PgBouncer in transaction mode, set store_statement_cache to 0"


class CommitUnknownError(StoreUnavailable):
    """Whether a transaction was committed could not be found out, as the server has gone: `transaction` is its id."""

    def __init__(self, where: str, transaction: str) -> None:
        super().__init__(
            "store_unavailable",
            f"the store {where} was lost in the middle of a write, which may have been done",
            hint="see whether it was, then send it again",
        )
        self.transaction = transaction


def is_lost(error: BaseException) -> bool:
    """Whether the connection is of no use after an error, so that the same may succeed on a new one."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state.startswith(("08", "57P")) or state in (_READ_ONLY, _IDLE)
    if isinstance(error, asyncpg.DataError):  # an argument that cannot be encoded
        return False
    return isinstance(error, (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError))


def may_succeed_again(error: BaseException) -> bool:
    """Whether a transaction failed only because of what others did meanwhile."""
    outdated = isinstance(error, asyncpg.InvalidCachedStatementError)  # another gateway has changed the schema
    return outdated or (isinstance(error, asyncpg.PostgresError) and error.sqlstate in _AGAIN)


def why_not_opened(error: Exception) -> str:
    """What an error says of a store that cannot be opened, with the remedy if it is known."""
    lost = isinstance(error, asyncpg.PostgresError) and error.sqlstate in _LOST_STATEMENT
    return f"it {_LOST}" if lost else str(error) or "it does not answer"


def failure(where: str, error: Exception) -> Exception:
    """The error to raise for a failed operation; the error itself if it is a bug of ours."""
    state = error.sqlstate or "" if isinstance(error, asyncpg.PostgresError) else ""
    if state == _DISK_FULL:
        return StoreUnavailable("storage_full", f"the disk of the store {where} is full: {error}")
    if state == _READ_ONLY:
        return StoreUnavailable("store_unavailable", f"the store {where} is read-only; is it a standby?")
    if state in _LOST_STATEMENT:
        return StoreUnavailable("store_unavailable", f"the store {where} {_LOST}")
    if state.startswith(_UNAVAILABLE) or is_lost(error):
        return StoreUnavailable("store_unavailable", f"the store {where} does not answer: {_reason(error)}")
    return error


def _reason(error: Exception) -> str:
    return "it was silent for too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__

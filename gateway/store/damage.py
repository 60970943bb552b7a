"""Check the store's pages for damage, which otherwise only their reader would notice."""

import sqlite3
from pathlib import Path

from gateway.errors import GatewayError

REMEDY = (
    "stop the gateway and restore the store from a copy, or rescue what can be read into a new one "
    "(sqlite3 STORE .recover | sqlite3 NEW); then check it with cwg doctor"
)
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})  # primary result codes
_MOST = 5  # findings that are told


class StoreDamaged(GatewayError):
    """The store's file is not as SQLite wrote it; neither a retry nor a restart helps."""

    def __init__(self, path: Path, error: sqlite3.Error) -> None:
        super().__init__("internal", f"the store {path} is damaged: {error}", hint=REMEDY)


def is_damage(error: BaseException) -> bool:
    """Whether an error of SQLite says that a file is damaged, or no database."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT


def damage(path: Path) -> list[str]:
    """Read every page of the store and return what is wrong, in SQLite's words; takes seconds for each gigabyte.

    It has a connection of its own, so neither requests nor finished turns wait for it.
    """
    try:
        db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        return [str(error)]
    try:
        found = [str(row[0]) for row in db.execute(f"PRAGMA quick_check({_MOST})")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    finally:
        db.close()
    return [] if found == ["ok"] else found

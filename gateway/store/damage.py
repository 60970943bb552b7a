"""Whether the pages of a store are as SQLite wrote them: a damaged one is noticed else only by whoever reads it."""

import sqlite3
from pathlib import Path

_MOST = 5  # findings that are told


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

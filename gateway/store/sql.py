"""What several modules of SQL share: placeholders, batches, and the named values in `meta`."""

import sqlite3
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_VARIABLES = 500  # per statement; SQLite's own limit is higher, its parser is not faster for it


def marks(values: Sequence[object]) -> str:
    """A placeholder for each value."""
    return ", ".join("?" * len(values))


def batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values in batches that one statement takes."""
    return (values[i : i + _VARIABLES] for i in range(0, len(values), _VARIABLES))


def get_meta(db: sqlite3.Connection, name: str) -> str | None:
    """Return a named value, or None."""
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else None


def set_meta(db: sqlite3.Connection, name: str, value: str | None) -> None:
    """Store a named value; None deletes it."""
    db.execute("DELETE FROM meta WHERE name = ?", (name,))
    if value is not None:
        db.execute("INSERT INTO meta VALUES (?, ?)", (name, value))

"""By what the store knows the secret of its salts again."""

import sqlite3

_MARK = "secret_mark"  # its name in `meta`


def known(db: sqlite3.Connection) -> tuple[str | None, bool]:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (_MARK,)).fetchone()
    (kept,) = db.execute("SELECT EXISTS (SELECT 1 FROM sessions) OR EXISTS (SELECT 1 FROM windows)").fetchone()
    return str(row[0]) if row else None, bool(kept)


def remember(db: sqlite3.Connection, mark: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_MARK, mark))

"""The mark by which the store recognises the secret of its salts."""

import sqlite3

_MARK = "secret_mark"  # its name in `meta`


def known_secret(db: sqlite3.Connection) -> tuple[str | None, bool]:
    """Return the mark of the secret that it was used with (`salts.mark`), and whether it holds any session."""
    row = db.execute("SELECT value FROM meta WHERE name = ?", (_MARK,)).fetchone()
    (kept,) = db.execute("SELECT EXISTS (SELECT 1 FROM sessions) OR EXISTS (SELECT 1 FROM windows)").fetchone()
    return str(row[0]) if row else None, bool(kept)


def remember_secret(db: sqlite3.Connection, mark: str) -> None:
    """Keep the mark of the secret that it is used with from now on."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_MARK, mark))

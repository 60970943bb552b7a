"""What a list or a status shows of several tables, in one read: each wait for the thread costs more than the rows do.

The caller owns the transaction.
"""

from collections.abc import Sequence
from typing import Any

from gateway.records import Session, Sizes, Window
from gateway.store import manifest_rows, savings_rows, session_rows, window_rows
from gateway.store.database import Db
from gateway.store.types import Saved, WindowQuery


async def listed_windows(
    db: Db, tenant: str, query: WindowQuery, found: Sequence[str] = ()
) -> tuple[list[tuple[Window, Saved]], int]:
    """Return one page of windows (`window_rows.list_windows`), each with what it has saved, and how many match."""
    page, total = await window_rows.list_windows(db, tenant, query, found)
    saved = await savings_rows.saved(db, tenant, "window", [window.name for window in page])
    return [(window, saved[window.name]) for window in page], total


async def listed_sessions(db: Db, /, tenant: str, **query: Any) -> tuple[list[tuple[Session, Saved]], int]:
    """Return one page of sessions (`session_rows.list_sessions`), each with what it has saved, and how many match."""
    page, total = await session_rows.list_sessions(db, tenant, **query)
    saved = await savings_rows.saved(db, tenant, "session", [session.id for session in page])
    return [(session, saved[session.id]) for session in page], total


async def sizes_and_saved(db: Db, window: Window) -> tuple[Sizes, Saved]:
    """Return the bytes of a window's objects (`manifest_rows.sizes`), and what it has saved."""
    saved = await savings_rows.saved(db, window.tenant, "window", [window.name])
    return await manifest_rows.sizes(db, window), saved[window.name]

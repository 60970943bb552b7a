"""The SQL of drained engines: a named value for each, so that two who drain do not overwrite each other's."""

from gateway.store.database import Db
from gateway.store.sql import get_meta, set_meta

_PREFIX = "drained:"  # in `meta`, before the engine's URL


async def drained(db: Db) -> dict[str, float]:
    """Return since when each drained engine is, by its URL."""
    rows = await db.all("SELECT name, value FROM meta WHERE name LIKE ?", f"{_PREFIX}%")
    return {name.removeprefix(_PREFIX): float(value) for name, value in rows}


async def set_drained(db: Db, url: str, since: float | None) -> None:
    """Store that an engine is drained, unless it is already; None: that it is not."""
    name = f"{_PREFIX}{url}"
    if since is None or await get_meta(db, name) is None:
        await set_meta(db, name, None if since is None else str(since))

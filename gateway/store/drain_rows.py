"""The SQL of drained engines: a named value for each, so that two who drain do not overwrite each other's."""

from collections.abc import Collection

from gateway.store.database import Db
from gateway.store.sql import set_meta

_PREFIX = "drained:"  # in `meta`, before the engine's URL


async def drained(db: Db) -> dict[str, float]:
    """Return since when each drained engine is, by its URL."""
    rows = await db.all("SELECT name, value FROM meta WHERE name LIKE ?", f"{_PREFIX}%")
    return {name.removeprefix(_PREFIX): float(value) for name, value in rows}


async def drain(db: Db, url: str, since: float, engines: Collection[str]) -> bool:
    """Store that an engine is drained, unless it is already; False if that would leave none of these engines."""
    now = await drained(db)
    if now.keys() | {url} >= set(engines):
        return False
    if url not in now:
        await set_meta(db, f"{_PREFIX}{url}", str(since))
    return True


async def undrain(db: Db, url: str) -> None:
    """Store that an engine is not drained."""
    await set_meta(db, f"{_PREFIX}{url}", None)

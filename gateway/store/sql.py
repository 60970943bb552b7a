"""What several modules of SQL share: placeholders, batches, and the named values in `meta`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from gateway.store.database import Db

T = TypeVar("T")
_VARIABLES = 500  # per statement; SQLite's own limit is higher, its parser is not faster for it


def marks(values: Sequence[object]) -> str:
    """A placeholder for each value."""
    return ", ".join("?" * len(values))


def columns(names: Sequence[str], table: str = "") -> str:
    """Names of columns as a statement takes them: `window` is a word of PostgreSQL's."""
    return ", ".join(f'{table}."{name}"' if table else f'"{name}"' for name in names)


def batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values in batches that one statement takes."""
    return (values[i : i + _VARIABLES] for i in range(0, len(values), _VARIABLES))


async def get_meta(db: Db, name: str) -> str | None:
    """Return a named value, or None."""
    value: str | None = await db.value("SELECT value FROM meta WHERE name = ?", name)
    return value


async def set_meta(db: Db, name: str, value: str | None) -> None:
    """Store a named value; None deletes it."""
    if value is None:
        await db.run("DELETE FROM meta WHERE name = ?", name)
    else:
        await db.run(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", name, value
        )


def by_tenant(keys: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of each tenant, some of them repeated: so lists have few lengths, and each length is a statement."""
    found: dict[str, list[str]] = {}
    for tenant, name in keys:
        found.setdefault(tenant, []).append(name)
    return {
        tenant: names + names[-1:] * ((1 << (len(names) - 1).bit_length()) - len(names))
        for tenant, names in found.items()
    }

"""The SQL of manifests: token ids and pinned objects of windows. The caller owns the transaction."""

import sqlite3
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, under
from gateway.records import Manifest, PinnedObject, Window
from gateway.store.types import Released

_VARIABLES = 500  # per statement; SQLite's own limit is higher, its parser is not faster for it
_OBJECTS = "manifest_objects m JOIN objects o ON o.number = m.object"
_OBJECTS_OF = f"""SELECT o.key, o.tier, o.size, o.checksum, '' FROM {_OBJECTS}
    WHERE m.manifest = ? ORDER BY m.position, o.tier"""
# A row for each size, not one for each object: there are thousands of them, and most are of one size. No key has a NUL:
# neither a path nor an argument can, so no model is called by one.
_SIZES_OF = f"""SELECT o.tier, o.size, group_concat(o.key, char(0)) FROM {_OBJECTS} WHERE m.manifest = ?
    GROUP BY o.tier, o.size"""
_KEYS_OF = f"SELECT DISTINCT o.key FROM {_OBJECTS} WHERE m.manifest = ?"
_HOLDER = f"SELECT 1 FROM {_OBJECTS} WHERE o.key = ? LIMIT 1"


def add(db: sqlite3.Connection, new: Manifest) -> None:
    db.execute("INSERT INTO manifests VALUES (?, ?)", (new.id, array("I", new.token_ids).tobytes()))
    db.executemany(
        """INSERT INTO objects (key, tier, size, checksum) VALUES (?, ?, ?, ?)
        ON CONFLICT (key, tier) DO UPDATE SET size = excluded.size, checksum = excluded.checksum""",
        [(o.key, o.tier, o.size, o.checksum) for o in new.objects],
    )
    positions = {key: i for i, key in enumerate(dict.fromkeys(o.key for o in new.objects))}
    db.executemany(
        "INSERT INTO manifest_objects SELECT ?, ?, number FROM objects WHERE key = ? AND tier = ?",
        [(new.id, positions[o.key], o.key, o.tier) for o in new.objects],
    )


def manifest(db: sqlite3.Connection, of: Window) -> Manifest:
    """Return a window's manifest, its objects under the window's salt.

    Raises `window_not_found` when it has just been deleted.
    """
    row = db.execute("SELECT token_ids FROM manifests WHERE id = ?", (of.manifest,)).fetchone()
    if row is None:
        raise _deleted()
    return Manifest(of.manifest, tuple(array("I", row[0])), _objects(db, of))


def pinned(db: sqlite3.Connection, of: Window) -> tuple[PinnedObject, ...]:
    """Return the objects of a window's manifest alone. Raises as `manifest` does."""
    _check_there(db, of)
    return _objects(db, of)


def sizes(db: sqlite3.Connection, of: Window) -> dict[str, dict[str, int]]:
    """Return the bytes of each object of a window in each tier, in no order. Raises as `manifest` does."""
    _check_there(db, of)
    found: dict[str, dict[str, int]] = {}
    for tier, size, pins in db.execute(_SIZES_OF, (of.manifest,)):
        keys: Iterable[str] = pins.split("\0")
        if of.salt != of.pin_salt:
            keys = (under(key, of.salt) for key in keys)
        found.setdefault(tier, {}).update(dict.fromkeys(keys, size))
    return found


def _check_there(db: sqlite3.Connection, of: Window) -> None:
    if db.execute("SELECT 1 FROM manifests WHERE id = ?", (of.manifest,)).fetchone() is None:
        raise _deleted()


def _deleted() -> GatewayError:
    return GatewayError("window_not_found", "the window was just deleted")


def _objects(db: sqlite3.Connection, of: Window) -> tuple[PinnedObject, ...]:
    found = db.execute(_OBJECTS_OF, (of.manifest,))
    if of.salt == of.pin_salt:
        return tuple(map(PinnedObject._make, found))
    return tuple(PinnedObject(under(key, of.salt), tier, size, seen, key) for key, tier, size, seen, _ in found)


def release(db: sqlite3.Connection, gone: Window) -> Released:
    """Take away what only a window needed that has just been deleted."""
    keys = [key for (key,) in db.execute(_KEYS_OF, (gone.manifest,))]
    names: list[str] = []
    if gone.salt != gone.pin_salt and not _any(db, "SELECT 1 FROM windows WHERE salt = ? LIMIT 1", gone.salt):
        names = [under(key, gone.salt) for key in keys]
    pins: list[str] = []
    if not _any(db, "SELECT 1 FROM windows WHERE manifest = ? LIMIT 1", gone.manifest):
        db.execute("DELETE FROM manifest_objects WHERE manifest = ?", (gone.manifest,))
        db.execute("DELETE FROM manifests WHERE id = ?", (gone.manifest,))
        pins = [key for key in keys if not _any(db, _HOLDER, key)]
        db.executemany("DELETE FROM objects WHERE key = ?", [(key,) for key in pins])
    return Released(tuple(map(ObjectKey.parse, pins)), tuple(map(ObjectKey.parse, names)))


def _any(db: sqlite3.Connection, query: str, value: str) -> bool:
    return db.execute(query, (value,)).fetchone() is not None


def objects(db: sqlite3.Connection, keys: Sequence[ObjectKey]) -> list[PinnedObject]:
    """Return what is known of those of `keys` that windows hold, an entry for each tier."""
    found: list[PinnedObject] = []
    names = [str(key) for key in keys]
    for batch in (names[i : i + _VARIABLES] for i in range(0, len(names), _VARIABLES)):
        marks = ", ".join("?" * len(batch))
        cursor = db.execute(f"SELECT key, tier, size, checksum FROM objects WHERE key IN ({marks})", batch)
        found += [PinnedObject(*row) for row in cursor]
    return found


def held_bytes(db: sqlite3.Connection, tenant: str, more: Sequence[PinnedObject]) -> int:
    """Return the bytes that a tenant's windows would hold with `more`, what they share counted once."""
    (held,) = db.execute(
        """SELECT coalesce(sum(size), 0) FROM objects WHERE number IN
        (SELECT m.object FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest WHERE w.tenant = ?)""",
        (tenant,),
    ).fetchone()
    query = f"""SELECT 1 FROM {_OBJECTS} JOIN windows w ON w.manifest = m.manifest
        WHERE o.key = ? AND o.tier = ? AND w.tenant = ? LIMIT 1"""
    new = [one for one in more if db.execute(query, (one.pin_key, one.tier, tenant)).fetchone() is None]
    return int(held) + sum(one.size for one in new)


def held_objects(db: sqlite3.Connection) -> set[ObjectKey]:
    """Every object that some window has pinned."""
    return {ObjectKey.parse(key) for (key,) in db.execute("SELECT DISTINCT key FROM objects")}


def isolated_names(db: sqlite3.Connection) -> set[ObjectKey]:
    """Names under which LMCache may have the objects of isolated clones, whose pins go by other names."""
    found = db.execute(
        f"""SELECT DISTINCT o.key, w.salt FROM windows w JOIN {_OBJECTS}
        WHERE m.manifest = w.manifest AND w.salt != w.pin_salt"""
    )
    return {ObjectKey.parse(under(key, salt)) for key, salt in found}


def held_under(db: sqlite3.Connection, salt: str) -> set[ObjectKey]:
    """Return the objects under a salt that windows hold: their pins, and what LMCache has of isolated clones."""
    found = db.execute(
        f"""SELECT DISTINCT o.key FROM {_OBJECTS} WHERE m.manifest IN
        (SELECT manifest FROM windows WHERE salt = ?1 UNION SELECT manifest FROM windows WHERE pin_salt = ?1)""",
        (salt,),
    )
    return {replace(ObjectKey.parse(key), salt=salt) for (key,) in found}


def tier_usage(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Objects and bytes that windows hold, by tier, each object counted once."""
    found = db.execute("SELECT tier, count(*), sum(size) FROM objects GROUP BY tier")
    return {tier: (count, size) for tier, count, size in found}

"""The SQL of manifests: the token ids and pinned objects of windows. The caller owns the transaction."""

import sqlite3
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, with_salt
from gateway.records import Manifest, PinnedObject, Window
from gateway.store.sql import batches, marks
from gateway.store.types import Released

_OBJECTS = "manifest_objects m JOIN objects o ON o.number = m.object"
_OBJECTS_OF = f"""SELECT o.key, o.tier, o.size, o.checksum, '' FROM {_OBJECTS}
    WHERE m.manifest = ? ORDER BY m.position, o.tier"""
# A row for each size, not for each object: there are thousands, mostly of one size. No key has a NUL: a model's name is
# a path or an argument.
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


def share(db: sqlite3.Connection, manifest: str, source: str, count: int) -> None:
    """Let a manifest hold what another one has at its first `count` positions."""
    db.execute(
        """INSERT INTO manifest_objects SELECT ?, position, object FROM manifest_objects
        WHERE manifest = ? AND position < ?""",
        (manifest, source, count),
    )


def manifest(db: sqlite3.Connection, window: Window) -> Manifest:
    """Return a window's manifest, with its objects under the window's salt.

    Raises `window_not_found` if it has just been deleted.
    """
    row = db.execute("SELECT token_ids FROM manifests WHERE id = ?", (window.manifest,)).fetchone()
    if row is None:
        raise _deleted()
    return Manifest(window.manifest, array("I", row[0]), _objects(db, window))


def pinned(db: sqlite3.Connection, window: Window) -> tuple[PinnedObject, ...]:
    """Return only the objects of a window's manifest. Raises as `manifest` does."""
    _check_exists(db, window)
    return _objects(db, window)


def sizes(db: sqlite3.Connection, window: Window) -> dict[str, dict[str, int]]:
    """Return the bytes of each object of a window by tier and key, unordered. Raises as `manifest` does."""
    _check_exists(db, window)
    by_tier: dict[str, dict[str, int]] = {}
    for tier, size, pins in db.execute(_SIZES_OF, (window.manifest,)):
        keys: Iterable[str] = pins.split("\0")
        if window.salt != window.pin_salt:
            keys = (with_salt(key, window.salt) for key in keys)
        by_tier.setdefault(tier, {}).update(dict.fromkeys(keys, size))
    return by_tier


def _check_exists(db: sqlite3.Connection, window: Window) -> None:
    if not _any(db, "SELECT 1 FROM manifests WHERE id = ?", window.manifest):
        raise _deleted()


def _deleted() -> GatewayError:
    return GatewayError("window_not_found", "the window was just deleted")


def _objects(db: sqlite3.Connection, window: Window) -> tuple[PinnedObject, ...]:
    rows = db.execute(_OBJECTS_OF, (window.manifest,))
    if window.salt == window.pin_salt:
        return tuple(map(PinnedObject._make, rows))
    return tuple(
        PinnedObject(with_salt(key, window.salt), tier, size, digest, key) for key, tier, size, digest, _ in rows
    )


def release(db: sqlite3.Connection, deleted: Window) -> Released:
    """Delete what only a window needed that has just been deleted."""
    keys = [key for (key,) in db.execute(_KEYS_OF, (deleted.manifest,))]
    names: list[str] = []
    if deleted.salt != deleted.pin_salt and not _any(db, "SELECT 1 FROM windows WHERE salt = ? LIMIT 1", deleted.salt):
        names = [with_salt(key, deleted.salt) for key in keys]
    pins: list[str] = []
    if not _any(db, "SELECT 1 FROM windows WHERE manifest = ? LIMIT 1", deleted.manifest):
        db.execute("DELETE FROM manifest_objects WHERE manifest = ?", (deleted.manifest,))
        db.execute("DELETE FROM manifests WHERE id = ?", (deleted.manifest,))
        pins = [key for key in keys if not _any(db, _HOLDER, key)]
        db.executemany("DELETE FROM objects WHERE key = ?", [(key,) for key in pins])
    return Released(tuple(map(ObjectKey.parse, pins)), tuple(map(ObjectKey.parse, names)))


def _any(db: sqlite3.Connection, query: str, value: str) -> bool:
    return db.execute(query, (value,)).fetchone() is not None


def objects(db: sqlite3.Connection, keys: Sequence[ObjectKey]) -> list[PinnedObject]:
    """Return those of `keys` that windows hold, one entry for each tier."""
    query = "SELECT key, tier, size, checksum FROM objects WHERE key IN ({})"
    names = [str(key) for key in keys]
    return [PinnedObject(*row) for batch in batches(names) for row in db.execute(query.format(marks(batch)), batch)]


def held_bytes(db: sqlite3.Connection, tenant: str, more: Sequence[PinnedObject]) -> int:
    """Return the bytes that a tenant's windows would hold with `more`, shared objects counted once."""
    (total,) = db.execute(
        """SELECT coalesce(sum(size), 0) FROM objects WHERE number IN
        (SELECT m.object FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest WHERE w.tenant = ?)""",
        (tenant,),
    ).fetchone()
    query = f"""SELECT 1 FROM {_OBJECTS} JOIN windows w ON w.manifest = m.manifest
        WHERE o.key = ? AND o.tier = ? AND w.tenant = ? LIMIT 1"""
    return int(total) + sum(o.size for o in more if not db.execute(query, (o.pin_key, o.tier, tenant)).fetchone())


def held_objects(db: sqlite3.Connection) -> set[ObjectKey]:
    """Return every object that a window holds."""
    return {ObjectKey.parse(key) for (key,) in db.execute("SELECT DISTINCT key FROM objects")}


def isolated_names(db: sqlite3.Connection) -> set[ObjectKey]:
    """Return the keys under which LMCache may have the objects of isolated clones, whose pins have other keys."""
    rows = db.execute(
        f"""SELECT DISTINCT o.key, w.salt FROM windows w JOIN {_OBJECTS}
        WHERE m.manifest = w.manifest AND w.salt != w.pin_salt"""
    )
    return {ObjectKey.parse(with_salt(key, salt)) for key, salt in rows}


def held_under(db: sqlite3.Connection, salt: str) -> set[ObjectKey]:
    """Return the objects under a salt that windows hold, including those that LMCache has of isolated clones."""
    rows = db.execute(
        f"""SELECT DISTINCT o.key FROM {_OBJECTS} WHERE m.manifest IN
        (SELECT manifest FROM windows WHERE salt = ?1 UNION SELECT manifest FROM windows WHERE pin_salt = ?1)""",
        (salt,),
    )
    return {replace(ObjectKey.parse(key), salt=salt) for (key,) in rows}


def tier_usage(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Return the objects and bytes that windows hold, by tier, each object counted once."""
    rows = db.execute("SELECT tier, count(*), sum(size) FROM objects GROUP BY tier")
    return {tier: (count, size) for tier, count, size in rows}

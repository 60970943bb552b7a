"""The SQL of manifests: the token ids and pinned objects of windows. The caller owns the transaction."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, with_salt
from gateway.records import Manifest, PinnedObject, Window
from gateway.store.database import Db
from gateway.store.sql import batches, marks
from gateway.store.types import Released

_OBJECTS = "manifest_objects m JOIN objects o ON o.number = m.object"
_OBJECTS_OF = f"""SELECT o.key, o.tier, o.size, o.checksum, '' FROM {_OBJECTS}
    WHERE m.manifest = ? ORDER BY m.position, o.tier"""
# A row for each size, not for each object: there are thousands, mostly of one size. No key has this sign: the name of a
# model is a path or an argument.
_SEPARATOR = "\x1f"
_SIZES_OF = f"""SELECT o.tier, o.size, group_concat(o.key, char({ord(_SEPARATOR)})) FROM {_OBJECTS} WHERE m.manifest = ?
    GROUP BY o.tier, o.size"""
_KEYS_OF = f"SELECT DISTINCT o.key FROM {_OBJECTS} WHERE m.manifest = ?"
_HOLDER = f"SELECT 1 FROM {_OBJECTS} WHERE o.key = ? LIMIT 1"


async def add(db: Db, new: Manifest) -> None:
    await db.run("INSERT INTO manifests VALUES (?, ?)", new.id, array("I", new.token_ids).tobytes())
    await db.many(
        """INSERT INTO objects (key, tier, size, checksum) VALUES (?, ?, ?, ?)
        ON CONFLICT (key, tier) DO UPDATE SET size = excluded.size, checksum = excluded.checksum""",
        [(o.key, o.tier, o.size, o.checksum) for o in new.objects],
    )
    positions = {key: i for i, key in enumerate(dict.fromkeys(o.key for o in new.objects))}
    await db.many(
        "INSERT INTO manifest_objects SELECT ?, ?, number FROM objects WHERE key = ? AND tier = ?",
        [(new.id, positions[o.key], o.key, o.tier) for o in new.objects],
    )


async def share(db: Db, manifest: str, source: str, count: int) -> None:
    """Let a manifest hold what another one has at its first `count` positions."""
    await db.run(
        """INSERT INTO manifest_objects SELECT ?, position, object FROM manifest_objects
        WHERE manifest = ? AND position < ?""",
        manifest,
        source,
        count,
    )


async def manifest(db: Db, window: Window) -> Manifest:
    """Return a window's manifest, with its objects under the window's salt.

    Raises `window_not_found` if it has just been deleted.
    """
    row = await db.one("SELECT token_ids FROM manifests WHERE id = ?", window.manifest)
    if row is None:
        raise _deleted()
    return Manifest(window.manifest, array("I", row[0]), await _objects(db, window))


async def pinned(db: Db, window: Window) -> tuple[PinnedObject, ...]:
    """Return only the objects of a window's manifest. Raises as `manifest` does."""
    await _check_exists(db, window)
    return await _objects(db, window)


async def sizes(db: Db, window: Window) -> dict[str, dict[str, int]]:
    """Return the bytes of each object of a window by tier and key, unordered. Raises as `manifest` does."""
    by_tier: dict[str, dict[str, int]] = {}
    for tier, size, pins in await db.all(_SIZES_OF, window.manifest):
        keys: Iterable[str] = pins.split(_SEPARATOR)
        if window.salt != window.pin_salt:
            keys = (with_salt(key, window.salt) for key in keys)
        by_tier.setdefault(tier, {}).update(dict.fromkeys(keys, size))
    await _check_exists(db, window)  # now: what was read before is all of it, also without a snapshot
    return by_tier


async def _check_exists(db: Db, window: Window) -> None:
    if not await _any(db, "SELECT 1 FROM manifests WHERE id = ?", window.manifest):
        raise _deleted()


def _deleted() -> GatewayError:
    return GatewayError("window_not_found", "the window was just deleted")


async def _objects(db: Db, window: Window) -> tuple[PinnedObject, ...]:
    rows = await db.all(_OBJECTS_OF, window.manifest)
    if window.salt == window.pin_salt:
        return tuple(map(PinnedObject._make, rows))
    return tuple(
        PinnedObject(with_salt(key, window.salt), tier, size, digest, key) for key, tier, size, digest, _ in rows
    )


async def release(db: Db, deleted: Window) -> Released:
    """Delete what only a window needed that has just been deleted."""
    keys = [key for (key,) in await db.all(_KEYS_OF, deleted.manifest)]
    names: list[str] = []
    if deleted.salt != deleted.pin_salt and not await _any(
        db, "SELECT 1 FROM windows WHERE salt = ? LIMIT 1", deleted.salt
    ):
        names = [with_salt(key, deleted.salt) for key in keys]
    pins: list[str] = []
    if not await _any(db, "SELECT 1 FROM windows WHERE manifest = ? LIMIT 1", deleted.manifest):
        await db.run("DELETE FROM manifest_objects WHERE manifest = ?", deleted.manifest)
        await db.run("DELETE FROM manifests WHERE id = ?", deleted.manifest)
        pins = [key for key in keys if not await _any(db, _HOLDER, key)]
        await db.many("DELETE FROM objects WHERE key = ?", [(key,) for key in pins])
    return Released(tuple(map(ObjectKey.parse, pins)), tuple(map(ObjectKey.parse, names)))


async def _any(db: Db, query: str, value: str) -> bool:
    return await db.one(query, value) is not None


async def objects(db: Db, keys: Sequence[ObjectKey]) -> list[PinnedObject]:
    """Return those of `keys` that windows hold, one entry for each tier."""
    query = "SELECT key, tier, size, checksum FROM objects WHERE key IN ({})"
    names = [str(key) for key in keys]
    return [PinnedObject(*row) for batch in batches(names) for row in await db.all(query.format(marks(batch)), *batch)]


async def held_bytes(db: Db, tenant: str, more: Sequence[PinnedObject]) -> int:
    """Return the bytes that a tenant's windows would hold with `more`, shared objects counted once."""
    total = await db.value(
        """SELECT CAST(coalesce(sum(size), 0) AS BIGINT) FROM objects WHERE number IN
        (SELECT m.object FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest WHERE w.tenant = ?)""",
        tenant,
    )
    query = f"""SELECT 1 FROM {_OBJECTS} JOIN windows w ON w.manifest = m.manifest
        WHERE o.key = ? AND o.tier = ? AND w.tenant = ? LIMIT 1"""
    return int(total) + sum([o.size for o in more if not await db.one(query, o.pin_key, o.tier, tenant)])


async def held_objects(db: Db) -> set[ObjectKey]:
    """Return every object that a window holds."""
    return {ObjectKey.parse(key) for (key,) in await db.all("SELECT DISTINCT key FROM objects")}


async def isolated_names(db: Db) -> set[ObjectKey]:
    """Return the keys under which LMCache may have the objects of isolated clones, whose pins have other keys."""
    rows = await db.all(
        """SELECT DISTINCT o.key, w.salt FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest
        JOIN objects o ON o.number = m.object WHERE w.salt != w.pin_salt"""
    )
    return {ObjectKey.parse(with_salt(key, salt)) for key, salt in rows}


async def held_under(db: Db, salt: str) -> set[ObjectKey]:
    """Return the objects under a salt that windows hold, including those that LMCache has of isolated clones."""
    rows = await db.all(
        f"""SELECT DISTINCT o.key FROM {_OBJECTS} WHERE m.manifest IN
        (SELECT manifest FROM windows WHERE salt = ?1 UNION SELECT manifest FROM windows WHERE pin_salt = ?1)""",
        salt,
    )
    return {replace(ObjectKey.parse(key), salt=salt) for (key,) in rows}


async def tier_usage(db: Db) -> dict[str, tuple[int, int]]:
    """Return the objects and bytes that windows hold, by tier, each object counted once."""
    rows = await db.all("SELECT tier, count(*), CAST(sum(size) AS BIGINT) FROM objects GROUP BY tier")
    return {tier: (count, size) for tier, count, size in rows}

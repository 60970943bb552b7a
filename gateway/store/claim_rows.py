"""The SQL of claims on KV objects: who is pinning them, and who is removing them. The caller owns the transaction.

Pinning and removing take long, and no transaction and no lock may be held meanwhile. So a freeze claims its objects
before it pins them, and the transaction that adds its window ends the claim. Whoever removes something claims that too,
and gets only what neither a window nor another claim names. A claim ends with its gateway, which another one notices
(`take_over`): what no window names is removed then.

Two of these transactions never run at the same time (`Database.run_write`), so each sees the claims of all others.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from gateway.kv.keys import ObjectKey
from gateway.records import Manifest, Session, Window
from gateway.store import manifest_rows, text_rows, window_rows
from gateway.store.database import Db
from gateway.store.types import Claimed, ClaimLost, Member, Released, Text

Kind = Literal["keep", "write", "remove"]
"""What a claim is for: to pin or read what is there, to write pins oneself (an import), or to remove them.

Several may keep an object at the same time. Nobody else has a claim on one that is written or removed.
"""

_EVERYTHING = "*"  # in place of a salt
_OF_DEAD = "gateway NOT IN (SELECT id FROM gateways WHERE until > ?)"
_OF_SALT = "SELECT kind, keys FROM pin_claims WHERE salt = ?"


async def claim(db: Db, member: Member, new: str, keys: Sequence[ObjectKey], *, write: bool) -> bool:
    """Claim objects that will be pinned, as `new`; return False while somebody else removes or writes some of them.

    Raises ClaimLost if the gateway's lease has ended.
    """
    await _check_alive(db, member)
    if await db.one("SELECT 1 FROM pin_claims WHERE salt = ?", _EVERYTHING):
        return False
    groups = _by_salt(keys)
    for salt, wanted in groups.items():
        others = _addresses([keys for kind, keys in await db.all(_OF_SALT, salt) if write or kind != "keep"])
        if any(key.address in others for key in wanted):
            return False
    for group in groups.values():
        await _add(db, new, member, "write" if write else "keep", group)
    return True


async def claim_everything(db: Db, member: Member, new: str) -> bool:
    """Claim the removal of whatever no window holds, if no other gateway is alive: meanwhile nothing can be claimed."""
    await _check_alive(db, member)
    alive = await db.one("SELECT 1 FROM gateways WHERE id != ? AND until > ?", member.id, await db.now())
    if alive or await db.one("SELECT 1 FROM pin_claims"):
        return False
    await db.run(f"INSERT INTO pin_claims VALUES (?, '{_EVERYTHING}', ?, 'remove', '')", new, member.id)
    return True


async def claim_removal(db: Db, member: Member, new: str, keys: Sequence[ObjectKey], *, ending: str = "") -> Claimed:
    """Claim those of `keys` that neither a window nor another claim names, to remove them; `ending` ends thereby.

    Raises ClaimLost if the gateway's lease has ended.
    """
    await _check_alive(db, member)
    await end_claim(db, ending)
    return await _claim_free(db, member, new, keys)


async def end_claim(db: Db, claim_id: str) -> None:
    """End a claim: what it was for has been done."""
    await db.run("DELETE FROM pin_claims WHERE id = ?", claim_id)


async def add_window(
    db: Db, member: Member, claim_id: str, new: Window, manifest: Manifest, text: Text, *,
    session: Session | None = None, wanted: bool = True,
) -> tuple[Window | None, Claimed]:  # fmt: skip
    """Commit a window as `text_rows.add_window` does, which ends the claim on its objects.

    Also claims the removal of what was claimed and is not part of the window. Raises ClaimLost if the claim has ended:
    then some of it may have been removed.
    """
    mine = "SELECT keys FROM pin_claims WHERE id = ? AND gateway = ? AND kind != 'remove'"
    rows = await db.all(mine, claim_id, member.id)
    if not rows:
        there = await window_rows.window(db, new.tenant, new.name)
        if there is None or there.manifest != new.manifest:
            raise ClaimLost
        return there, Claimed()  # this very transaction is done again: the answer to its commit was lost
    added = await text_rows.add_window(db, new, manifest, text, session=session, wanted=wanted)
    if added is None:
        return None, Claimed()  # the claim is still needed: it ends when its pins have been removed
    await end_claim(db, claim_id)
    held = {one.pin_key for one in manifest.objects}
    left = [key for (keys,) in rows for key in keys.split("\n") if key not in held]
    return added, await _claim_free(db, member, claim_id, list(map(ObjectKey.parse, left)))


async def delete_window(
    db: Db, member: Member, new: str, tenant: str, name: str, *, expired_by: float | None = None,
    automatic_of: str | None = None,
) -> tuple[Released | None, Claimed]:  # fmt: skip
    """Delete a window as `window_rows.delete_window` does, and claim the removal of what nothing holds any more.

    Raises ClaimLost if the gateway's lease has ended.
    """
    await _check_alive(db, member)
    released = await window_rows.delete_window(db, tenant, name, expired_by=expired_by, automatic_of=automatic_of)
    if released is None:
        return None, Claimed()
    return released, await _claim_free(db, member, new, [*released.pins, *released.names], held=False)


async def any_dead(db: Db) -> bool:
    """Whether there are claims of gateways that have ended."""
    return await db.one(f"SELECT 1 FROM pin_claims WHERE {_OF_DEAD} LIMIT 1", await db.now()) is not None


async def take_over(db: Db, member: Member, new: str, abandoned: Collection[str] = ()) -> Claimed:
    """Claim the removal of what is named by the claims of gateways that have ended, and by those `abandoned`.

    Without what a window or a live claim names. Raises ClaimLost if the gateway's lease has ended.
    """
    await _check_alive(db, member)
    dead = await db.all(f"SELECT id, keys FROM pin_claims WHERE {_OF_DEAD}", await db.now())
    for one in abandoned:
        dead += await db.all("SELECT id, keys FROM pin_claims WHERE id = ? AND gateway = ?", one, member.id)
    for one, _ in dead:
        await end_claim(db, one)
    names = dict.fromkeys(key for _, keys in dead for key in keys.split("\n") if key)
    return await _claim_free(db, member, new, [ObjectKey.parse(name) for name in names])


async def _check_alive(db: Db, member: Member) -> None:
    """Renew the gateway's lease. Raises ClaimLost if it has ended: others have taken over its claims."""
    now = await db.now()
    if not await db.run("UPDATE gateways SET until = ? WHERE id = ?", now + member.ttl_s, member.id):
        raise ClaimLost


async def _claim_free(db: Db, member: Member, new: str, keys: Sequence[ObjectKey], *, held: bool = True) -> Claimed:
    """Claim the removal of what no other claim names, and no window; unless `held`, no window does."""
    free: list[ObjectKey] = []
    busy = 0
    for salt, wanted in _by_salt(keys).items():
        claimed = _addresses([keys for _, keys in await db.all(_OF_SALT, salt)])
        needed = {key.address for key in await manifest_rows.held_under(db, salt)} if held else set()
        unneeded = [key for key in wanted if key.address not in needed]
        idle = [key for key in unneeded if key.address not in claimed]
        busy += len(unneeded) - len(idle)
        free += idle
        if idle:
            await _add(db, new, member, "remove", idle)
    return Claimed(new if free else "", member.id, tuple(free), busy)


async def _add(db: Db, claim_id: str, member: Member, kind: Kind, keys: Sequence[ObjectKey]) -> None:
    """Add the claim on objects of one salt."""
    await db.run(
        "INSERT INTO pin_claims (id, salt, gateway, kind, keys) VALUES (?, ?, ?, ?, ?)",
        claim_id, keys[0].salt, member.id, kind, "\n".join(map(str, keys)),
    )  # fmt: skip


def _by_salt(keys: Iterable[ObjectKey]) -> dict[str, list[ObjectKey]]:
    groups: dict[str, list[ObjectKey]] = {}
    for key in keys:
        groups.setdefault(key.salt, []).append(key)
    return groups


def _addresses(lists: Iterable[str]) -> set[tuple[int, int, str, str]]:
    """The addresses of all keys in these lists."""
    return {ObjectKey.parse(key).address for keys in lists for key in keys.split("\n") if key}

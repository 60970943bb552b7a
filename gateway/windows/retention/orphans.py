"""Delete KV that no session and no window needs any more from every tier.

What LMCache stored for a session has its salt, which thaws and forks of one lineage share. When a session or a window
is deleted, the store marks its salts as orphaned, in the same transaction. Of an orphaned salt that no other session
uses, everything is deleted that no window holds. The salt stays marked until a later pass finds nothing left: LMCache
writes to its tiers after the reply, so what the last turn computed may arrive after the first pass.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from gateway.kv.keys import ObjectKey
from gateway.sessions.resolver import session_not_found
from gateway.settings import Settings
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.delete import drop_from_cache

_WRITTEN_S = 30.0  # by then LMCache has written what it had to write
BATCH = 1000  # objects claimed at once
_SESSIONS_BATCH = 500


@dataclass(frozen=True, slots=True)
class OrphansDeleted:
    """What was deleted, a pin and its object counted once.

    `kept` counts the salts that are still needed, `claimed` the objects that somebody is pinning or reading.
    """

    blocks_deleted: int = 0
    space_freed_bytes: int = 0
    warnings: tuple[str, ...] = ()
    kept: int = 0
    claimed: int = 0

    def __add__(self, other: "OrphansDeleted") -> "OrphansDeleted":
        return OrphansDeleted(
            self.blocks_deleted + other.blocks_deleted,
            self.space_freed_bytes + other.space_freed_bytes,
            tuple(dict.fromkeys((*self.warnings, *other.warnings))),
            self.kept + other.kept,
            self.claimed + other.claimed,
        )


@instrumented
async def delete_session(ctx: OperationContext, session_id: str) -> OrphansDeleted:
    """Delete a session, and the KV that only it needed. Raises `session_not_found`, `session_busy`."""
    services, tenant = ctx.services, ctx.tenant
    # A turn in flight would create the session again when it is recorded.
    await services.turns.wait_until_idle(tenant, session_id, services.settings.busy_wait_s)
    salts = set(await services.store.salts_of(tenant, session_id))
    if not await services.store.delete_session(tenant, session_id):
        raise session_not_found(session_id)
    deleted = await delete_orphans(services, salts)
    if deleted.kept:
        shared = "another session of this lineage needs its cache: it stays until the last of them is deleted"
        return replace(deleted, warnings=(shared, *deleted.warnings))
    return deleted


async def delete_idle_sessions(services: Services, *, expire: bool = True) -> tuple[int, int]:
    """Delete the sessions beyond `sessions_kept`, and those past `session_ttl_s`; return how many of each."""
    beyond = await services.store.forget_idle(services.settings.sessions_kept)
    expire = expire and bool(services.settings.session_ttl_s)
    return beyond, await _delete_expired(services, expired_by(services.settings)) if expire else 0


def expired_by(settings: Settings) -> float:
    """Sessions that were last active before this are past `session_ttl_s`: the next sweep deletes them."""
    return time.time() - settings.session_ttl_s if settings.session_ttl_s else 0.0


async def _delete_expired(services: Services, since: float) -> int:
    expired = 0
    while True:
        idle = await services.store.idle_sessions(since, _SESSIONS_BATCH)
        deleted = [
            await services.store.delete_session(tenant, session_id, idle_since=since)
            for tenant, session_id in idle
            if not await services.turns.has_turn_in_flight(tenant, session_id)
        ]
        expired += sum(deleted)
        if not any(deleted) or len(idle) < _SESSIONS_BATCH:
            return expired


async def delete_orphans(services: Services, salts: Collection[str] | None = None) -> OrphansDeleted:
    """Delete what has an orphaned salt, or one of `salts`, and is not needed. What fails now is left to the next call.

    Each tier is read once, however many salts there are.
    """
    orphaned = [one for one in await services.store.orphaned_salts() if salts is None or one.salt in salts]
    idle = [one for one in orphaned if not await services.turns.lineage_has_turn_in_flight(one.tenant, one.lineage)]
    deleted = OrphansDeleted(kept=len(orphaned) - len(idle))
    if not idle:
        return deleted
    began = time.time()
    found, warnings = await services.pins.keys_with_salt({one.salt for one in idle})
    deleted += OrphansDeleted(warnings=tuple(warnings))
    by_salt = group_by_salt(found)
    for one in idle:
        part = await _delete_salt(services, one.salt, by_salt.get(one.salt, []))
        deleted += part
        # If a session uses it again, the deletion of that session will mark it again.
        dealt_with = not (warnings or part.warnings or part.claimed)
        if part.kept or (began - one.since > _WRITTEN_S and dealt_with):
            await services.store.clear_orphan(one)
    return deleted


async def _delete_salt(services: Services, salt: str, keys: Sequence[ObjectKey]) -> OrphansDeleted:
    if await services.store.salt_in_use(salt):
        return OrphansDeleted(kept=1)
    deleted = OrphansDeleted()
    for start in range(0, len(keys), BATCH):
        deleted += await _delete_batch(services, salt, keys[start : start + BATCH])
        if deleted.kept:
            return deleted
    return deleted


async def _delete_batch(services: Services, salt: str, keys: Sequence[ObjectKey]) -> OrphansDeleted:
    async with services.claims.removing(keys) as removal:
        if await services.store.salt_in_use(salt):
            return OrphansDeleted(kept=1)
        free = removal.claimed.keys
        freed, warnings = await removal.remove(free, originals=True)
    warnings += await drop_from_cache(services, free)
    return OrphansDeleted(len(free), freed, tuple(warnings), claimed=removal.claimed.busy)


def group_by_salt(keys: Iterable[ObjectKey]) -> dict[str, list[ObjectKey]]:
    """The keys of each salt."""
    groups: dict[str, list[ObjectKey]] = {}
    for key in keys:
        groups.setdefault(key.salt, []).append(key)
    return groups

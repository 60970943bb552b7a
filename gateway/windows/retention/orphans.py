"""Delete KV that no session and no window needs any more from every tier.

What LMCache stored for a session lies under its salt, which thaws and forks of one lineage share. When a session (or a
window) goes, the store notes its salts as loose, in the same transaction. Under a loose salt that no other session
uses, everything goes that no window holds. The salt stays noted until a later look finds it clean: LMCache writes to
its tiers after the reply, so what the last turn computed may land when we have looked already.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.kv.keys import ObjectKey
from gateway.sessions.resolver import session_not_found
from gateway.settings import Settings
from gateway.store.types import OrphanedSalt
from gateway.windows.context import Services
from gateway.windows.delete import drop_from_cache
from gateway.windows.instrumented import instrumented

_LANDED_S = 30.0  # by then what LMCache had to write is written
_AT_ONCE = 1000  # objects removed while freezes wait
_IDLE_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was really removed, a pin and its object counted once; `kept` are salts that are still needed."""

    blocks_deleted: int = 0
    space_freed_bytes: int = 0
    warnings: tuple[str, ...] = ()
    kept: int = 0

    def __add__(self, other: "Forgotten") -> "Forgotten":
        return Forgotten(
            self.blocks_deleted + other.blocks_deleted,
            self.space_freed_bytes + other.space_freed_bytes,
            tuple(dict.fromkeys((*self.warnings, *other.warnings))),
            self.kept + other.kept,
        )


@instrumented
async def delete_session(services: Services, tenant: str, session_id: str) -> Forgotten:
    """Delete a session, and the KV that only it needed. Raises `session_not_found`, `session_busy`."""
    # A turn that is going on would make the session anew when it is recorded.
    await services.turns.wait_until_idle(tenant, session_id, services.settings.busy_wait_s)
    salts = set(await services.store.salts_of(tenant, session_id))
    if not await services.store.delete_session(tenant, session_id):
        raise session_not_found(session_id)
    done = await forget(services, [one for one in await services.store.orphaned_salts() if one.salt in salts])
    if done.kept:
        shared = "another session of this lineage needs its cache: it stays until the last of them is deleted"
        return replace(done, warnings=(shared, *done.warnings))
    return done


async def forget_sessions(services: Services, *, expire: bool = True) -> tuple[int, int]:
    """Delete the sessions beyond `sessions_kept`, and those past `session_ttl_s`; return how many of each."""
    beyond = await services.store.forget_idle(services.settings.sessions_kept)
    expire = expire and bool(services.settings.session_ttl_s)
    return beyond, await _expire(services, expired_by(services.settings)) if expire else 0


def expired_by(settings: Settings) -> float:
    """Sessions that were last active before this are past `session_ttl_s`: the next sweep forgets them."""
    return time.time() - settings.session_ttl_s if settings.session_ttl_s else 0.0


async def _expire(services: Services, since: float) -> int:
    expired = 0
    while True:
        idle = await services.store.idle_sessions(since, _IDLE_AT_ONCE)
        gone = [
            await services.store.delete_session(tenant, session_id, idle_since=since)
            for tenant, session_id in idle
            if not services.turns.has_turn_in_flight(tenant, session_id)
        ]
        expired += sum(gone)
        if not any(gone) or len(idle) < _IDLE_AT_ONCE:
            return expired


async def forget_loose(services: Services) -> Forgotten:
    """See to every salt that was let go of; what could not be done now is done at the next call."""
    return await forget(services, await services.store.orphaned_salts())


async def forget(services: Services, salts: Sequence[OrphanedSalt]) -> Forgotten:
    """Remove what lies under `salts` and is not needed; each tier is read once, however many they are."""
    quiet = [one for one in salts if not services.turns.lineage_has_turn_in_flight(one.tenant, one.lineage)]
    done = Forgotten(kept=len(salts) - len(quiet))
    if not quiet:
        return done
    began = time.time()
    found, warnings = await services.pins.keys_with_salt({one.salt for one in quiet})
    done += Forgotten(warnings=tuple(warnings))
    by_salt = _by_salt(found)
    for one in quiet:
        part = await _forget(services, one, by_salt.get(one.salt, []))
        done += part
        # Where a session has it again, that session's end will bring it back.
        if part.kept or (began - one.since > _LANDED_S and not warnings and not part.warnings):
            await services.store.clear_orphan(one)
    return done


async def _forget(services: Services, gone: OrphanedSalt, keys: Sequence[ObjectKey]) -> Forgotten:
    if await services.store.salt_in_use(gone.salt):
        return Forgotten(kept=1)
    done = Forgotten()
    for start in range(0, len(keys), _AT_ONCE):
        done += await _remove(services, gone.salt, keys[start : start + _AT_ONCE])
        if done.kept:
            return done
    return done


async def _remove(services: Services, salt: str, keys: Sequence[ObjectKey]) -> Forgotten:
    async with services.pins.lock.acquire(exclusive=True):
        if await services.store.salt_in_use(salt):
            return Forgotten(kept=1)
        free = not_held(keys, await services.store.held_under(salt))
        freed, warnings = await services.pins.remove(free, originals=True)
    warnings += await drop_from_cache(services, free)
    return Forgotten(len(free), freed, tuple(warnings))


def not_held(keys: Iterable[ObjectKey], held: Iterable[ObjectKey]) -> list[ObjectKey]:
    """Those of `keys` that are at none of the addresses of `held`."""
    addresses = {key.address for key in held}
    return [key for key in keys if key.address not in addresses]


def _by_salt(keys: Iterable[ObjectKey]) -> Mapping[str, list[ObjectKey]]:
    found: dict[str, list[ObjectKey]] = {}
    for key in keys:
        found.setdefault(key.salt, []).append(key)
    return found

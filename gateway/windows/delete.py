"""Delete a window, and every KV object that nothing else holds, from every tier."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Tier
from gateway.windows.catalog import get_window, window_not_found
from gateway.windows.context import OperationContext, Services, instrumented


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion did."""

    blocks_deleted: int
    space_freed_bytes: int
    blocks_kept: int
    warnings: tuple[str, ...]


@instrumented
async def delete(
    ctx: OperationContext, name: str, *, expired_by: float | None = None, automatic_of: str | None = None
) -> Deleted:
    """Delete a window. Raises `window_not_found`.

    With `expired_by` only one that had expired by then, with `automatic_of` only an automatic one of that session.

    Objects that another window holds, or is about to, stay. While a session of the lineage is active under the window's
    salt (a frozen one is not), LMCache's own objects stay too, as that session's cache, and only the pins are removed.
    """
    services, tenant = ctx.services, ctx.tenant
    await get_window(services, tenant, name)
    await services.recorder.flush()
    deleting = services.claims.deleting(tenant, name, expired_by=expired_by, automatic_of=automatic_of)
    async with deleting as (released, removal):
        if released is None or released.window is None:  # deleted by another call, or its expiry was extended
            raise window_not_found(name)
        window = released.window  # perhaps not the one found above: another may have got the name
        in_use = await services.turns.is_active(tenant, window.lineage, window.salt)
        # The pins of an isolated clone have its source's names, which the source's own sessions may still use.
        own = window.pin_salt == window.salt
        keep = in_use if own else await services.store.salt_in_use(window.pin_salt)
        freed, warnings = await removal.remove(released.pins, originals=not keep)
        names = () if in_use else released.names
        more, _ = await removal.remove(names, originals=True)
        removed = set(removal.claimed.keys)  # the rest is being pinned again
    if in_use:
        session = await services.store.active_session(tenant, window.lineage, window.salt)
        who = f"session {session!r}" if session else "a session"
        warnings.append(
            f"{who} of its lineage is still active or thawed, and may use the KV: the cache keeps it for now"
        )
    dropped = [key for key in (*names, *(() if keep else released.pins)) if key in removed]
    warnings += await drop_from_cache(services, dropped)
    deleted = 0 if keep or in_use else sum(key in removed for key in released.pins)
    return Deleted(deleted, freed + more, window.chunk_count * window.world_size - deleted, tuple(warnings))


async def drop_from_cache(
    services: Services, keys: Sequence[ObjectKey], tiers: Sequence[Tier] | None = None
) -> list[str]:
    """Drop the objects from every LMCache's memory and from its index of each tier, or of `tiers`. Returns warnings.

    LMCache would wait for a tier that hangs: of such a one, only its memory drops them. A server remembers what it has
    seen in a shared tier, so each of them is told, and one that is not reached keeps no other from being told.
    """
    if services.cache is None or not keys:
        return []
    tiers = services.pins.tiers if tiers is None else tiers
    places: list[tuple[str, str | None]] = [("l1", None)] if any(tier.suspended for tier in tiers) else []
    places += [("all", tier.adapter) for tier in tiers if not tier.suspended]
    warnings: list[str] = []
    for place, adapter in places:
        try:
            await services.cache.delete(keys, tier=place, adapter=adapter)
        except GatewayError as error:
            warnings.append(error.message)
    return list(dict.fromkeys(warnings))

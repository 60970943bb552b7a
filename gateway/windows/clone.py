"""Clone: another name for the same pins. No KV byte is copied, no file is created.

An isolated clone has a salt of its own, so that neither lineage can find the other's KV. KV bytes do not depend on the
salt: only the names do under which LMCache finds them. So it shares its source's pins like any clone; a thaw then gives
LMCache the objects under the clone's own names, on disk as links. This is impossible where LMCache encrypts with a key
made from the salt: then the clone has only the text and the token ids, and a warning.
"""

import time
from dataclasses import replace
from uuid import uuid4

from gateway.records import Manifest, Window
from gateway.sessions.salts import ISOLATED
from gateway.windows.at_turn import held_at
from gateway.windows.catalog import NewWindow, get_usable_window, served_model
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.freeze import Naming, window_name_taken


@instrumented
async def clone(ctx: OperationContext, source: str, naming: Naming, at_turn: int | None = None) -> NewWindow:
    """Give a window, or its beginning up to a turn, a second name with a life of its own; what `naming` leaves out is
    copied.

    Raises `window_not_found`, `window_already_exists`, and with a turn what `held_at` raises, and `model_mismatch`.
    """
    original = await get_usable_window(ctx.services, ctx.tenant, source)
    held, manifest = await _beginning(ctx, original, at_turn)
    return NewWindow(await add_copy(ctx.services, renamed(held, naming, manifest), original, manifest))


@instrumented
async def isolate(ctx: OperationContext, source: str, naming: Naming, at_turn: int | None = None) -> NewWindow:
    """Clone a window, or its beginning up to a turn, into a lineage of its own; what `naming` leaves out is copied.

    Raises what `clone` raises, and `cache_unavailable`.
    """
    services = ctx.services
    original = await get_usable_window(services, ctx.tenant, source)
    held, manifest = await _beginning(ctx, original, at_turn)
    lineage = ISOLATED + uuid4().hex
    salt = services.salts.of(ctx.tenant, lineage, original.fingerprint)
    copy = replace(renamed(held, naming, manifest), lineage=lineage, salt=salt)
    if not await _is_encrypted(services, held):
        return NewWindow(await add_copy(services, copy, original, manifest))
    bare = replace(copy, pin_salt=salt, chunk_count=0, size_bytes=0, kv="absent", manifest=uuid4().hex)
    manifest = replace(manifest or await services.store.manifest(original), id=bare.manifest, objects=())
    warning = "LMCache encrypts by salt (aesgcm): only text and token ids are isolated, a thaw computes the KV again"
    return NewWindow(await add_copy(services, bare, original, manifest), (warning,))


async def _beginning(ctx: OperationContext, original: Window, at_turn: int | None) -> tuple[Window, Manifest | None]:
    """The window up to a turn, and a manifest for that without objects, which the store adds; None for all of it."""
    if at_turn is None:
        return original, None
    model = await served_model(ctx.services, original)
    held = await held_at(ctx, original, model, at_turn)
    if held.window is original:
        return original, None
    return held.window, Manifest(uuid4().hex, held.manifest.token_ids, ())


def renamed(original: Window, naming: Naming, manifest: Manifest | None = None) -> Window:
    """The window under its second name, with a manifest of its own if there is one."""
    return replace(
        original,
        name=naming.name,
        manifest=manifest.id if manifest else original.manifest,
        description=original.description if naming.description is None else naming.description,
        tags=original.tags if naming.tags is None else naming.tags,
        parent=original.name,
        created_at=time.time(),
        expires_at=None,
    )


async def add_copy(services: Services, copy: Window, original: Window, manifest: Manifest | None) -> Window:
    """Commit a copy. Raises `window_already_exists`, and `window_not_found` if its source was deleted meanwhile.

    The store checks for the source when it commits, so no lock on the pins is needed: a deletion before that leaves no
    source, and one after it finds that the copy holds the pins.
    """
    committed = await services.store.copy_window(copy, original, manifest)
    if committed is None:
        raise window_name_taken(copy.name)
    return committed


async def _is_encrypted(services: Services, window: Window) -> bool:
    """Whether the bytes would be unreadable under another salt."""
    if services.cache is None or not window.chunk_count:
        return False
    return await services.cache.encrypts_by_salt()

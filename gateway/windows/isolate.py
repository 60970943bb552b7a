"""Isolate: a clone under a salt of its own, so that nobody in the source's lineage can find its KV, nor it theirs.

KV bytes do not depend on the salt: only the names of the objects do. So each object gets a second name under the new
salt, on disk a hard link, and no byte is computed. Not where LMCache encrypts with a key made from the salt: then the
clone has the text and the token ids, and says so.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.contract import TierFull
from gateway.parts import Parts
from gateway.records import Manifest, PinnedObject, Window
from gateway.sessions import ISOLATED
from gateway.windows.counted import counted
from gateway.windows.freeze import Naming, release_strays, storage_full, taken
from gateway.windows.thaw import found, object_names, usable, whole_chunks

_BY_SALT = "aesgcm"  # LMCache's serde whose key is made from the salt


@counted
async def isolate(parts: Parts, tenant: str, source: str, naming: Naming) -> tuple[Window, list[str]]:
    """Clone a window into a lineage of its own; return it, and warnings where it is less than its source.

    Raises `window_not_found`, `window_already_exists`, `cache_unavailable`, `storage_full`. What `naming` leaves empty
    is the source's.
    """
    original = await usable(parts, tenant, source)
    if await parts.store.window(tenant, naming.name):
        raise taken(naming.name)
    encrypted = await _encrypted(parts, original)
    lineage = ISOLATED + uuid4().hex
    salt = parts.salts.of(tenant, lineage, original.fingerprint)
    try:
        async with parts.pins.lock.hold(alone=False):
            original = await found(parts, tenant, source)
            manifest = await parts.store.manifest(original.manifest)
            objects, warnings = ([], [encrypted]) if encrypted else await _adopt(parts, original, manifest, salt)
            copy = _copy(original, naming, lineage, salt, objects)
            if copy.chunk_count < original.chunk_count and not encrypted:
                warnings.append(f"{copy.chunk_count} of {original.chunk_count} chunks could be named anew")
            if not await parts.store.add_window(copy, Manifest(copy.manifest, manifest.token_ids, tuple(objects))):
                raise taken(naming.name)
    except TierFull as error:
        await release_strays(parts)
        raise storage_full(error) from error
    except GatewayError:
        await release_strays(parts)
        raise
    return copy, warnings


async def _encrypted(parts: Parts, window: Window) -> str:
    """Why the bytes would be unreadable under another salt; empty where they are not."""
    if parts.cache is None or not window.chunk_count:
        return ""
    serdes = [(adapter.get("serde") or {}).get("type") for adapter in (await parts.cache.info()).adapters]
    if _BY_SALT not in serdes:
        return ""
    return f"LMCache encrypts by salt ({_BY_SALT}): only text and token ids are isolated, a thaw computes the KV again"


async def _adopt(parts: Parts, window: Window, manifest: Manifest, salt: str) -> tuple[list[PinnedObject], list[str]]:
    """Give each object its name under the new salt; return them in chunk order, as many leading chunks as are whole."""
    names = {str(key): replace(key, salt=salt) for key in object_names(window, manifest)}
    adopted, warnings = await parts.pins.adopt([o for o in manifest.objects if o.key in names], names)
    whole = _whole(list(names.values()), window.world_size, {o.key for o in adopted})
    order = {key: index for index, key in enumerate(whole)}
    return sorted((o for o in adopted if o.key in order), key=lambda o: order[o.key]), warnings


def _whole(keys: Sequence[ObjectKey], world_size: int, have: set[str]) -> list[str]:
    """The keys of the leading chunks of which every rank is there."""
    whole: list[str] = []
    for start in range(0, len(keys), world_size):
        chunk = [str(key) for key in keys[start : start + world_size]]
        if not have.issuperset(chunk):
            break
        whole += chunk
    return whole


def _copy(original: Window, naming: Naming, lineage: str, salt: str, objects: Sequence[PinnedObject]) -> Window:
    sizes = {o.key: o.size for o in objects}
    chunks = len(sizes) // original.world_size
    return replace(
        original,
        name=naming.name,
        description=naming.description or original.description,
        tags=naming.tags or original.tags,
        lineage=lineage,
        salt=salt,
        chunk_count=chunks,
        size_bytes=sum(sizes.values()),
        kv="absent" if not chunks else "complete" if chunks == whole_chunks(original) else "partial",
        manifest=uuid4().hex,
        parent=original.name,
        created_at=time.time(),
        expires_at=None,
    )

"""Isolate: a clone under its own salt, so that neither lineage can find the other's KV.

KV bytes do not depend on the salt: only the names do under which LMCache finds them. So the clone shares its source's
pins, as every clone does, and nothing is made; a thaw then gives LMCache the objects under the clone's own names, on
disk by links. Not where LMCache encrypts with a key made from the salt: then the clone has the text and the token ids,
and says so.
"""

from dataclasses import replace
from uuid import uuid4

from gateway.records import Manifest, Window
from gateway.sessions.resolver import ISOLATED
from gateway.windows.catalog import get_usable_window
from gateway.windows.clone import add, copied
from gateway.windows.context import Services
from gateway.windows.freeze import Naming
from gateway.windows.instrumented import instrumented

_BY_SALT = "aesgcm"  # LMCache's serde whose key is made from the salt
_LATELY_S = 5.0  # LMCache changes its serde by a restart alone, which takes longer


@instrumented
async def isolate(services: Services, tenant: str, source: str, naming: Naming) -> tuple[Window, list[str]]:
    """Clone a window into a lineage of its own; return it, and warnings where it is less than its source.

    Raises `window_not_found`, `window_already_exists`, `cache_unavailable`. What `naming` leaves empty is the source's.
    """
    original = await get_usable_window(services, tenant, source)
    lineage = ISOLATED + uuid4().hex
    salt = services.salts.of(tenant, lineage, original.fingerprint)
    copy = replace(copied(original, naming), lineage=lineage, salt=salt)
    if not await _encrypted(services, original):
        return await add(services, copy, original, None), []
    bare = replace(
        copy, pin_salt=salt, chunk_count=0, size_bytes=0, kv="absent", manifest=uuid4().hex
    )  # fmt: skip
    ids = (await services.store.manifest(original)).token_ids
    return await add(services, bare, original, Manifest(bare.manifest, ids, ())), [
        f"LMCache encrypts by salt ({_BY_SALT}): only text and token ids are isolated, a thaw computes the KV again"
    ]


async def _encrypted(services: Services, window: Window) -> bool:
    """Whether the bytes would be unreadable under another salt."""
    if services.cache is None or not window.chunk_count:
        return False
    adapters = await services.cache.adapters(within_s=_LATELY_S)
    return _BY_SALT in [(adapter.get("serde") or {}).get("type") for adapter in adapters]

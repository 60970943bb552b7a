"""Windows to measure on: one large window with its KV objects in the tiers, and many small ones in the store.

No engine computes anything here: an object is random bytes, which makes no difference to the operations.
"""

import asyncio
import secrets
import time
from dataclasses import replace

from gateway.app import open_services
from gateway.kv.keys import object_keys
from gateway.records import Manifest, PinnedObject, Window
from gateway.settings import Settings
from gateway.store.types import Text
from gateway.windows.context import Services
from gateway.windows.ensure_stored import with_receipt

TENANT = "default"
LARGE = "large"
_SMALL_OBJECTS = 3
_CONCURRENCY = 500
_TOPICS = ("refactor the parser", "read the logs of the night", "plan the migration", "answer the customer")


async def fill(settings: Settings, model: str, *, chunks: int, chunk_size: int, object_bytes: int, windows: int) -> int:
    """Create the windows; return the total size of the large window's objects in bytes."""
    async with open_services(settings) as services:
        large = await _blank(services, model, LARGE, chunks * chunk_size + chunk_size // 2, chunk_size)
        ids = tuple(index % 50_000 for index in range(large.token_count))
        objects = await _pinned(services, large, ids, object_bytes)
        await _add(services, with_receipt(large, chunks, objects, 0.0, {}), ids, objects)
        await services.pins.check_and_restore(objects)  # into LMCache's tiers
        for start in range(0, windows, _CONCURRENCY):
            await asyncio.gather(*(_small(services, large, number) for number in range(start, start + _CONCURRENCY)))
        return sum(pinned.size for pinned in objects if pinned.tier == "disk")


def name_of(number: int) -> str:
    """Return the name of a small window."""
    return f"window-{number:05d}"


async def _blank(services: Services, model: str, name: str, tokens: int, chunk_size: int) -> Window:
    served = await services.engines.model(model)
    salt = services.salts.of(TENANT, name, served.fingerprint)
    return Window(
        tenant=TENANT, name=name, session_id=f"of-{name}", lineage=name, salt=salt, pin_salt=salt, model=model,
        model_root=served.root, fingerprint=served.fingerprint, world_size=1, token_count=tokens,
        chunk_size=chunk_size, chunk_count=0, size_bytes=0, kv="absent", transcript=b"", frame=None,
        manifest=f"m-{name}", created_at=time.time(),
    )  # fmt: skip


async def _pinned(services: Services, window: Window, ids: tuple[int, ...], size: int) -> tuple[PinnedObject, ...]:
    keys = object_keys(window.model_root, ids, window.chunk_size, 1, window.salt)
    return tuple([await tier.put(key, secrets.token_bytes(size)) for key in keys for tier in services.pins.tiers])


async def _small(services: Services, like: Window, number: int) -> None:
    name = name_of(number)
    salt = secrets.token_hex(16)
    ids = tuple(range(number, number + 900))
    keys = object_keys(like.model_root, ids, 256, 1, salt)[:_SMALL_OBJECTS]
    objects = [PinnedObject(str(key), "disk", 2**20, secrets.token_bytes(32)) for key in keys]
    window = replace(
        like, name=name, session_id=f"of-{name}", lineage=name, salt=salt, pin_salt=salt, token_count=len(ids),
        chunk_size=256, manifest=f"m-{name}", created_at=1.7e9 + number * 60,
        description=f"{_TOPICS[number % len(_TOPICS)]}, part {number}", tags=("auto", f"team-{number % 10}"),
    )  # fmt: skip
    await _add(services, with_receipt(window, _SMALL_OBJECTS, objects, 0.0, {}), ids, tuple(objects))


async def _add(services: Services, window: Window, ids: tuple[int, ...], objects: tuple[PinnedObject, ...]) -> None:
    messages = [{"role": "user", "content": window.name}, {"role": "assistant", "content": "yes"}]
    if not await services.store.add_window(window, Manifest(window.manifest, ids, objects), Text(messages, {})):
        raise RuntimeError(f"window {window.name!r} already exists")

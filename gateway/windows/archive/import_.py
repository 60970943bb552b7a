"""Import a window from a file, read as a stream; the window exists only once every byte was checked.

1. Read the manifest, and refuse what cannot be used here before anything large is read.
2. Read every member into a file without a name, which the kernel takes away if we die.
3. Under a salt of this gateway and a lineage of its own, pin the objects in each tier.
4. Commit. A crash before this leaves pins that the next sweep takes away.
5. Show the pins to LMCache under its own names, as a thaw would.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, object_keys
from gateway.kv.tiers.base import Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.runtime.progress import Progress, silent
from gateway.store.types import Text
from gateway.windows.archive import manifest as manifests
from gateway.windows.archive.file_format import Reader, object_name
from gateway.windows.archive.manifest import Contents, Record
from gateway.windows.archive.spool import Spool
from gateway.windows.archive.transcript import FiledText, read_text
from gateway.windows.context import Services
from gateway.windows.freeze import all_or_nothing, check_budget, window_name_taken
from gateway.windows.instrumented import instrumented
from gateway.windows.next_turn import next_turn_ids
from gateway.windows.receipt import with_receipt


@dataclass(frozen=True, slots=True)
class _ImportTarget:
    """What the window will be here. `keeps_kv`: its objects fit this gateway's cache and are placed."""

    fingerprint: str
    root: str
    keeps_kv: bool
    model: Model | None = None  # set where the text has to be rendered anew


@instrumented
async def import_window(
    services: Services, tenant: str, source: AsyncIterator[bytes], *, name: str | None = None, as_text: bool = False,
    progress: Progress = silent,
) -> tuple[Window, list[str]]:  # fmt: skip
    """Import a window from the bytes of its file, under `name` if given; return it, and warnings.

    `as_text` takes what was said and leaves the KV: for a model that is served otherwise here. Raises
    `invalid_request`, `window_corrupted`, `payload_too_large`, `too_complex`, `window_already_exists`,
    `model_mismatch`, `cache_unavailable`, `storage_full`, `engine_unreachable`; then nothing of it is there.
    """
    clock = time.monotonic()
    if name is not None:
        await _refuse_taken(services, tenant, name)
    reader = Reader(source)
    contents = await asyncio.to_thread(manifests.read, await reader.manifest())
    record = contents.record
    await _refuse_too_large(services, contents)
    await _refuse_taken(services, tenant, name or record.name)
    here, warnings = await (_as_text(services, record) if as_text else _as_it_is(services, record))
    async with Spool(services.settings.data_path, services.settings.disk_reserve_bytes) as spool:
        if here.keeps_kv:
            await spool.expect(sum(member.size for member in contents.objects))
        text = await read_text(reader, contents.texts)
        await _read_objects(reader, contents, spool if here.keeps_kv else None, progress)
        await reader.finish()
        window = _window(services, tenant, name or record.name, record, here)
        if here.model is not None:
            engine = services.engines.for_lineage(window.lineage)
            ids = await next_turn_ids(engine, here.model.id, text.frame, list(text.messages))
            text, window = replace(text, ids=ids), replace(window, token_count=len(ids))
        window, more = await _keep(services, window, record, contents, text, spool, clock, progress)
        return window, warnings + more


async def _refuse_taken(services: Services, tenant: str, name: str) -> None:
    if await services.store.window(tenant, name):
        raise window_name_taken(name)


async def _refuse_too_large(services: Services, contents: Contents) -> None:
    limit = services.settings.max_import_bytes
    size = await asyncio.to_thread(contents.size)
    if size > limit:
        raise GatewayError(
            "payload_too_large",
            f"the file says that it has {size} bytes, more than {limit}",
            hint="max_import_bytes sets the limit",
        )


async def _as_it_is(services: Services, record: Record) -> tuple[_ImportTarget, list[str]]:
    model = await services.engines.model(record.model)
    if (model.fingerprint, model.root) != (record.fingerprint, record.model_root):
        raise _mismatch(
            f"model {record.model!r} is served with other weights or settings than those of the window",
            {"window": record.fingerprint, "served": model.fingerprint},
        )
    here = _ImportTarget(model.fingerprint, model.root, keeps_kv=bool(record.chunk_count))
    if not record.chunk_count:
        return here, ["the file has no KV: a thaw computes it"]
    if services.cache is None or not services.pins.tiers:
        without = "no cache is configured (cache_url with kv_dir or kv_redis_url): only text and token ids were kept"
        return replace(here, keeps_kv=False), [without]
    info = await services.cache.info()
    served = (
        services.settings.chunk_size or info.chunk_size,
        info.world_sizes.get(model.root, 1),
        info.hash_algorithm,
    )
    if served != (record.chunk_size, record.world_size, "blake3"):
        raise _mismatch(
            f"this cache stores KV in another layout (chunk size, workers, hash: {served})",
            {"chunk_size": record.chunk_size, "world_size": record.world_size},
        )
    return here, []


async def _as_text(services: Services, record: Record) -> tuple[_ImportTarget, list[str]]:
    unbound = _ImportTarget(record.fingerprint, record.model_root, keeps_kv=False)
    try:
        model = await services.engines.model(record.model)
    except GatewayError as error:
        if error.code != "model_mismatch":
            raise
        return unbound, [f"{error.message}: the text can be read, but a thaw needs that model"]
    if (model.fingerprint, model.root) == (record.fingerprint, record.model_root):
        return unbound, []
    rendered = (
        "the model is served with other weights or settings: the text was rendered again, and a thaw computes its KV"
    )
    return _ImportTarget(model.fingerprint, model.root, keeps_kv=False, model=model), [rendered]


def _mismatch(message: str, details: dict[str, Any]) -> GatewayError:
    return GatewayError("model_mismatch", message, hint="import it as text (`as_text=true`)", details=details)


async def _read_objects(reader: Reader, contents: Contents, spool: Spool | None, progress: Progress) -> None:
    """Check every object, and keep it in `spool` if there is one."""
    count = len(contents.objects)
    for index, member in enumerate(contents.objects):
        async for piece in reader.pieces(object_name(index), member.size, member.blake3):
            if spool is not None:
                await spool.write(piece)
        progress("read", index + 1, count)


def _window(services: Services, tenant: str, name: str, record: Record, here: _ImportTarget) -> Window:
    lineage = f"import:{uuid4().hex}"
    salt = services.salts.of(tenant, lineage, here.fingerprint)
    return Window(
        tenant=tenant,
        name=name,
        session_id=record.session_id,
        lineage=lineage,
        salt=salt,
        pin_salt=salt,
        model=record.model,
        model_root=here.root,
        fingerprint=here.fingerprint,
        world_size=record.world_size,
        token_count=record.token_count,
        chunk_size=record.chunk_size,
        chunk_count=record.chunk_count if here.keeps_kv else 0,
        size_bytes=0,
        kv="absent",
        transcript=b"",
        frame=None,
        manifest=uuid4().hex,
        created_at=time.time(),
        description=record.description,
        tags=tuple(dict.fromkeys(record.tags)),
    )


async def _keep(
    services: Services, window: Window, record: Record, contents: Contents, text: FiledText, spool: Spool,
    clock: float, progress: Progress,
) -> tuple[Window, list[str]]:  # fmt: skip
    # One salt for the whole tenant: a freeze may be pinning the very keys that we write.
    async with all_or_nothing(services), services.pins.lock.acquire(exclusive=services.salts.per_tenant):
        objects, warnings = await _pin(services, window, contents, text.ids, spool, progress)
        done = with_receipt(window, window.chunk_count, objects, clock, _origin(record))
        progress("commit", 0, 0)
        await check_budget(services, window.tenant, objects)
        manifest = Manifest(done.manifest, text.ids, objects)
        committed = await services.store.add_window(done, manifest, Text(text.messages, text.frame))
        if committed is None:
            raise window_name_taken(window.name)
        _, more = await services.pins.restore(objects)
        return committed, warnings + more


async def _pin(
    services: Services, window: Window, contents: Contents, ids: Sequence[int], spool: Spool,
    progress: Progress,
) -> tuple[tuple[PinnedObject, ...], list[str]]:  # fmt: skip
    """Pin every object in each tier that can be reached. Raises TierFull, `cache_unavailable` where none can."""
    if not window.chunk_count:
        return (), []
    whole = ids[: window.chunk_count * window.chunk_size]
    keys = await asyncio.to_thread(
        object_keys, window.model_root, whole, window.chunk_size, window.world_size, window.salt
    )
    known = {(o.tier, o.key): o for o in await services.store.objects(keys)}
    pinned, warnings = await services.pins.each(
        lambda tier: _pin_in(tier, keys, contents, known, spool, progress), raise_full=True
    )
    if not pinned:
        raise GatewayError("cache_unavailable", warnings[-1], hint="try again, or import it as text (`as_text=true`)")
    return tuple(have[index] for index in range(len(keys)) for have in pinned.values()), warnings


async def _pin_in(
    tier: Tier, keys: Sequence[ObjectKey], contents: Contents, known: dict[tuple[str, str], PinnedObject],
    spool: Spool, progress: Progress,
) -> list[PinnedObject]:  # fmt: skip
    """Pin the objects in one tier; what a window holds there already stays as it is."""
    pinned = []
    await spool.rewind()
    for key, member in zip(keys, contents.objects, strict=True):
        value = await spool.read(member.size)
        pinned.append(known.get((tier.name, str(key))) or await tier.put(key, value))
        progress("place", len(pinned), len(keys))
    return pinned


def _origin(record: Record) -> dict[str, Any]:
    """What the file says of where it was frozen."""
    return {
        "imported": {
            "name": record.name,
            "lineage": record.lineage,
            "parent": record.parent,
            "created_at": record.created_at,
            "receipt": {k: v for k, v in record.receipt.items() if k != "imported"},
        }
    }

"""Import a window from a file, read as a stream; the window exists only once every byte was checked.

1. Read the manifest, and refuse what cannot be used here before anything large is read.
2. Read every member into an unnamed file, which the kernel deletes if we die.
3. With a salt of this gateway and a lineage of its own, pin the objects in each tier.
4. Commit. A crash before this leaves pins, and a claim by which another gateway removes them.
5. Restore the objects under LMCache's own names, as a thaw would.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.base import Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.store.types import Text
from gateway.windows.archive import manifest as manifests
from gateway.windows.archive.file_format import Reader, object_name
from gateway.windows.archive.manifest import Contents, Record
from gateway.windows.archive.spool import Spool
from gateway.windows.archive.transcript import FiledText, read_text
from gateway.windows.catalog import NewWindow, pinned_keys
from gateway.windows.claims import Claim
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.ensure_stored import NO_CACHE, with_receipt
from gateway.windows.freeze import check_budget, window_name_taken
from gateway.windows.next_turn import next_turn_ids
from gateway.windows.restore import put_back


@dataclass(frozen=True, slots=True)
class _Target:
    """What the window will be here. `keeps_kv`: its objects fit this gateway's cache and are pinned."""

    fingerprint: str
    root: str
    keeps_kv: bool
    model: Model | None = None  # set if the text has to be rendered again


@instrumented
async def import_window(
    ctx: OperationContext, source: AsyncIterator[bytes], *, name: str | None = None, as_text: bool = False
) -> NewWindow:
    """Import a window from the bytes of its file, under `name` if given.

    `as_text` imports the text without the KV, for a model that is served differently here. Raises `invalid_request`,
    `window_corrupted`, `payload_too_large`, `too_complex`, `window_already_exists`, `model_mismatch`,
    `cache_unavailable`, `storage_full`, `engine_unreachable`; then nothing was imported.
    """
    services, settings = ctx.services, ctx.services.settings
    if name is not None:
        await _refuse_taken(ctx, name)
    reader = Reader(source)
    contents = await asyncio.to_thread(manifests.read, await reader.manifest())
    record = contents.record
    await _refuse_too_large(contents, settings.max_import_bytes)
    await _refuse_taken(ctx, name or record.name)
    find_target = _target_for_text if as_text else _check_fits_here
    target, warnings = await find_target(services, record)
    async with Spool(settings.data_path, settings.disk_reserve_bytes) as spool:
        if target.keeps_kv:
            await spool.expect(sum(member.size for member in contents.objects))
        text = await read_text(reader, contents.texts)
        await _read_objects(ctx, reader, contents, spool if target.keeps_kv else None)
        await reader.check_end()
        window = _window(ctx, name or record.name, record, target)
        if target.model is not None:
            engine = services.engines.for_lineage(window.lineage)
            ids = await next_turn_ids(engine, target.model.id, text.frame, list(text.messages))
            text, window = replace(text, ids=ids), replace(window, token_count=len(ids))
        window, more = await _Import(ctx, contents, text, spool).commit(window)
        return NewWindow(window, (*warnings, *more))


async def _refuse_taken(ctx: OperationContext, name: str) -> None:
    if await ctx.services.store.window(ctx.tenant, name):
        raise window_name_taken(name)


async def _refuse_too_large(contents: Contents, limit: int) -> None:
    size = await asyncio.to_thread(contents.size)
    if size > limit:
        raise GatewayError(
            "payload_too_large",
            f"the file says that it has {size} bytes, more than {limit}",
            hint="max_import_bytes sets the limit",
        )


async def _check_fits_here(services: Services, record: Record) -> tuple[_Target, list[str]]:
    model = await services.engines.model(record.model)
    if (model.fingerprint, model.root) != (record.fingerprint, record.model_root):
        raise _mismatch(
            f"model {record.model!r} is served with other weights or settings than those of the window",
            {"window": record.fingerprint, "served": model.fingerprint},
        )
    target = _Target(model.fingerprint, model.root, keeps_kv=bool(record.chunk_count))
    if not record.chunk_count:
        return target, ["the file has no KV: a thaw computes it"]
    if services.cache is None or not services.pins.tiers:
        return replace(target, keeps_kv=False), [NO_CACHE]
    info = await services.cache.info()
    served = services.cache.chunk_size, info.world_sizes.get(model.root, 1), info.hash_algorithm
    if served != (record.chunk_size, record.world_size, "blake3"):
        raise _mismatch(
            f"this cache stores KV in another layout (chunk size, workers, hash: {served})",
            {"chunk_size": record.chunk_size, "world_size": record.world_size},
        )
    return target, []


async def _target_for_text(services: Services, record: Record) -> tuple[_Target, list[str]]:
    unchanged = _Target(record.fingerprint, record.model_root, keeps_kv=False)
    try:
        model = await services.engines.model(record.model)
    except GatewayError as error:
        if error.code != "model_mismatch":
            raise
        return unchanged, [f"{error.message}: the text can be read, but a thaw needs that model"]
    if (model.fingerprint, model.root) == (record.fingerprint, record.model_root):
        return unchanged, []
    rendered = (
        "the model is served with other weights or settings: the text was rendered again, and a thaw computes its KV"
    )
    return _Target(model.fingerprint, model.root, keeps_kv=False, model=model), [rendered]


def _mismatch(message: str, details: dict[str, Any]) -> GatewayError:
    return GatewayError("model_mismatch", message, hint="import it as text (`as_text=true`)", details=details)


async def _read_objects(ctx: OperationContext, reader: Reader, contents: Contents, spool: Spool | None) -> None:
    """Check every object, and store it in `spool` if there is one."""
    count = len(contents.objects)
    for index, member in enumerate(contents.objects):
        async for piece in reader.checked_pieces(object_name(index), member.size, member.blake3):
            if spool is not None:
                await spool.write(piece)
        ctx.progress("read", index + 1, count)


def _window(ctx: OperationContext, name: str, record: Record, target: _Target) -> Window:
    lineage = f"import:{uuid4().hex}"
    salt = ctx.services.salts.of(ctx.tenant, lineage, target.fingerprint)
    return Window(
        tenant=ctx.tenant,
        name=name,
        session_id=record.session_id,
        lineage=lineage,
        salt=salt,
        pin_salt=salt,
        model=record.model,
        model_root=target.root,
        fingerprint=target.fingerprint,
        world_size=record.world_size,
        token_count=record.token_count,
        chunk_size=record.chunk_size,
        chunk_count=record.chunk_count if target.keeps_kv else 0,
        description=record.description,
        tags=tuple(dict.fromkeys(record.tags)),
    )


@dataclass(frozen=True, slots=True)
class _Import:
    """Steps 3 to 5 of one import: a file that was read and checked, its objects in `spool`."""

    ctx: OperationContext
    contents: Contents
    text: FiledText
    spool: Spool

    async def commit(self, window: Window) -> NewWindow:
        """Pin the objects and add the window."""
        services = self.ctx.services
        keys = await asyncio.to_thread(pinned_keys, window, self.text.ids) if window.chunk_count else []
        # With one salt for the whole tenant, a freeze may be pinning the very keys that we write.
        committed, objects, warnings = await services.claims.commit_under(
            keys, lambda claim: self._pin_and_commit(claim, window, keys), write=True
        )
        with suppress(GatewayError):  # somebody has deleted it at once
            _, more = await put_back(services, committed, objects)
            warnings += more
        return NewWindow(committed, tuple(warnings))

    async def _pin_and_commit(
        self, claim: Claim, window: Window, keys: Sequence[ObjectKey]
    ) -> tuple[Window, tuple[PinnedObject, ...], list[str]]:
        text = self.text
        objects, warnings = await self._pin(keys)
        window = with_receipt(
            window, window.chunk_count, objects, self.ctx.duration_ms(), _origin(self.contents.record)
        )
        self.ctx.progress("commit", 0, 0)
        await check_budget(self.ctx.services, window.tenant, objects)
        manifest = Manifest(window.manifest, text.ids, objects)
        committed = await claim.commit(window, manifest, Text(text.messages, text.frame))
        if committed is None:
            raise window_name_taken(window.name)
        return committed, objects, warnings

    async def _pin(self, keys: Sequence[ObjectKey]) -> tuple[tuple[PinnedObject, ...], list[str]]:
        """Pin every object in each tier that can be reached. Raises TierFull, `cache_unavailable` if none can."""
        if not keys:
            return (), []
        existing = {(o.tier, o.key): o for o in await self.ctx.services.store.objects(keys)}
        by_tier, warnings = await self.ctx.services.pins.each(
            lambda tier: self._pin_in(tier, keys, existing), raise_full=True
        )
        if not by_tier:
            raise GatewayError(
                "cache_unavailable", warnings[-1], hint="try again, or import it as text (`as_text=true`)"
            )
        return tuple(pinned[index] for index in range(len(keys)) for pinned in by_tier.values()), warnings

    async def _pin_in(
        self, tier: Tier, keys: Sequence[ObjectKey], existing: dict[tuple[str, str], PinnedObject]
    ) -> list[PinnedObject]:
        """Pin the objects in one tier; what a window holds there already stays as it is."""
        pinned = []
        await self.spool.rewind()
        for key, member in zip(keys, self.contents.objects, strict=True):
            value = await self.spool.read(member.size)
            pinned.append(existing.get((tier.name, str(key))) or await tier.put(key, value))
            self.ctx.progress("place", len(pinned), len(keys))
        return pinned


def _origin(record: Record) -> dict[str, Any]:
    """What the file says about where it was frozen."""
    return {
        "imported": {
            "name": record.name,
            "lineage": record.lineage,
            "parent": record.parent,
            "created_at": record.created_at,
            "receipt": {k: v for k, v in record.receipt.items() if k != "imported"},
        }
    }

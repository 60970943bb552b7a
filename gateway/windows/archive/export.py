"""Export a window as one file (`gateway.windows.archive.file_format`), with one KV object in memory at a time."""

from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from sys import byteorder

import orjson
from blake3 import blake3

from gateway.errors import GatewayError
from gateway.kv.tiers.base import Tier
from gateway.records import Manifest, PinnedObject, Window
from gateway.windows.archive import file_format
from gateway.windows.archive.file_format import CHECKSUM, END, MANIFEST, TEXTS
from gateway.windows.archive.manifest import Contents, Member, Record
from gateway.windows.catalog import get_window
from gateway.windows.context import OperationContext, Services, instrumented

Source = tuple[Tier, PinnedObject]


@dataclass(frozen=True, slots=True)
class Export:
    """A window ready to be written: the size of its file, and the bytes."""

    window: Window
    size: int
    pieces: AsyncIterator[bytes]


@instrumented
async def export(ctx: OperationContext, name: str, *, as_text: bool = False) -> Export:
    """Make a window ready to be written; `as_text` leaves its KV out.

    Every object is checked before the first byte. Raises `window_not_found`, `window_corrupted` if an object is lost or
    damaged in every tier, `cache_unavailable` if that cannot be determined.
    """
    services = ctx.services
    window = await get_window(services, ctx.tenant, name)
    manifest = await services.store.manifest(window)
    text = await services.store.text(window)
    sources = [] if as_text else await _sources(services, window, manifest)
    texts = (orjson.dumps(text.messages), orjson.dumps(text.frame or {}), pack(manifest.token_ids))
    contents = Contents(
        _record(window, chunks=len(sources) // window.world_size),
        tuple(Member.of(text) for text in texts),
        tuple([await _member(tier, item) for tier, item in sources]),
    )
    head = contents.dump()
    size = file_format.BLOCK + file_format.padded(len(head)) + contents.size()
    return Export(window, size, _with_checksum(_members(head, texts, sources)))


def pack(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    values = array("I", ids)
    if byteorder == "big":
        values.byteswap()
    return values.tobytes()


async def _sources(services: Services, window: Window, manifest: Manifest) -> list[Source]:
    """A tier that has each object intact, in chunk order."""
    good: dict[str, Source] = {}

    async def add_good(tier: Tier) -> None:
        objects = [o for o in manifest.objects if o.tier == tier.name and o.key not in good]
        states = await tier.verify(objects)
        good.update({o.key: (tier, o) for o, state in zip(objects, states, strict=True) if state.usable})

    _, unreachable = await services.pins.each(add_good)
    names = list(dict.fromkeys(o.key for o in manifest.objects))
    lost = [name for name in names if name not in good]
    hint = "export it without its KV (`as_text=true`)"
    if lost and unreachable:
        raise GatewayError("cache_unavailable", unreachable[0], hint=hint)
    if lost:
        await services.store.check_exists(window)  # else it was deleted meanwhile: that is not damage
        raise GatewayError(
            "window_corrupted", f"{len(lost)} of {len(names)} KV objects are lost or damaged in every tier", hint=hint
        )
    return [good[name] for name in names]


async def _member(tier: Tier, item: PinnedObject) -> Member:
    """The size and blake3 of an object, for which it is read where its tier has another checksum."""
    if tier.checksum == "blake3":
        return Member(item.size, item.checksum.hex())
    if (value := await tier.read(item)) is None:
        raise _lost(item)
    return Member.of(value)


def _lost(item: PinnedObject) -> GatewayError:
    return GatewayError("window_corrupted", f"the window was deleted or damaged during the export ({item.key})")


def _record(w: Window, chunks: int) -> Record:
    return Record(
        w.name, w.session_id, w.lineage, w.model, w.model_root, w.fingerprint, w.world_size, w.token_count,
        w.chunk_size, chunks, w.created_at, w.description, list(w.tags), w.parent, dict(w.receipt),
    )  # fmt: skip


async def _members(head: bytes, texts: Sequence[bytes], sources: Sequence[Source]) -> AsyncIterator[Iterator[bytes]]:
    yield file_format.wrap(MANIFEST, head)
    for name, text in zip(TEXTS, texts, strict=True):
        yield file_format.wrap(name, text)
    for index, (tier, item) in enumerate(sources):
        value = await tier.read(item)
        if value is None:
            raise _lost(item)
        yield file_format.wrap(file_format.object_name(index), value)


async def _with_checksum(members: AsyncIterator[Iterator[bytes]]) -> AsyncIterator[bytes]:
    digest = blake3()
    async for member in members:
        for piece in member:
            digest.update(piece)
            yield piece
    for piece in file_format.wrap(CHECKSUM, digest.hexdigest().encode()):
        yield piece
    yield END

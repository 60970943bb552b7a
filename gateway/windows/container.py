"""The file that a window travels in: a plain tar of which every byte is known beforehand or checked.

In this order: `manifest.json` (what the window is, and size and blake3 of every member after it), `transcript.json`,
`frame.json`, `token_ids.u32`, `objects/00000000` and so on in chunk order, the ranks of a chunk side by side, and
`checksum.blake3` (of every byte before it). Nothing is compressed and no name is ever read from the file: a header has
to be, byte for byte, the one that is due.
"""

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import orjson
from blake3 import blake3

from gateway.errors import GatewayError
from gateway.records import MAX_DESCRIPTION, MAX_TAGS, TAG, WINDOW_NAME

FORMAT = "cwg-window"
VERSION = 1
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
MANIFEST = "manifest.json"
TEXTS = ("transcript.json", "frame.json", "token_ids.u32")
CHECKSUM = "checksum.blake3"
MAX_TEXT = 256 * 2**20  # of a member that is read into memory: manifest, text, token ids
MAX_OBJECT = 2**30  # one KV object; Redis takes no more than half of it
PIECE = 2**20
_SIZE = re.compile(rb"[0-7]{11}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Member:
    """What the manifest says of a member: its bytes, and their blake3 as hex."""

    size: int
    blake3: str

    @classmethod
    def of(cls, data: bytes) -> "Member":
        """The member that `data` is."""
        return cls(len(data), blake3(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Record:
    """The window as the file tells it. Neither salt nor tenant: those are of the gateway that holds it."""

    name: str
    session_id: str
    lineage: str
    model: str
    model_root: str
    fingerprint: str
    world_size: int
    token_count: int
    chunk_size: int
    chunk_count: int
    created_at: float
    description: str
    tags: list[str]
    parent: str | None
    receipt: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contents:
    """The manifest: the record, and the members that follow."""

    record: Record
    texts: tuple[Member, ...]
    objects: tuple[Member, ...]

    def dump(self) -> bytes:
        """As it stands in the file."""
        return orjson.dumps({"format": FORMAT, "version": VERSION, "window": self.record, "texts": self.texts,
                             "objects": self.objects})  # fmt: skip

    @property
    def size(self) -> int:
        """Bytes of the members that follow, with what a tar puts around them."""
        members = sum(BLOCK + padded(member.size) for member in (*self.texts, *self.objects))
        return members + BLOCK + padded(64) + len(END)


def header(name: str, size: int) -> bytes:
    """The tar header of a member: always the same for the same name and size."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def object_name(index: int) -> str:
    """The name of a KV object in the file."""
    return f"objects/{index:08d}"


def padding(size: int) -> bytes:
    """What fills a member up to whole blocks."""
    return bytes(-size % BLOCK)


def padded(size: int) -> int:
    """`size` in whole blocks."""
    return size + -size % BLOCK


def wrap(name: str, data: bytes) -> Iterator[bytes]:
    """A member, in pieces."""
    yield header(name, len(data))
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
    yield padding(len(data))


class Reader:
    """Reads the file from its stream, member after member. Whatever is not as it must be is `window_corrupted`."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._rest = b""
        self._whole = blake3()

    async def manifest(self) -> Contents:
        """Read the first member. Raises `invalid_request` where this is no file of ours, or of another version."""
        block = await self._take(BLOCK)
        size = int(block[124:135], 8) if _SIZE.fullmatch(block[124:135]) else 0
        if block != header(MANIFEST, size):
            raise GatewayError(
                "invalid_request", f"this is no window file: it does not begin with {MANIFEST}", hint="see `cwg export`"
            )
        if size > MAX_TEXT:
            raise _too_large(MANIFEST, size)
        data = await self._take(size)
        await self._zeros(-size % BLOCK, MANIFEST)
        return _contents(data)

    async def text(self, name: str, member: Member) -> bytes:
        """Read a member whole, and check it."""
        await self._begin(name, member.size)
        data = await self._take(member.size)
        await self._end(name, member, await asyncio.to_thread(lambda: blake3(data).hexdigest()))
        return data

    async def pieces(self, name: str, member: Member) -> AsyncIterator[bytes]:
        """Read a member in pieces; the last one is given before the checksum is known, so go on to the end."""
        await self._begin(name, member.size)
        digest, left = blake3(), member.size
        while left:
            piece = await self._some(left)
            left -= len(piece)
            await asyncio.to_thread(digest.update, piece)
            yield piece
        await self._end(name, member, digest.hexdigest())

    async def finish(self) -> None:
        """Check the whole, and that nothing comes after it."""
        due = self._whole.hexdigest().encode()
        await self._begin(CHECKSUM, len(due))
        if await self._take(len(due)) != due:
            raise corrupted("the checksum of the whole file is wrong")
        await self._zeros(-len(due) % BLOCK + len(END), CHECKSUM)
        if self._rest or await self._more():
            raise corrupted("something comes after the end of the file")

    async def _begin(self, name: str, size: int) -> None:
        if await self._take(BLOCK) != header(name, size):
            raise corrupted(f"{name} with {size} bytes should come next and does not")

    async def _end(self, name: str, member: Member, digest: str) -> None:
        if digest != member.blake3:
            raise corrupted(f"the checksum of {name} is wrong")
        await self._zeros(-member.size % BLOCK, name)

    async def _zeros(self, size: int, name: str) -> None:
        if any(await self._take(size)):
            raise corrupted(f"what fills up {name} is not empty")

    async def _take(self, size: int) -> bytes:
        parts = []
        while size:
            parts.append(await self._some(size))
            size -= len(parts[-1])
        return b"".join(parts)

    async def _some(self, most: int) -> bytes:
        """At least one byte."""
        if not self._rest and not await self._more():
            raise corrupted("the file ends too early")
        piece, self._rest = self._rest[: min(most, PIECE)], self._rest[min(most, PIECE) :]
        await asyncio.to_thread(self._whole.update, piece) if len(piece) > BLOCK else self._whole.update(piece)
        return piece

    async def _more(self) -> bool:
        parts: list[bytes] = []
        size = 0
        while size < PIECE and (part := await anext(self._source, None)) is not None:
            parts.append(part)
            size += len(part)
        self._rest = b"".join(parts)
        return bool(self._rest)


def corrupted(message: str) -> GatewayError:
    """The error for a file that is not whole."""
    return GatewayError("window_corrupted", message, hint="copy the file once more, or export the window again")


def _too_large(name: str, size: int) -> GatewayError:
    return GatewayError("payload_too_large", f"{name} says that it has {size} bytes, more than a window file can have")


def _contents(data: bytes) -> Contents:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise corrupted(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise GatewayError("invalid_request", f"{MANIFEST} is not that of a window file")
    if value.get("version") != VERSION:
        raise GatewayError(
            "invalid_request",
            f"the file has format version {value.get('version')!r:.40}; this gateway reads version {VERSION}",
            hint="import it with a gateway of the version that wrote it",
        )
    record = _record(value.get("window"))
    texts, objects = _members(value.get("texts"), MAX_TEXT), _members(value.get("objects"), MAX_OBJECT)
    if len(texts) != len(TEXTS) or len(objects) != record.chunk_count * record.world_size:
        raise corrupted(f"{MANIFEST} does not name as many members as its window has")
    if texts[2].size != 4 * record.token_count:
        raise corrupted(f"token_ids.u32 with {texts[2].size} bytes is not {record.token_count} tokens")
    return Contents(record, texts, objects)


def _record(value: object) -> Record:
    if not isinstance(value, dict) or set(value) != {f.name for f in fields(Record)}:
        raise corrupted(f"the window in {MANIFEST} does not have the fields that it must have")
    wrong = next((name for name, fits in _FITS.items() if not fits(value[name])), None)
    if wrong is not None:
        raise corrupted(f"{wrong} in {MANIFEST} is {value[wrong]!r:.80}, which it cannot be")
    record = Record(**value)
    if record.chunk_count * record.chunk_size > record.token_count or (record.chunk_count and not record.chunk_size):
        raise corrupted(f"{record.chunk_count} chunks are more than the window's {record.token_count} tokens")
    return record


def _members(value: object, largest: int) -> tuple[Member, ...]:
    if not isinstance(value, list):
        raise corrupted(f"{MANIFEST} has no list of members")
    for one in value:
        if not isinstance(one, dict) or set(one) != {"size", "blake3"} or not _whole(one["size"], 2**62):
            raise corrupted(f"{MANIFEST} names a member {one!r:.80}, which it cannot have")
        if not isinstance(one["blake3"], str) or not _HEX.fullmatch(one["blake3"]):
            raise corrupted(f"{MANIFEST} names a member without a checksum")
        if one["size"] > largest:
            raise _too_large("a member", one["size"])
    return tuple(Member(**one) for one in value)


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _line(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and "\0" not in value


def _tags(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        return False
    return all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in value)


_FITS: Mapping[str, Any] = {
    **dict.fromkeys(("session_id", "lineage", "model", "model_root", "fingerprint"), _line),
    "name": lambda v: isinstance(v, str) and WINDOW_NAME.fullmatch(v),
    "description": lambda v: isinstance(v, str) and len(v) <= MAX_DESCRIPTION and "\0" not in v,
    "parent": lambda v: v is None or _line(v),
    "tags": _tags,
    "receipt": lambda v: isinstance(v, dict),
    "created_at": lambda v: type(v) in (int, float) and 0 <= v < 1e11,
    "world_size": lambda v: _whole(v, 255) and v > 0,
    "token_count": lambda v: _whole(v, MAX_TEXT // 4),
    "chunk_size": lambda v: _whole(v, 2**20),
    "chunk_count": lambda v: _whole(v, 2**20),
}

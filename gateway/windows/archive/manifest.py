"""The manifest of a window file: the window, and size and blake3 of every member that follows.

It is untrusted, so it is split before it is parsed: first the window, which determines how many members there are, and
then no more members than that.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import orjson
from blake3 import blake3

from gateway.errors import GatewayError
from gateway.records import MAX_DESCRIPTION, MAX_MODEL, MAX_TAGS, SESSION_ID, TAG, WINDOW_NAME
from gateway.validation import json_scan
from gateway.validation.json_limits import MAX_DEPTH, TooDeep, TooMany, check_value
from gateway.validation.json_scan import Budget
from gateway.windows.archive.file_format import (
    BLOCK,
    END,
    MANIFEST,
    TEXTS,
    corrupted,
    json_errors,
    not_a_window,
    padded,
    too_complex,
    too_large,
)

FORMAT = "cwg-window"
VERSION = 1
MAX_TRANSCRIPT = 256 * 2**20
MAX_FRAME = 16 * 2**20
MAX_TOKENS = 2**24  # no context is longer
MAX_OBJECT = 2**30  # one KV object; Redis takes no more than half of it
MAX_RECEIPT = 2**16  # it is read with every list of windows
_MAX_RECORD = 4 * MAX_RECEIPT
_RECEIPT_DEPTH = 20
_MAX_MEMBERS = 2**18
_HEX = re.compile(r"[0-9a-f]{64}")
_LARGEST = (MAX_TRANSCRIPT, MAX_FRAME, 4 * MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the file: its size in bytes, and their blake3 as hex."""

    size: int
    blake3: str

    @classmethod
    def of(cls, data: bytes) -> "Member":
        """The member with these bytes."""
        return cls(len(data), blake3(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Record:
    """The window as the file describes it. Salt and tenant are those of the gateway that imports it."""

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
        """The manifest as JSON."""
        return orjson.dumps({"format": FORMAT, "version": VERSION, "window": self.record, "texts": self.texts,
                             "objects": self.objects})  # fmt: skip

    def size(self) -> int:
        """Bytes of the members that follow, with their tar headers and padding."""
        members = sum(BLOCK + padded(member.size) for member in (*self.texts, *self.objects))
        return members + BLOCK + padded(64) + len(END)


def read(data: bytes | bytearray) -> Contents:
    """Read a manifest; takes up to a second, so run it in a thread.

    Raises `invalid_request` for another format or version, `payload_too_large`, `too_complex`, and `window_corrupted`
    for anything else that is wrong.
    """
    with json_errors(MANIFEST):
        return _read(memoryview(data))


def _read(data: memoryview) -> Contents:
    parts: dict[bytes, memoryview] = {}
    for name, part in json_scan.members(data, Budget(MAX_DEPTH, 2 * _MAX_MEMBERS, 4 * _MAX_MEMBERS)):
        if name in parts or len(name) > 20:
            raise corrupted(f"{MANIFEST} names {name!r:.80}, which is not allowed, or is repeated")
        parts[name] = part
    _check_version(_small(parts.get(b"format")), _small(parts.get(b"version")))
    record = _record(parts.get(b"window", memoryview(b"null")))
    texts = tuple(_members(parts.get(b"texts"), len(TEXTS), _LARGEST))
    count = record.chunk_count * record.world_size
    objects = tuple(_members(parts.get(b"objects"), count, (MAX_OBJECT,) * count))
    if texts[2].size != 4 * record.token_count:
        raise corrupted(f"token_ids.u32 with {texts[2].size} bytes is not {record.token_count} tokens")
    return Contents(record, texts, objects)


def _small(part: memoryview | None) -> Any:
    """The value of a part that must be short."""
    return orjson.loads(part) if part is not None and len(part) <= 1000 else None


def _check_version(form: Any, version: Any) -> None:
    if form != FORMAT:
        raise not_a_window(f"{MANIFEST} is not that of one")
    if version != VERSION:
        raise GatewayError(
            "invalid_request",
            f"the file has format version {version!r:.40}; this gateway reads version {VERSION}",
            hint="import it with a gateway of the version that wrote it",
        )


def _record(part: memoryview) -> Record:
    if len(part) > _MAX_RECORD:
        raise too_large(f"the window in {MANIFEST}", len(part), _MAX_RECORD)
    value = orjson.loads(part)
    if not isinstance(value, dict) or set(value) != {f.name for f in fields(Record)}:
        raise corrupted(f"the window in {MANIFEST} does not have the required fields")
    wrong = next((name for name, fits in _FITS.items() if not fits(value[name])), None)
    if wrong is not None:
        raise corrupted(f"{wrong} in {MANIFEST} is {value[wrong]!r:.80}, which is not valid")
    record = Record(**value)
    if record.chunk_count * record.chunk_size > record.token_count or (record.chunk_count and not record.chunk_size):
        raise corrupted(f"{record.chunk_count} chunks are more than the window's {record.token_count} tokens")
    if record.chunk_count * record.world_size > _MAX_MEMBERS:
        raise too_complex(MANIFEST, f"{record.chunk_count} chunks of {record.world_size} workers")
    return record


def _members(part: memoryview | None, count: int, largest: tuple[int, ...]) -> Iterator[Member]:
    if part is None:
        raise corrupted(f"{MANIFEST} has no list of members")
    number = 0
    for number, one in enumerate(json_scan.elements(part, Budget(2, count + 2, 3 * count + 3)), 1):
        if number > count:
            break
        yield _member(one, largest[number - 1])
    if number != count:
        raise corrupted(f"{MANIFEST} does not name as many members as its window has")


def _member(part: memoryview, largest: int) -> Member:
    value = orjson.loads(part)
    if not isinstance(value, dict) or set(value) != {"size", "blake3"} or not _whole(value["size"], 2**62):
        raise corrupted(f"{MANIFEST} names a member {value!r:.80}, which is not allowed")
    if not isinstance(value["blake3"], str) or not _HEX.fullmatch(value["blake3"]):
        raise corrupted(f"{MANIFEST} names a member without a checksum")
    if value["size"] > largest:
        raise too_large("a member", value["size"], largest)
    return Member(**value)


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _line(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and not has_controls(value)


def has_controls(text: str) -> bool:
    """Whether a text has control characters, which a terminal or a log might interpret."""
    return any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in text)


def _tags(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        return False
    return all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in value)


def _receipt(value: object) -> bool:
    """A receipt as a gateway writes one. The part of an earlier import is not kept, so it does not count."""
    if not isinstance(value, dict):
        return False
    own = {name: part for name, part in value.items() if name != "imported"}
    try:
        check_value(own, depth=_RECEIPT_DEPTH)
    except (TooDeep, TooMany):
        return False
    return len(orjson.dumps(own)) <= MAX_RECEIPT


_FITS: Mapping[str, Any] = {
    **dict.fromkeys(("lineage", "model_root", "fingerprint"), _line),
    "session_id": lambda v: isinstance(v, str) and SESSION_ID.fullmatch(v),
    "model": lambda v: _line(v) and 0 < len(v) <= MAX_MODEL,
    "name": lambda v: isinstance(v, str) and WINDOW_NAME.fullmatch(v),
    "description": lambda v: isinstance(v, str) and len(v) <= MAX_DESCRIPTION and "\0" not in v,
    "parent": lambda v: v is None or (isinstance(v, str) and WINDOW_NAME.fullmatch(v)),
    "tags": _tags,
    "receipt": _receipt,
    "created_at": lambda v: type(v) in (int, float) and 0 <= v < 1e11,
    "world_size": lambda v: _whole(v, 255) and v > 0,
    "token_count": lambda v: _whole(v, MAX_TOKENS),
    "chunk_size": lambda v: _whole(v, 2**20),
    "chunk_count": lambda v: _whole(v, MAX_TOKENS),
}

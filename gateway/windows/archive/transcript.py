"""The text of a window's file: its transcript, its frame and its token ids, read without trusting any of them.

A transcript is never parsed as a whole. It is split into its messages (`gateway.validation.json_scan`), and each is
parsed, checked and released; what stays in memory are the bytes received.
"""

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from sys import byteorder
from typing import Any

import orjson

from gateway.dialects import text_transcripts
from gateway.dialects.base import RENDER_FIELDS
from gateway.records import Message
from gateway.validation import json_limits, json_scan
from gateway.validation.json_limits import MAX_DEPTH, TooMany
from gateway.validation.json_scan import Budget
from gateway.windows.archive.file_format import TEXTS, Reader, corrupted, json_errors, too_large
from gateway.windows.archive.manifest import Member

_MAX_MESSAGES = 100_000
_MAX_MESSAGE = 32 * 2**20  # bytes: parsing it blocks the interpreter for a tenth of a second
# Of a transcript. Containers take the parser longest; a list of token ids is nearly all commas.
_MAX_CONTAINERS = 200_000
_MAX_COMMAS = 2**20


@dataclass(frozen=True, slots=True)
class FiledText:
    """The text of a file."""

    messages: Sequence[Message]
    frame: dict[str, Any]
    ids: Sequence[int]


class _Messages(Sequence[Message]):
    """The messages of a transcript, each parsed on access."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts

    def __getitem__(self, index: Any) -> Any:
        return _Messages(self._parts[index]) if isinstance(index, slice) else orjson.loads(self._parts[index])

    def __iter__(self) -> Iterator[Message]:
        return map(orjson.loads, self._parts)

    def __len__(self) -> int:
        return len(self._parts)


async def read_text(reader: Reader, members: Sequence[Member]) -> FiledText:
    """Read the three texts. Raises `window_corrupted`, `payload_too_large`, `too_complex`."""
    transcript, frame, ids = [
        await reader.text(name, one.size, one.blake3) for name, one in zip(TEXTS, members, strict=True)
    ]
    with json_errors(TEXTS[0]):
        messages = await asyncio.to_thread(_messages, memoryview(transcript))
    with json_errors(TEXTS[1]):
        fields = await asyncio.to_thread(_frame, memoryview(frame))
    return FiledText(messages, fields, _ids(ids))


def _messages(data: memoryview) -> Sequence[Message]:
    parts: list[memoryview] = []
    for part in json_scan.elements(data, Budget(MAX_DEPTH, _MAX_CONTAINERS, _MAX_COMMAS)):
        if len(parts) == _MAX_MESSAGES:
            raise TooMany(f"it has more than {_MAX_MESSAGES} messages")
        if len(part) > _MAX_MESSAGE:
            raise too_large(f"a message in {TEXTS[0]}", len(part), _MAX_MESSAGE)
        if not _is_message(orjson.loads(part)):
            raise corrupted(f"{TEXTS[0]} is not a list of messages with a role each")
        parts.append(part)
    if not parts:
        raise corrupted(f"{TEXTS[0]} has no message")
    return _Messages(parts)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    if value["role"] == text_transcripts.TEXT:
        return isinstance(value.get("content"), str)
    if value["role"] == text_transcripts.TOKENS:
        content = value.get("content")
        return isinstance(content, list) and all(type(one) is int and 0 <= one < 2**32 for one in content)
    return True


def _frame(data: memoryview) -> dict[str, Any]:
    value = json_limits.parse_bounded(bytes(data))
    unknown = next((name for name in value if name not in RENDER_FIELDS), None) if isinstance(value, dict) else "?"
    if unknown is not None:
        raise corrupted(f"{TEXTS[1]} has {unknown!r:.80}, which is not a field that prompts are rendered from")
    return dict(value)


def _ids(data: bytearray) -> Sequence[int]:
    ids = array("I")
    ids.frombytes(data)
    if byteorder == "big":
        ids.byteswap()
    return ids

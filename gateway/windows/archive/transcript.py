"""The text of a window's file: its transcript, its frame and its token ids, read without trusting any of them.

A transcript is never parsed whole. It is cut at its messages (`gateway.validation.json_scan`), and each is parsed,
checked and released; what stays in memory are the bytes that came.
"""

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from sys import byteorder
from typing import Any, overload

import orjson

from gateway.dialects import text_transcripts
from gateway.dialects.base import RENDER_FIELDS
from gateway.records import Message
from gateway.validation import json_limits, json_scan
from gateway.validation.json_limits import MAX_DEPTH, TooDeep, TooMany
from gateway.validation.json_scan import BadJson, Budget
from gateway.windows.archive.file_format import TEXTS, Reader, corrupted, too_complex, too_large
from gateway.windows.archive.manifest import Member

_MAX_MESSAGES = 100_000
_MAX_MESSAGE = 32 * 2**20  # bytes: the parser holds the interpreter for a tenth of a second
# Of a transcript. Containers cost the parser most; a list of token ids is nearly all commas.
_MAX_CONTAINERS = 200_000
_MAX_COMMAS = 2**20


@dataclass(frozen=True, slots=True)
class FiledText:
    """What the file says in words."""

    messages: Sequence[Message]
    frame: dict[str, Any]
    ids: Sequence[int]


class _Messages(Sequence[Message]):
    """The messages of a transcript, each parsed when it is asked for."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> "_Messages": ...
    def __getitem__(self, index: int | slice) -> "Message | _Messages":
        if isinstance(index, slice):
            return _Messages(self._parts[index])
        message: Message = orjson.loads(self._parts[index])
        return message

    def __iter__(self) -> Iterator[Message]:
        return map(orjson.loads, self._parts)

    def __len__(self) -> int:
        return len(self._parts)


async def read_text(reader: Reader, members: Sequence[Member]) -> FiledText:
    """Read the three texts. Raises `window_corrupted`, `payload_too_large`, `too_complex`."""
    transcript, frame, ids = [
        await reader.text(name, one.size, one.blake3) for name, one in zip(TEXTS, members, strict=True)
    ]
    return FiledText(await _in_thread(0, _messages, transcript), await _in_thread(1, _frame, frame), _ids(ids))


async def _in_thread(index: int, read: Any, data: bytearray) -> Any:
    try:
        return await asyncio.to_thread(read, memoryview(data))
    except TooMany as error:
        raise too_complex(TEXTS[index], error) from error
    except (BadJson, TooDeep) as error:
        raise corrupted(f"{TEXTS[index]}: {error}") from error
    except orjson.JSONDecodeError as error:
        raise corrupted(f"{TEXTS[index]} is not JSON: {error}") from error


def _messages(data: memoryview) -> Sequence[Message]:
    found: list[memoryview] = []
    for part in json_scan.elements(data, Budget(MAX_DEPTH, _MAX_CONTAINERS, _MAX_COMMAS)):
        if len(found) == _MAX_MESSAGES:
            raise TooMany(f"it has more than {_MAX_MESSAGES} messages")
        if len(part) > _MAX_MESSAGE:
            raise too_large(f"a message in {TEXTS[0]}", len(part), _MAX_MESSAGE)
        if not _is_message(orjson.loads(part)):
            raise corrupted(f"{TEXTS[0]} is not a list of messages with a role each")
        found.append(part)
    if not found:
        raise corrupted(f"{TEXTS[0]} has no message")
    return _Messages(found)


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
    strange = next((name for name in value if name not in RENDER_FIELDS), None) if isinstance(value, dict) else "?"
    if strange is not None:
        raise corrupted(f"{TEXTS[1]} has {strange!r:.80}, which is not a field that prompts are rendered from")
    return dict(value)


def _ids(data: bytearray) -> Sequence[int]:
    ids = array("I")
    ids.frombytes(data)
    if byteorder == "big":
        ids.byteswap()
    return ids

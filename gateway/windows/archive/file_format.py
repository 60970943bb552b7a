"""The file format of a window: a plain tar of which every byte is known beforehand or checked.

In this order: `manifest.json` (the window, and size and blake3 of every member after it: `manifest.py`),
`transcript.json`, `frame.json`, `token_ids.u32`, `objects/00000000` and so on in chunk order, the ranks of a chunk
together, and `checksum.blake3` (of every byte before it). Nothing is compressed and no name is ever read from the file:
each header must be, byte for byte, the expected one.
"""

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import orjson
from blake3 import blake3

from gateway.errors import GatewayError
from gateway.validation.json_limits import TooDeep, TooMany
from gateway.validation.json_scan import BadJson

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
MANIFEST = "manifest.json"
TEXTS = ("transcript.json", "frame.json", "token_ids.u32")
CHECKSUM = "checksum.blake3"
MAX_MANIFEST = 16 * 2**20
PIECE = 2**20
_NAME_BYTES = 100  # of a member, with which its header begins
_INLINE = 2**14  # bytes that are hashed faster here than in a thread
_SIZE = re.compile(rb"[0-7]{11}")


def header(name: str, size: int) -> bytes:
    """The tar header of a member: always the same for the same name and size."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def object_name(index: int) -> str:
    """The name of a KV object in the file."""
    return f"objects/{index:08d}"


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return size + -size % BLOCK


def wrap(name: str, data: bytes) -> Iterator[bytes]:
    """A member, in pieces."""
    yield header(name, len(data))
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
    yield bytes(-len(data) % BLOCK)


class Reader:
    """Reads the file from its stream, member by member. Any deviation from the format is `window_corrupted`."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._buffer = memoryview(b"")
        self._whole = blake3()

    async def manifest(self) -> bytearray:
        """Read the first member. Raises `invalid_request` if this is not a window file, `payload_too_large`."""
        block = bytes(await self._some(BLOCK))  # shorter only if the file is
        size = int(block[124:135], 8) if _SIZE.fullmatch(block[124:135]) else 0
        expected = header(MANIFEST, size)
        if len(block) < BLOCK and expected.startswith(block[:_NAME_BYTES]):
            raise corrupted("the file is truncated")
        if block != expected:
            raise not_a_window(f"it does not begin with {MANIFEST}")
        if size > MAX_MANIFEST:
            raise too_large(MANIFEST, size, MAX_MANIFEST)
        data = await self._take(size)
        await self._zeros(-size % BLOCK, MANIFEST)
        return data

    async def text(self, name: str, size: int, checksum: str) -> bytearray:
        """Read a member of `size` bytes, and check it against its blake3."""
        data = bytearray()
        async for piece in self.checked_pieces(name, size, checksum):
            data += piece
        return data

    async def checked_pieces(self, name: str, size: int, checksum: str) -> AsyncIterator[memoryview]:
        """Read a member in pieces. The checksum is checked after the last one: exhaust the iterator."""
        await self._begin(name, size)
        digest, left = blake3(), size
        while left:
            piece = await self._some(left)
            left -= len(piece)
            await _update(digest, piece)
            yield piece
        if digest.hexdigest() != checksum:
            raise corrupted(f"the checksum of {name} is wrong")
        await self._zeros(-size % BLOCK, name)

    async def check_end(self) -> None:
        """Check the whole file, and that nothing comes after it."""
        expected = self._whole.hexdigest().encode()
        await self._begin(CHECKSUM, len(expected))
        if await self._take(len(expected)) != expected:
            raise corrupted("the checksum of the whole file is wrong")
        await self._zeros(-len(expected) % BLOCK + len(END), CHECKSUM)
        if self._buffer or await self._more():
            raise corrupted("something comes after the end of the file")

    async def _begin(self, name: str, size: int) -> None:
        if await self._take(BLOCK) != header(name, size):
            raise corrupted(f"{name} with {size} bytes should come next but does not")

    async def _zeros(self, size: int, name: str) -> None:
        if any(await self._take(size)):
            raise corrupted(f"the padding of {name} is not empty")

    async def _take(self, size: int) -> bytearray:
        """Read exactly `size` bytes. Memory grows with what has arrived, not with what was announced."""
        data = bytearray()
        while len(data) < size:
            data += await self._some(size - len(data))
        return data

    async def _some(self, most: int) -> memoryview:
        """Read at least one byte."""
        if not self._buffer and not await self._more():
            raise corrupted("the file is truncated")
        size = min(most, PIECE)
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        await _update(self._whole, piece)
        return piece

    async def _more(self) -> bool:
        parts: list[bytes] = []
        size = 0
        while size < PIECE and (part := await anext(self._source, None)) is not None:
            parts.append(part)
            size += len(part)
        self._buffer = memoryview(b"".join(parts))
        return bool(self._buffer)


async def _update(digest: blake3, data: memoryview) -> None:
    if len(data) > _INLINE:
        await asyncio.to_thread(digest.update, data)
    else:
        digest.update(data)


@contextmanager
def json_errors(name: str) -> Iterator[None]:
    """Raise `too_complex` or `window_corrupted` for the JSON of member `name` that the block cannot read."""
    try:
        yield
    except TooMany as error:
        raise too_complex(name, error) from error
    except (BadJson, TooDeep) as error:
        raise corrupted(f"{name}: {error}") from error
    except orjson.JSONDecodeError as error:
        raise corrupted(f"{name} is not JSON: {error}") from error


def corrupted(message: str) -> GatewayError:
    """The error for a file that is not as it was exported."""
    return GatewayError("window_corrupted", message, hint="copy the file again, or export the window again")


def not_a_window(why: str) -> GatewayError:
    """The error for a file that is no export of a window."""
    return GatewayError("invalid_request", f"this is not a window file: {why}", hint="see `cwg export`")


def too_large(name: str, size: int, most: int) -> GatewayError:
    """The error for a member that exceeds the limit for its kind."""
    return GatewayError("payload_too_large", f"{name} has {size} bytes; at most {most} are allowed")


def too_complex(name: str, problem: object) -> GatewayError:
    """The error for a text with more elements than the limit for its kind."""
    return GatewayError(
        "too_complex", f"{name}: {problem}", hint="no conversation held through a gateway is that large"
    )

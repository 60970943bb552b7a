"""The file that a window travels in: a plain tar of which every byte is known beforehand or checked.

In this order: `manifest.json` (what the window is, and size and blake3 of every member after it: `contents.py`),
`transcript.json`, `frame.json`, `token_ids.u32`, `objects/00000000` and so on in chunk order, the ranks of a chunk side
by side, and `checksum.blake3` (of every byte before it). Nothing is compressed and no name is ever read from the file:
a header has to be, byte for byte, the one that is due.
"""

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Iterator

from blake3 import blake3

from gateway.errors import GatewayError

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
MANIFEST = "manifest.json"
TEXTS = ("transcript.json", "frame.json", "token_ids.u32")
CHECKSUM = "checksum.blake3"
MAX_MANIFEST = 16 * 2**20
PIECE = 2**20
_INLINE = 2**14  # bytes that are hashed sooner than a thread is asked to
_SIZE = re.compile(rb"[0-7]{11}")


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
        self._rest = memoryview(b"")
        self._whole = blake3()

    async def manifest(self) -> bytearray:
        """Read the first member. Raises `invalid_request` where this is no file of ours, `payload_too_large`."""
        block = await self._take(BLOCK)
        size = int(block[124:135], 8) if _SIZE.fullmatch(block[124:135]) else 0
        if block != header(MANIFEST, size):
            raise GatewayError(
                "invalid_request",
                f"this is not a window file: it does not begin with {MANIFEST}",
                hint="see `cwg export`",
            )
        if size > MAX_MANIFEST:
            raise too_large(MANIFEST, size, MAX_MANIFEST)
        data = await self._take(size)
        await self._zeros(-size % BLOCK, MANIFEST)
        return data

    async def text(self, name: str, size: int, checksum: str) -> bytearray:
        """Read a member of `size` bytes whole, and check it against its blake3."""
        await self._begin(name, size)
        data = await self._take(size)
        digest = blake3()
        await _update(digest, memoryview(data))
        await self._end(name, size, checksum, digest.hexdigest())
        return data

    async def pieces(self, name: str, size: int, checksum: str) -> AsyncIterator[memoryview]:
        """Read a member in pieces; the last one is given before the checksum is known, so go on to the end."""
        await self._begin(name, size)
        digest, left = blake3(), size
        while left:
            piece = await self._some(left)
            left -= len(piece)
            await _update(digest, piece)
            yield piece
        await self._end(name, size, checksum, digest.hexdigest())

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
            raise corrupted(f"{name} with {size} bytes should come next but does not")

    async def _end(self, name: str, size: int, due: str, digest: str) -> None:
        if digest != due:
            raise corrupted(f"the checksum of {name} is wrong")
        await self._zeros(-size % BLOCK, name)

    async def _zeros(self, size: int, name: str) -> None:
        if any(await self._take(size)):
            raise corrupted(f"the padding of {name} is not empty")

    async def _take(self, size: int) -> bytearray:
        """Read so many bytes. Memory grows with what has come, not with what was announced."""
        data = bytearray()
        while len(data) < size:
            data += await self._some(size - len(data))
        return data

    async def _some(self, most: int) -> memoryview:
        """At least one byte."""
        if not self._rest and not await self._more():
            raise corrupted("the file is truncated")
        size = min(most, PIECE)
        piece, self._rest = self._rest[:size], self._rest[size:]
        await _update(self._whole, piece)
        return piece

    async def _more(self) -> bool:
        parts: list[bytes] = []
        size = 0
        while size < PIECE and (part := await anext(self._source, None)) is not None:
            parts.append(part)
            size += len(part)
        self._rest = memoryview(b"".join(parts))
        return bool(self._rest)


async def _update(digest: blake3, data: memoryview) -> None:
    if len(data) > _INLINE:
        await asyncio.to_thread(digest.update, data)
    else:
        digest.update(data)


def corrupted(message: str) -> GatewayError:
    """The error for a file that is not whole."""
    return GatewayError("window_corrupted", message, hint="copy the file again, or export the window again")


def too_large(name: str, size: int, most: int) -> GatewayError:
    """The error for a member that is larger than any of its kind may be."""
    return GatewayError("payload_too_large", f"{name} has {size} bytes; at most {most} are allowed")


def too_complex(name: str, problem: object) -> GatewayError:
    """The error for a text with more in it than any of its kind may have."""
    return GatewayError(
        "too_complex", f"{name}: {problem}", hint="no conversation held through a gateway is that large"
    )

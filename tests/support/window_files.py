"""Window files, whole and altered."""

from collections.abc import AsyncIterator, Callable

import orjson
import pytest
from blake3 import blake3

from gateway.errors import GatewayError
from gateway.windows.archive import file_format
from gateway.windows.archive.export import export
from gateway.windows.archive.import_ import import_window
from gateway.windows.context import OperationContext, Services
from tests.support.harness import GatewayHarness


async def file_of(services: Services, name: str = "w") -> bytes:
    """The whole file of a window."""
    done = await export(OperationContext(services, "default"), name)
    data = b"".join([piece async for piece in done.pieces])
    assert len(data) == done.size
    return data


async def stream(data: bytes, step: int = 777) -> AsyncIterator[bytes]:
    """A file in pieces, as from a network."""
    for start in range(0, len(data), step):
        yield data[start : start + step]


async def refused(
    harness: GatewayHarness, data: bytes, *codes: str, name: str | None = "x", as_text: bool = False
) -> str:
    """The import fails with one of `codes`, and leaves nothing behind."""
    before = harness.everything()
    with pytest.raises(GatewayError) as caught:
        await import_window(harness.ctx, stream(data, 50_000), name=name, as_text=as_text)
    assert caught.value.code in codes, caught.value.message
    assert harness.everything() == before
    assert await harness.services.store.window("default", name or "w") is None or name is None
    return caught.value.message


Change = Callable[[dict[str, object]], object]


def rebuilt(data: bytes, change: Change) -> bytes:
    """The file with another manifest and a matching checksum."""
    size = int(data[124:135], 8)
    manifest = orjson.loads(data[file_format.BLOCK : file_format.BLOCK + size])
    change(manifest)
    rest = data[file_format.BLOCK + file_format.padded(size) : -len(file_format.END) - 2 * file_format.BLOCK]
    whole = b"".join(file_format.wrap(file_format.MANIFEST, orjson.dumps(manifest))) + rest
    return whole + _end(whole)


def _end(whole: bytes) -> bytes:
    return b"".join(file_format.wrap(file_format.CHECKSUM, blake3(whole).hexdigest().encode())) + file_format.END

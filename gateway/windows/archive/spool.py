"""An unnamed file that holds an import until it was checked; the kernel deletes it if the process dies."""

import asyncio
import errno
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from gateway.errors import GatewayError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHECK_EVERY = 16 * 2**20  # bytes between two checks of the free space


class Spool:
    """Accepts bytes as long as `reserve` bytes stay free on the disk of `folder`. Raises `storage_full`."""

    def __init__(self, folder: Path, reserve: int) -> None:
        self._folder = folder
        self._reserve = reserve
        self._unchecked = _CHECK_EVERY

    async def __aenter__(self) -> "Spool":
        self._file: IO[bytes] = await asyncio.to_thread(tempfile.TemporaryFile, dir=self._folder)
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(OSError):  # of an earlier write: it was raised already, or the import was cancelled
            await asyncio.to_thread(self._file.close)

    async def expect(self, size: int) -> None:
        """Refuse at once if there is no room for `size` bytes."""
        await asyncio.to_thread(self._check_room, size)

    async def write(self, piece: memoryview) -> None:
        """Add a piece."""
        await asyncio.to_thread(self._write, piece)

    async def rewind(self) -> None:
        """Go back to the beginning."""
        await asyncio.to_thread(self._do, lambda: self._file.seek(0))  # flushes the buffer

    async def read(self, size: int) -> bytes:
        """Read the next bytes."""
        return await asyncio.to_thread(self._file.read, size)

    def _write(self, piece: memoryview) -> None:
        self._unchecked += len(piece)
        if self._unchecked >= _CHECK_EVERY:
            self._check_room(len(piece))
            self._unchecked = 0
        self._do(lambda: self._file.write(piece))

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            why = f"{self._folder}: {error.strerror}"
            if error.errno in _FULL:
                raise _full(why) from error
            raise GatewayError("internal", f"the file cannot be read into {why}") from error

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free - size < self._reserve:
            raise _full(f"{free} bytes are free in {self._folder}, {self._reserve} are kept free (disk_reserve_bytes)")


def _full(why: str) -> GatewayError:
    hint = "free space, or import it without its KV (`as_text=true`)"
    return GatewayError("storage_full", f"not enough disk space for the file: {why}", hint=hint)

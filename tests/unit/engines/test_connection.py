"""The gateway's own HTTP to the engine, against a server whose every byte the test sends: timeouts, limits and TLS."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from gateway.engines.connection import UpstreamError
from gateway.engines.connection_pool import Upstream
from tests.support.certificates import self_signed
from tests.support.fakes.engine import WITHIN

pytestmark = pytest.mark.anyio
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SILENCE_S = 0.3
MUCH = 32 * 2**20  # bytes: more than the kernel keeps of a connection
CHUNKED = b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def served(peer: Peer, tls: ssl.SSLContext | None = None, silence_s: float = WITHIN) -> AsyncIterator[Upstream]:
    """An `Upstream` to a server that treats each connection as `peer` does."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())  # type: ignore[arg-type]
        with suppress(asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
            await peer(reader, writer)
            await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        async with Upstream(url, connect_timeout_s=WITHIN, silence_timeout_s=silence_s) as upstream:
            yield upstream
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)


async def asked(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def test_an_engine_is_not_silent_while_the_client_does_not_read() -> None:
    """The client pauses for longer than the engine may be silent, and then gets the rest."""
    behind = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(CHUNKED + b"3\r\none\r\n")
        await behind.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    taken: list[bytes] = []

    def take(chunks: object) -> bool:
        taken.extend(chunks)  # type: ignore[call-overload]
        return not taken  # the client is behind from its first chunk on

    async with served(peer, silence_s=SILENCE_S) as upstream:
        connection = await upstream.send("GET", b"/", [], b"")
        pouring = asyncio.create_task(connection.stream_to(take))
        await asyncio.wait([pouring], timeout=3 * SILENCE_S)
        assert not pouring.done(), "a slow client was taken for a silent engine"
        behind.set()
        connection.resume()
        taken.extend(await asyncio.wait_for(pouring, WITHIN))
        assert b"".join(taken) == b"onetwo"
        upstream.release_or_abort(connection)


async def test_reading_pauses_when_256_kib_are_buffered() -> None:
    piece, sent = b"x" * 2**16, 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await asked(reader)
        writer.write(CHUNKED)
        while True:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            sent += len(piece)

    async with served(peer) as upstream:
        connection = await upstream.send("GET", b"/", [], b"")
        await connection.read()
        before = -1
        while before < sent < MUCH:  # until the engine can write no more: what the kernel holds is full as well
            before = sent
            await asyncio.sleep(0.2)
        stalled = sent < MUCH
        async with asyncio.timeout(WITHIN):
            while stalled and sent == before:
                await connection.read()
        upstream.release_or_abort(connection)
    assert stalled, f"{sent} bytes were read for a client that reads nothing"


async def test_connection_idle_for_long_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await asked(reader)
            writer.write(WHOLE)

    async with served(peer) as upstream:
        loop = asyncio.get_running_loop()
        now = start = time.monotonic()
        monkeypatch.setattr(loop, "time", lambda: now)
        for seconds, expected in ((0.0, 1), (3.9, 1), (8.0, 2), (11.9, 2), (15.9, 3)):
            now = start + seconds
            connection = await upstream.send("GET", b"/", [], b"")
            assert await connection.read() == b"ok"
            upstream.release_or_abort(connection)
            assert connections == expected, f"at {seconds} s"


async def test_https_engine_needs_a_trusted_certificate(tmp_path: Path) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(WHOLE)

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(self_signed(tmp_path))
    async with served(peer, tls) as upstream:
        with pytest.raises(UpstreamError, match="certificate verify failed"):
            await upstream.send("GET", b"/", [], b"")


@pytest.mark.parametrize("line", [b"a: " + b"b" * 16_384 + b"\r\n", b"x" * 16_384], ids=["lines", "one value"])
@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 X\r\na: ",
        b"HTTP/1.1 103 X\r\n\r\n" * 9000 + b"HTTP/1.1 200 X\r\na: ",
        CHUNKED + b"2\r\nok\r\n0\r\na: ",
    ],
    ids=["head", "interim heads", "trailers"],
)
async def test_endless_headers_are_an_error_and_close_the_connection(begin: bytes, line: bytes) -> None:
    closed = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(begin)
        try:
            for _ in range(MUCH // len(line)):
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            closed.set()

    async with served(peer) as upstream:

        async def exchange() -> None:
            connection = await upstream.send("GET", b"/", [], b"")
            try:
                await connection.stream_to(lambda chunks: True)
            finally:
                upstream.release_or_abort(connection)

        with pytest.raises(UpstreamError, match="256 KiB of headers") as raised:
            await exchange()
        assert raised.value.code == "engine_unreachable"
        await asyncio.wait_for(closed.wait(), WITHIN)


async def test_response_may_have_any_number_of_chunks() -> None:
    many = 100_000  # their sizes alone, 6 bytes each, are more than what there may be of headers at once

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(CHUNKED + b"1\r\nx\r\n" * many + b"0\r\n\r\n")

    taken: list[bytes] = []
    async with served(peer) as upstream:
        connection = await upstream.send("GET", b"/", [], b"")
        taken.extend(await connection.stream_to(lambda chunks: not taken.extend(chunks)))
        upstream.release_or_abort(connection)
    assert len(taken) == many


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_engine_that_sends_much_at_once_does_not_starve_others(anyio_backend: object) -> None:
    taken: dict[int, int] = {}  # bytes in each turn of the event loop
    turn = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % MUCH)
        writer.write(b"x" * MUCH)

    def take(chunks: Sequence[bytes]) -> bool:
        taken[turn] = taken.get(turn, 0) + sum(map(len, chunks))
        return True

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with served(peer) as upstream:
        connection = await upstream.send("GET", b"/", [], b"")
        counting = asyncio.create_task(count_turns())
        taken[-1] = sum(map(len, await connection.stream_to(take)))
        counting.cancel()
        upstream.release_or_abort(connection)
    assert sum(taken.values()) == MUCH
    assert max(taken.values()) <= 2**19

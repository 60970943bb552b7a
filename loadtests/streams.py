"""A client of streamed replies that records when each HTTP chunk arrived and where it was split."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import orjson

PATH = b"/v1/chat/completions"


@dataclass(slots=True)
class Stream:
    """One reply: its HTTP chunks, the time at which each was complete (monotonic, ns), and an error."""

    status: int = 0
    chunks: list[bytes] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    began: int = 0
    ended: int = 0
    error: str = ""


def question(model: str, *, usage: bool = False) -> bytes:
    """Return the body of a small streamed request."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Count."}], "stream": True}
    return orjson.dumps({**body, "stream_options": {"include_usage": True}} if usage else body)


async def request(port: int, body: bytes, session: str, timeout_s: float) -> Stream:
    """POST a request on a new connection and read the reply. Server failures are recorded in it, never raised."""
    loop = asyncio.get_running_loop()
    reader = _Reader(loop)
    transport: asyncio.Transport | None = None
    reader.stream.began = time.monotonic_ns()
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(lambda: reader, "127.0.0.1", port)
            transport.write(_head(port, session, len(body)) + body)
            await reader.finished
    except TimeoutError:
        reader.stream.error = f"not finished after {timeout_s:g} s"
    except OSError as error:
        reader.stream.error = str(error)
    finally:
        if transport is not None:
            transport.abort()
    reader.stream.ended = time.monotonic_ns()
    return reader.stream


async def request_concurrently(port: int, bodies: Sequence[bytes], prefix: str, timeout_s: float) -> list[Stream]:
    """POST all bodies concurrently, each under its own session id."""
    return list(
        await asyncio.gather(*(request(port, body, f"{prefix}{i}", timeout_s) for i, body in enumerate(bodies)))
    )


def _head(port: int, session: str, length: int) -> bytes:
    return (
        b"POST %b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\nx-session-id: %b\r\n"
        b"content-length: %d\r\n\r\n" % (PATH, port, session.encode(), length)
    )


class _Reader(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stream = Stream()
        self.finished: asyncio.Future[None] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._part: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was closed {exc or ''}")

    # Callbacks of the parser.

    def on_headers_complete(self) -> None:
        self.stream.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._part.append(body)

    def on_chunk_complete(self) -> None:
        if self._part:
            self.stream.times.append(time.monotonic_ns())
            self.stream.chunks.append(b"".join(self._part))
            self._part = []

    def on_message_complete(self) -> None:
        self._end("")

    def _end(self, error: str) -> None:
        if not self.finished.done():
            self.stream.error = error
            self.finished.set_result(None)

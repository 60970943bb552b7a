"""The relay's connections to the engine: one exchange at a time on a kept-alive connection, chunk by chunk.

Not a general client, because every token takes this path and a proxy needs little of HTTP. It parses with httptools
(the parser of uvicorn), forwards each body chunk as it was framed, stops reading when the client does not keep up, and
aborts by closing the socket, which makes vLLM stop generating.
"""

import asyncio
import ssl
import time
from collections import deque
from urllib.parse import urlsplit

from gateway.engines.connection import Connection, Headers, UpstreamError
from gateway.runtime.open_files import OutOfFiles
from gateway.runtime.stalls import LostSince, caused_by_own_stall, never_lost

_MAX_IDLE = 256


class Upstream:
    """Keeps connections to one engine and sends requests over them."""

    def __init__(
        self, url: str, *, connect_timeout_s: float, silence_timeout_s: float, lost_since: LostSince = never_lost
    ) -> None:
        self.url = url
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").encode()
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._lost_since = lost_since
        self._out_of_files = OutOfFiles()
        self._idle: deque[Connection] = deque()
        self._abandoned: set[Connection] = set()
        port = f":{self._port}" if self._port not in (80, 443) else ""
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._host_line = f"host: {host}{port}\r\n".encode("latin-1")

    async def __aenter__(self) -> "Upstream":
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().abort()
        if self._abandoned:
            await asyncio.wait([connection.closed for connection in self._abandoned])

    async def send(
        self, method: str, target: bytes, headers: Headers, body: bytes, *, grace_s: float = 0.0
    ) -> Connection:
        """Send a request and wait for the head of the response.

        The caller reads the body from the connection returned, and must always release it. An idle connection that the
        engine closes without responding is replaced by a new one, once. Raises UpstreamError.

        If the exchange is cancelled, or released before its end, the engine's work is aborted: at once, or with
        `grace_s` only when it has begun to write its reply, at the latest after so many seconds.
        """
        head = self._head(method, target, headers, len(body))
        while self._idle:
            idle = self._idle.pop()
            if idle.is_fresh():
                try:
                    return await self._exchange(idle, method, head, body, grace_s)
                except UpstreamError as error:
                    if error.code != "stale":
                        raise
                    break  # the engine has restarted, or just closed it: the others are as old
            else:
                idle.abort()
        return await self._exchange(await self._connect(), method, head, body, grace_s)

    def release_or_abort(self, connection: Connection) -> None:
        """Keep the connection if its exchange is complete and it is reusable, else close it, which aborts the work."""
        if connection.reusable() and len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
        else:
            self._abandon(connection)

    def _abandon(self, connection: Connection) -> None:
        if connection.abort_after_grace():
            self._abandoned.add(connection)
            connection.closed.add_done_callback(lambda _: self._abandoned.discard(connection))

    async def _exchange(
        self, connection: Connection, method: str, head: bytes, body: bytes, grace_s: float
    ) -> Connection:
        try:
            await connection.request(method, head, body, grace_s)
        except asyncio.CancelledError:
            self._abandon(connection)
            raise
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _connect(self, *, retry: bool = True) -> Connection:
        began = time.monotonic()
        try:
            return await self._open()
        except TimeoutError as error:
            if retry and caused_by_own_stall(self._lost_since, began):
                return await self._connect(retry=False)
            raise self._unreachable(f"no connection within {self._connect_timeout_s:g} s") from error
        except OSError as error:
            if self._out_of_files.caused(error):
                why = "the gateway has too many open files"
                raise UpstreamError("rate_limited", why, began=False, sent=False) from error
            raise self._unreachable(str(error)) from error

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await loop.create_connection(
                lambda: Connection(loop, self._silence_timeout_s, self._lost_since),
                self._host, self._port, ssl=self._tls,
            )  # fmt: skip
        return connection

    def _unreachable(self, why: str) -> UpstreamError:
        return UpstreamError("engine_unreachable", f"engine at {self.url}: {why}", began=False, sent=False)

    def _head(self, method: str, target: bytes, headers: Headers, length: int) -> bytes:
        lines = [method.encode(), b" ", self._prefix, target, b" HTTP/1.1\r\n", self._host_line]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if length or method in ("POST", "PUT", "PATCH"):
            lines.append(b"content-length: %d\r\n" % length)
        lines.append(b"\r\n")
        return b"".join(lines)

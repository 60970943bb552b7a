"""uvicorn as the gateway runs it: no headers of its own, no log line per request, and a bound on slow headers."""

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.settings import Settings

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the pool of any client we know keeps a connection, so that the client closes first
_SHUTDOWN_S = 10


def protocol(client_timeout_s: float) -> type[HttpToolsProtocol]:
    """Return uvicorn's HTTP protocol with a bound on how long a client may take for its first request's headers."""

    class Protocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._deadline = self.loop.call_later(client_timeout_s, transport.close)

        def on_headers_complete(self) -> None:
            self._cancel()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _cancel(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket. Raises OSError when the address is in use or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((settings.host, settings.port))
    return sock


async def serve(app: ASGIApp, settings: Settings, sock: socket.socket) -> None:
    """Serve `app` on `sock` until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        http=protocol(settings.client_timeout_s),
        ws="none",
        loop="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    await uvicorn.Server(config).serve(sockets=[sock])

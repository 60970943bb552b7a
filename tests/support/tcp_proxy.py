"""A TCP proxy that delays what it forwards, or lets the answer to something not come back."""

import socket
import threading
import time
from contextlib import suppress


class TcpProxy:
    """Forwards connections to `port` of loopback. `delay_s` is added to each packet of a client.

    A client that sends `cut_at` is cut off, one that sends `mute_at` hears nothing any more. Both get to the server.
    """

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.cut_at = self.mute_at = b""
        self.was_cut = threading.Event()
        self._muted: set[socket.socket] = set()
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> "TcpProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, of: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := of.recv(65536):
                if of in self._sockets[::2]:
                    time.sleep(self.delay_s)
                    if self.cut_at and self.cut_at in data:
                        self.cut_at = b""
                        self.was_cut.set()
                        of.shutdown(socket.SHUT_RDWR)  # first, so that the answer does not get through
                    if self.mute_at and self.mute_at in data:
                        self.mute_at = b""
                        self._muted.add(to)
                        to.sendall(data)
                        self.was_cut.set()
                        continue
                if of not in self._muted:
                    to.sendall(data)
        for one in (of, to):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

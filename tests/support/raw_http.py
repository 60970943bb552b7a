"""An HTTP client that hides nothing: what is sent is sent as it is, and what comes is seen chunk by chunk."""

import json
import select
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

from tests.support.fakes.engine import MODEL, WITHIN


def reset_on_close(sock: socket.socket) -> None:
    """Have a socket send a reset when it is closed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class RawHttpClient:
    """One connection."""

    def __init__(self, url: str, *, receive_buffer: int = 0) -> None:
        address = urlsplit(url)
        self._sock = socket.socket()
        if receive_buffer:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sock.settimeout(WITHIN)
        self._sock.connect((address.hostname, address.port))
        self._stream = self._sock.makefile("rb")
        self.headers: dict[str, str] = {}

    def __enter__(self) -> "RawHttpClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, as a client that goes away."""
        self._stream.close()
        self._sock.close()

    def end(self) -> None:
        """Close the sending side alone: nothing more is asked, but the answer could still come."""
        self._sock.shutdown(socket.SHUT_WR)

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._sock.sendall(data)

    def post(self, path: str, body: bytes, *headers: str) -> None:
        """Send a request with a length."""
        if not any(header.lower().startswith("content-type:") for header in headers):
            headers = ("content-type: application/json", *headers)
        head = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers]
        self.send("\r\n".join(head).encode() + b"\r\n\r\n" + body)

    def chat(self, session: str, **body: Any) -> None:
        """Send a chat completion."""
        whole = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}
        self.post("/v1/chat/completions", json.dumps(whole).encode(), f"x-session-id: {session}")

    def head(self) -> int:
        """Read status and headers of an answer."""
        status = int(self._stream.readline().split(b" ", 2)[1])
        self.headers = {}
        while (line := self._stream.readline()) != b"\r\n":
            assert line, "closed within the headers"
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.lower()] = value.strip()
        return status

    def chunk(self) -> bytes:
        """Read one chunk as it was framed; empty at the end."""
        line = self._stream.readline()
        assert line, "closed between two chunks"
        data = self._stream.read(int(line, 16) + 2)
        assert data.endswith(b"\r\n"), "closed within a chunk"
        return data[:-2]

    def chunks(self) -> list[bytes]:
        """Read every chunk up to the end."""
        return list(iter(self.chunk, b""))

    def body(self) -> bytes:
        """Read the body of an answer that has a length."""
        return self._stream.read(int(self.headers["content-length"]))

    def json(self) -> dict[str, Any]:
        """Read a JSON object from an answer that has a length."""
        value = json.loads(self.body())
        assert isinstance(value, dict)
        return value

    def rest(self) -> bytes:
        """Read until the other side closes. Raises TimeoutError when it does not."""
        return self._stream.read()

    def readable(self) -> bool:
        """Whether an answer has begun to come."""
        return bool(select.select([self._sock], [], [], 0.01)[0])

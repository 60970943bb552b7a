"""Refuse protocols other than HTTP/1.1 with an explanation.

A server may ignore an `Upgrade` header (RFC 9110, 7.8), and has to ignore `h2c`: Java's HTTP client sends it with its
first request. A WebSocket has no ordinary response, so it is refused with an explanation. httptools takes what follows
such a head, the body too, for bytes of the other protocol. So the head is parsed once more, without that header.
"""

from typing import Any, Protocol

import httptools

from gateway.api.endpoint import error_answer
from gateway.errors import GatewayError


class Owner(Protocol):
    """The protocol that a parser reads for: uvicorn's, with the parts of a head that its callbacks have collected."""

    parser: httptools.HttpRequestParser
    url: bytes
    headers: list[tuple[bytes, bytes]]

    def refuse(self, answer: bytes) -> None:
        """Send a complete response, if none has begun, and close."""
        ...


class Http1Parser(httptools.HttpRequestParser):
    """A request parser that stays with HTTP/1.1. Its owner ignores a head while `should_upgrade`."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._owner = owner

    def feed_data(self, data: Any) -> None:
        """Parse received bytes. Raises what httptools raises, except HttpParserUpgrade."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._refuse_or_ignore(data[upgrade.args[0] :])

    def _refuse_or_ignore(self, rest: bytes) -> None:
        owner = self._owner
        wanted = b",".join(value for name, value in owner.headers if name == b"upgrade").lower()
        if b"websocket" in wanted or self.get_method() == b"CONNECT":
            owner.refuse(NO_OTHER_PROTOCOL)
            return
        head = [b"%b %b HTTP/%b" % (self.get_method(), owner.url, self.get_http_version().encode())]
        head += [b"%b: %b" % header for header in owner.headers if header[0] != b"upgrade"]
        owner.parser = Http1Parser(owner)
        owner.parser.feed_data(b"\r\n".join((*head, b"", rest)))


def _closing(error: GatewayError, status: bytes = b"400 Bad Request", more: bytes = b"") -> bytes:
    body = bytes(error_answer(error).body)
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%b\r\n"
    return head % (status, len(body), more) + body


NO_OTHER_PROTOCOL = _closing(
    GatewayError(
        "invalid_request",
        "the gateway speaks HTTP/1.1 only: no WebSocket, no tunnel",
        hint='for a streamed reply send "stream": true in an ordinary POST',
    )
)
NO_HTTP = _closing(
    GatewayError(
        "invalid_request",
        "this is not an HTTP/1.1 request",
        hint="this port supports neither TLS nor HTTP/2: use a base URL that begins with http://",
    )
)
TOO_MANY_CONNECTIONS = _closing(
    GatewayError(
        "rate_limited",
        "too many clients are connected",
        hint="try again in a moment; max_connections and the limit on open files set the maximum",
    ),
    b"503 Service Unavailable",
    b"retry-after: 1\r\n",
)

"""LMCache's message port (`--port`), to which engines speak ZMQ: tell it from the HTTP port, and whether it is read.

The two are easily confused, and LMCache (0.5.6) does not survive that: an HTTP request is no message of an engine, and
ends the thread that reads them (`transport/zmq_impl/mq.py`, `_main_loop`). Nothing is stored or loaded any more until
LMCache is restarted, and its `/healthcheck` stays healthy.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

THREAD = "mq-server-thread"
ENDED = "LMCache reads no messages of the engines any more: its thread for them has ended, as after HTTP to its --port"
RESTART = "restart LMCache; the engines register again by themselves"

_GREETING_S = 0.2  # a peer sends it as soon as it has accepted; an HTTP server never speaks first
_LENGTH = 10


async def speaks_zmq(url: str, timeout_s: float) -> bool:
    """Whether a ZMQ socket listens where `url` points. Nothing is sent. Raises OSError (TimeoutError) if nothing does.

    Each side of a ZMTP connection begins with 0xFF, eight bytes of padding and 0x7F (RFC 23/ZMTP, "Greeting").
    """
    where = urlsplit(url)
    port = where.port or (443 if where.scheme == "https" else 80)
    greeting = b""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(where.hostname, port)
    with suppress(OSError, asyncio.IncompleteReadError):
        try:
            async with asyncio.timeout(_GREETING_S):
                greeting = await reader.readexactly(_LENGTH)
        finally:
            writer.close()
            await writer.wait_closed()
    return greeting[:1] == b"\xff" and greeting[-1:] == b"\x7f"


def is_read(config: Mapping[str, Any], threads: str) -> bool:
    """Whether an LMCache with this `/config` and these `/threads` reads messages; true if they do not tell."""
    server = config.get("mp")
    is_zmq = isinstance(server, dict) and server.get("transport") == "zmq"
    return not is_zmq or THREAD in threads

"""LMCache's message port is told from its HTTP port before anything is sent to it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.kv import message_port
from gateway.kv.lmcache import LMCache
from tests.support.gateway_process import free_port, not_accepting

pytestmark = pytest.mark.anyio

GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f"


@contextmanager
def peer(says: bytes, port: int = 0) -> Iterator[tuple[str, list[bytes]]]:
    """What says something to everybody who connects, and what it got."""
    got: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(ConnectionResetError):
                client.sendall(says)
                while data := client.recv(1000):
                    got.append(data)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", got
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


async def test_nothing_is_sent_to_a_message_port(tmp_path: Path) -> None:
    with peer(GREETING) as (url, got):
        async with LMCache(url, 5.0, tmp_path) as cache:
            for _ in range(2):
                with pytest.raises(
                    GatewayError, match=r"reads messages of engines \(--port\).* nothing was sent"
                ) as error:
                    await cache.info()
            assert error.value.code == "cache_unavailable"
            assert "--http-port" in error.value.hint
            assert "nothing was sent" in await cache.trouble()
            assert await cache.moves("s") is None
    assert got == []


@pytest.mark.local
async def test_a_real_message_port_is_recognised() -> None:
    zmq: Any = pytest.importorskip("zmq", reason="vLLM and LMCache bring pyzmq: the extra `local` or `gpu`")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        assert await message_port.speaks_zmq(f"http://127.0.0.1:{port}", 5.0)
        assert router.poll(100) == 0, "it got no message"


@pytest.mark.parametrize("says", [b"", b"\xff", b"220 mail.example ready\r\n"])
async def test_others_are_no_message_port(says: bytes) -> None:
    with peer(says) as (url, _):
        assert not await message_port.speaks_zmq(url, 5.0)


async def test_where_nothing_listens_is_told_at_once(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionRefusedError):
        await message_port.speaks_zmq(url, 5.0)
    with not_accepting() as url:  # connecting once more would take as long again
        with pytest.raises(TimeoutError):
            await message_port.speaks_zmq(url, 0.05)
        async with LMCache(url, 0.05, tmp_path) as cache:
            assert "does not answer: TimeoutError" in await cache.trouble()


async def test_after_a_failure_the_port_is_looked_at_again(tmp_path: Path) -> None:
    port = free_port()
    async with LMCache(f"http://127.0.0.1:{port}", 5.0, tmp_path) as cache:
        assert "does not answer" in await cache.trouble()
        with peer(GREETING, port) as (_, got):
            assert "nothing was sent" in await cache.trouble()
    assert got == []


@pytest.mark.parametrize(
    ("config", "threads", "read"),
    [
        ({"mp": {"transport": "zmq"}}, "Thread: <Thread(mq-server-thread, started daemon 1)>", True),
        ({"mp": {"transport": "zmq"}}, "=== Thread Summary ===\nTotal threads: 0\n", False),
        ({"mp": {"transport": "grpc"}}, "Total threads: 0", True),
        ({"mp": None}, "", True),
        ({}, "", True),
    ],
)
def test_the_thread_that_reads_messages_is_missed(config: dict[str, Any], threads: str, read: bool) -> None:
    assert message_port.is_read(config, threads) is read

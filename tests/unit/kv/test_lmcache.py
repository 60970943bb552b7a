"""Loads into LMCache's memory: one at a time for a salt, and one for all calls that want the same."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.kv.lmcache import LMCache
from gateway.kv.memory import Moves
from gateway.runtime.progress import silent

pytestmark = pytest.mark.anyio

SAME = (1, 2, 3)


@dataclass
class Loads:
    """The loads requested of the cache, in order, and how many of them may finish."""

    asked: list[tuple[str, int]] = field(default_factory=list)
    done: int = 0
    broken: bool = False
    metrics: str = ""
    other: bytes | None = None  # what it answers to everything but loads and metrics
    answers: threading.Event = field(default_factory=threading.Event)  # to a question for the metrics


class _Server(ThreadingHTTPServer):
    loads: Loads


class _Cache(BaseHTTPRequestHandler):
    """As much of LMCache as a load needs; each is in progress until the test finishes it."""

    server: _Server

    def do_POST(self) -> None:
        loads = self.server.loads
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        loads.asked.append((body["cache_salt"], len(body["token_ids"])))
        number = len(loads.asked)
        self._say(503 if loads.broken else 200, {"status": "submitted", "request_id": number, "chunks": number})

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.server.loads.answers.wait(60)
            self._send(200, self.server.loads.metrics.encode())
            return
        if self.server.loads.other is not None:
            self._send(200, self.server.loads.other)
            return
        number = int(self.path.rpartition("/")[2])
        status = "completed" if number <= self.server.loads.done else "pending"
        self._say(200, {"status": status, "found_keys": number, "total_keys": number})

    def _say(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[_Server]:
    """A cache that finishes no load until the test does."""
    server = _Server(("127.0.0.1", 0), _Cache)
    server.loads = Loads()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.loads.answers.set()
    server.shutdown()
    thread.join()
    server.server_close()


@asynccontextmanager
async def client(server: _Server, locks: Path) -> AsyncIterator[LMCache]:
    async with LMCache(f"http://127.0.0.1:{server.server_address[1]}", 5.0, locks) as cache:
        yield cache


def load(cache: LMCache, salt: str = "s", ids: tuple[int, ...] = SAME) -> asyncio.Task[tuple[int, int]]:
    return asyncio.create_task(cache.prefetch("m", 1, "w", ids, salt, 30.0, silent))


async def asked(server: _Server, *expected: tuple[str, int]) -> None:
    """Wait until these loads were requested, and check that no others are."""
    async with asyncio.timeout(10):
        while len(server.loads.asked) < len(expected):  # noqa: ASYNC110 - another thread's list
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert server.loads.asked == list(expected)


async def test_load_in_progress_is_shared(server: _Server, tmp_path: Path) -> None:
    async with client(server, tmp_path) as cache:
        tasks = [load(cache) for _ in range(5)]
        await asked(server, ("s", 3))
        server.loads.done = 1
        assert await asyncio.gather(*tasks) == [(1, 1)] * 5
        later = load(cache)  # evicted since, for all we know
        await asked(server, ("s", 3), ("s", 3))
        server.loads.done = 2
        assert await later == (2, 2)


async def test_recent_load_is_remembered_until_evicted(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(server, tmp_path) as cache:
        server.loads.done = 9
        assert not cache.has_loaded_lately("w", 3, "s")
        for salt in ("s", "t"):
            await load(cache, salt)
        for name, tokens, salt, known in (("w", 3, "s", True), ("x", 3, "s", False), ("w", 4, "s", False)):
            assert cache.has_loaded_lately(name, tokens, salt) is known
        with pytest.raises(GatewayError):  # whatever came of it
            await cache.delete([ObjectKey("m", 1, 0, "0" * 64, "s")], tier="l1")
        assert [cache.has_loaded_lately("w", 3, salt) for salt in ("s", "t")] == [False, True]
        monkeypatch.setattr("gateway.kv.lmcache._FRESH_S", 0.0)
        assert not cache.has_loaded_lately("w", 3, "t")


async def test_loads_of_one_salt_are_sequential(server: _Server, tmp_path: Path) -> None:
    async with client(server, tmp_path) as cache:
        first = load(cache)
        await asked(server, ("s", 3))
        longer, other = load(cache, ids=(*SAME, 4)), load(cache, salt="t")
        await asked(server, ("s", 3), ("t", 3))
        server.loads.done = 2
        await asked(server, ("s", 3), ("t", 3), ("s", 4))
        server.loads.done = 3
        assert [await first, await other, await longer] == [(1, 1), (2, 2), (3, 3)]


async def test_two_workers_wait_for_each_other(server: _Server, tmp_path: Path) -> None:
    async with client(server, tmp_path) as one, client(server, tmp_path) as other:
        first = load(one)
        await asked(server, ("s", 3))
        second = load(other)
        await asked(server, ("s", 3))
        server.loads.done = 1
        assert await first == (1, 1)
        await asked(server, ("s", 3), ("s", 3))
        server.loads.done = 2
        assert await second == (2, 2)


async def test_waiting_for_a_hung_cache_times_out_once(server: _Server, tmp_path: Path) -> None:
    async with client(server, tmp_path) as cache:
        began = time.monotonic()
        waiting = [asyncio.create_task(cache.prefetch("m", 1, "w", SAME, "s", 1.0, silent)) for _ in range(8)]
        for task in waiting:
            with pytest.raises(GatewayError, match="3 tokens took over 1 s"):
                await task
        assert time.monotonic() - began < 4, "one after the other they would take eight seconds"


async def test_failed_or_cancelled_load_is_not_shared(server: _Server, tmp_path: Path) -> None:
    async with client(server, tmp_path) as cache:
        given_up, waits = load(cache), load(cache)
        await asked(server, ("s", 3))
        given_up.cancel()
        await asked(server, ("s", 3), ("s", 3))
        server.loads.broken = True
        third = load(cache)
        server.loads.done = 2
        assert await waits == (2, 2)
        assert await third == (2, 2)
        failing = [load(cache) for _ in range(2)]
        for task in failing:
            with pytest.raises(GatewayError, match="503"):
                await task
        assert len(server.loads.asked) == 4


COUNTED = 'process_start_time_seconds 1.0\nlmcache_mp_l1_write_chunks_total{cache_salt="s"} 2.0\n'


async def test_metrics_that_are_too_long_are_given_up(server: _Server, tmp_path: Path) -> None:
    server.loads.answers.set()
    async with client(server, tmp_path) as cache:
        server.loads.metrics = COUNTED
        assert await cache.moves("s") == Moves("1.0", 2, 0)
        server.loads.metrics = COUNTED.ljust(4 * 1024 * 1024 + 1, "#")
        assert await cache.moves("s") is None


async def test_metrics_that_do_not_come_are_given_up(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.kv.lmcache._METRICS_S", 0.01)
    server.loads.metrics = COUNTED
    async with client(server, tmp_path) as cache, asyncio.timeout(20):
        assert await cache.moves("s") is None


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"\xff", b"[]", b"[[1,2]]", b"1", b"null", b"{}", b'{"chunk_size":"x"}', b'{"adapters":[1]}'],
)
async def test_what_is_not_lmcache_is_unavailable_in_words(server: _Server, tmp_path: Path, body: bytes) -> None:
    server.loads.other = body
    async with client(server, tmp_path) as cache:
        with pytest.raises(GatewayError, match="is not LMCache, or another version") as error:
            await cache.info()
        assert (error.value.code, "--http-port" in error.value.hint) == ("cache_unavailable", True)
        assert await cache.trouble()

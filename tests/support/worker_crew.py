"""A gateway of several workers, and requests to a particular one."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.fakes.engine import DONE, WITHIN, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

COUNT = 3


@contextmanager
def crew(engine: FakeEngine, folder: Path, **settings: object) -> Iterator[Gateway]:
    """A gateway of several workers, each of them serving."""
    with gateway_in_front_of(engine.url, folder, workers=COUNT, **settings) as gateway:
        try:
            eventually(lambda: len(pids(gateway)) == COUNT, "every worker has served somebody")
            yield gateway
        finally:
            children = workers_of(gateway.process.pid)
            gateway.close()
            for pid in children:
                eventually(lambda pid=pid: not alive(pid), "a worker ends with its parent", within=30)  # type: ignore[misc]


def pid_of(wire: RawHttpClient) -> int:
    """Which worker is at the other end."""
    wire.send(b"GET /admin/health?component=store HTTP/1.1\r\nhost: x\r\n\r\n")
    assert wire.head() == 200
    return int(wire.json()["pid"])


def pids(gateway: Gateway, connections: int = 30) -> set[int]:
    """The workers that answer."""
    found = set()
    for _ in range(connections):
        with RawHttpClient(gateway.url) as wire:
            found.add(pid_of(wire))
    return found


def workers_of(pid: int) -> set[int]:
    """The children of a process; none where it has ended."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in listed.read_text().split()} if listed.exists() else set()


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def two_workers(gateway: Gateway) -> Iterator[tuple[RawHttpClient, RawHttpClient]]:
    """A connection to one worker, and one to another."""
    with ExitStack() as stack:
        first = stack.enter_context(RawHttpClient(gateway.url))
        mine = pid_of(first)
        while pid_of(other := stack.enter_context(RawHttpClient(gateway.url))) == mine:
            pass
        yield first, other


def ask(wire: RawHttpClient, method: str, path: str, **body: Any) -> httpx.Response:
    """One admin request on this very connection."""
    raw = json.dumps(body).encode() if body else b""
    kind = "content-type: application/json"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{kind}\r\ncontent-length: {len(raw)}\r\n\r\n"
    wire.send(head.encode() + raw)
    status = wire.head()
    return httpx.Response(status, json=wire.json())


def chat(wire: RawHttpClient, session: str, **body: Any) -> None:
    """One whole turn on this very connection."""
    wire.chat(session, **body)
    assert wire.head() == 200
    wire.body()


class Held:
    """A streamed reply that is held back until it is released."""

    def __init__(self, engine: FakeEngine) -> None:
        self.release = threading.Event()
        engine.on_chat = self._answer

    def _answer(self, exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(role="assistant", content="held"))
        assert self.release.wait(3 * WITHIN)
        exchange.chunk(DONE)
        exchange.end()


def begin_stream(wire: RawHttpClient, session: str) -> None:
    """Send a turn and read the beginning of its reply."""
    wire.chat(session, stream=True)
    assert wire.head() == 200
    wire.chunk()

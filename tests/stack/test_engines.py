"""The real engine together with a dead one, and a conversation that loses its engine."""

import selectors
import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.stack import local
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, comes_true, converse, until
from tests.stack.restart import across_outage

pytestmark = pytest.mark.stack


class Proxy:
    """Another address of the engine, which can be closed."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._to = (address.hostname or "", address.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.close()

    def close(self) -> None:
        """Close the port and every connection."""
        self._open = False
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _run(self) -> None:
        while self._open:
            for key, _ in self._selector.select(timeout=0.05):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._move(key.fileobj, key.data)

    def _accept(self) -> None:
        mine, _ = self._listener.accept()
        try:
            other = socket.create_connection(self._to)
        except OSError:  # the engine is down
            mine.close()
            return
        self._selector.register(mine, selectors.EVENT_READ, other)
        self._selector.register(other, selectors.EVENT_READ, mine)

    def _move(self, source: Any, target: Any) -> None:
        try:
            data = source.recv(65536)
            target.sendall(data)
        except OSError:
            data = b""
        if not data:
            for one in (source, target):
                if one.fileno() >= 0:
                    self._selector.unregister(one)
                    one.close()


@contextmanager
def gateway_in_front_of(stack: Stack, folder: Path, *urls: str) -> Iterator[Gateway]:
    """A gateway with these engines."""
    settings = stack.settings(folder / "data", CWG_ENGINE_URLS=",".join(urls), CWG_ENGINE_CHECK_S="0.5")
    gateway = Gateway(settings, folder / "gateway.log").start()
    try:
        yield gateway
    finally:
        gateway.close()


def states(gateway: Gateway) -> dict[str, str]:
    component = gateway.http.get("/admin/health").json()["components"]["engine"]
    return {one["url"]: one["state"] for one in component["engines"]}


def test_with_one_engine_dead_sessions_are_served_frozen_and_thawed(stack: Stack, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{local.free_ports(1)[0]}"
    real = stack.plan.engine_url
    with gateway_in_front_of(stack, tmp_path, dead, real) as gateway:
        until(lambda: states(gateway) == {dead: "ejected", real: "healthy"}, "health tells which is dead")
        for number in range(3):
            converse(gateway.client(f"s-{number}"), f"another is dead {number}", turns=2)
            assert gateway.http.get(f"/admin/sessions/s-{number}").json()["engine"] == real
        window = gateway.freeze("s-0", "kept")
        assert window["kv"] == "complete"
        receipt = gateway.thaw("kept", warm="gpu")["receipt"]
        assert receipt["cached_tokens"] >= window["receipt"]["chunks"] * 64 > 0
        assert [card["id"] for card in gateway.http.get("/v1/models").json()["data"]] == ["demo"]
        checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
        assert [c["name"] for c in checks if c["status"] == "failed"] == ["engine"]
        assert [c["status"] for c in checks if c["name"] == "isolation"] == ["ok"]


@dataclass
class Moved:
    """A conversation at one of two addresses, of which one is closed since, and the engine at the other restarted."""

    gateway: Gateway
    messages: list[dict[str, Any]]
    isolation: list[str]
    lost: str
    other: str
    was_unready: bool = False


@across_outage
def moved(stack: Stack, folder: Path) -> Generator[Moved | None]:
    """Two engines do not fit on one machine, so both are the same one.

    The restart takes all that it has in memory: what comes back at the other address knows as little of the
    conversation as a second engine would.
    """
    with (
        Proxy(stack.plan.engine_url) as one,
        Proxy(stack.plan.engine_url) as two,
        gateway_in_front_of(stack, folder, one.url, two.url) as gateway,
    ):
        until(lambda: set(states(gateway).values()) == {"healthy"}, "both are healthy")
        checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
        isolation = [check["status"] for check in checks if check["name"] == "isolation"]
        messages = converse(gateway.client("moved"), "moved", turns=2)
        home = gateway.http.get("/admin/sessions/moved").json()["engine"]
        lost, other = sorted((one, two), key=lambda proxy: proxy.url != home)
        moved = Moved(gateway, messages, isolation, lost.url, other.url)
        yield moved
        lost.close()
        moved.was_unready = comes_true(lambda: gateway.get_status("/readyz") == 503)
        yield None


def test_a_conversation_that_loses_its_engine_continues_on_another_with_its_kv(moved: Moved) -> None:
    gateway = moved.gateway
    assert moved.isolation == ["ok", "ok"]
    assert moved.was_unready
    until(lambda: gateway.get_status("/readyz") == 200, "one is back")
    reply = chat(gateway.client("moved"), [*moved.messages, {"role": "user", "content": "Are you still there?"}])
    assert reply.usage.prompt_tokens_details.cached_tokens > 64
    assert gateway.http.get("/admin/sessions/moved").json()["engine"] == moved.other
    until(lambda: states(gateway)[moved.lost] == "ejected", "the lost one is ejected")
    assert gateway.freeze("moved", "moved")["kv"] == "complete"

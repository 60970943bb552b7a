"""The real engine beside one that is dead, and a conversation that loses its engine."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.stack import local
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse, until

pytestmark = pytest.mark.stack


class Door:
    """Another address of the engine, which can be shut."""

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

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.shut()

    def shut(self) -> None:
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
        except OSError:  # nobody behind it just now
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
def before(stack: Stack, folder: Path, *urls: str) -> Iterator[Gateway]:
    settings = stack.settings(folder / "data", CWG_ENGINE_URLS=",".join(urls), CWG_ENGINE_CHECK_S="0.5")
    gateway = Gateway(settings, folder / "gateway.log").start()
    try:
        yield gateway
    finally:
        gateway.close()


def states(gateway: Gateway) -> dict[str, str]:
    component = gateway.http.get("/admin/health").json()["components"]["engine"]
    return {one["url"]: one["state"] for one in component["engines"]}


def test_beside_a_dead_engine_sessions_are_served_frozen_and_thawed(stack: Stack, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{local.free_ports(1)[0]}"
    real = stack.plan.engine_url
    with before(stack, tmp_path, dead, real) as gateway:
        until(lambda: states(gateway) == {dead: "ejected", real: "healthy"}, "health tells which is dead")
        for number in range(3):
            converse(gateway.client(f"s-{number}"), f"beside the dead {number}", turns=2)
            assert gateway.http.get(f"/admin/sessions/s-{number}").json()["engine"] == real
        window = gateway.freeze("s-0", "kept")
        assert window["kv"] == "complete"
        receipt = gateway.thaw("kept", warm="gpu")["receipt"]
        assert receipt["cached_tokens"] >= window["receipt"]["chunks"] * 64 > 0
        assert [card["id"] for card in gateway.http.get("/v1/models").json()["data"]] == ["demo"]
        checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
        assert [c["name"] for c in checks if c["status"] == "failed"] == ["engine"]
        assert [c["status"] for c in checks if c["name"] == "isolation"] == ["ok"]


def test_a_conversation_that_loses_its_engine_goes_on_at_another_with_its_kv(stack: Stack, tmp_path: Path) -> None:
    with (
        Door(stack.plan.engine_url) as one,
        Door(stack.plan.engine_url) as two,
        before(stack, tmp_path, one.url, two.url) as gateway,
    ):
        until(lambda: set(states(gateway).values()) == {"healthy"}, "both are well")
        isolation = [
            c for c in gateway.http.post("/admin/doctor", json={}).json()["checks"] if c["name"] == "isolation"
        ]
        assert [c["status"] for c in isolation] == ["ok", "ok"]
        client = gateway.client("moved")
        messages = converse(client, "moved", turns=2)
        home = gateway.http.get("/admin/sessions/moved").json()["engine"]
        lost, other = sorted((one, two), key=lambda door: door.url != home)
        lost.shut()
        # Two engines do not fit on one machine: what answers at the other door is started anew, with nothing in its
        # memory, as another engine would have nothing of this conversation.
        stack.parts.engine.stop()
        until(lambda: gateway.get_status("/readyz") == 503, "both are gone")
        stack.parts.engine.start()
        stack.parts.engine.wait_ready(local.ENGINE_WITHIN)
        until(lambda: gateway.get_status("/readyz") == 200, "one is back")
        reply = chat(client, [*messages, {"role": "user", "content": "Are you still there?"}])
        assert reply.usage.prompt_tokens_details.cached_tokens > 64
        assert gateway.http.get("/admin/sessions/moved").json()["engine"] == other.url
        until(lambda: states(gateway)[lost.url] == "ejected", "the lost one is ejected")
        assert gateway.freeze("moved", "moved")["kv"] == "complete"

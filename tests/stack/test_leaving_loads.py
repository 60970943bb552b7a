"""Clients and gateways that disconnect while KV is loaded: the engine survives, and what it computes is right.

The gateway is set to abort at once, so that only the mend in `gateway.stack.connector` stands between them and the
engine. When to go is read from the engine's own gauge of loads in progress, not guessed.
"""

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, until

pytestmark = pytest.mark.stack

_TOKENS = 7000  # of the window, so that its load takes a while
_LEAVES, _CLIENTS = 10, 5  # times that so many clients go at once while the engine loads
_KILLS, _CUT = 20, 2  # times that the gateway is killed, and turns that it has then
_SEEN_WITHIN_S = 3.0
_TRIES = 3  # for each time: not every load is seen before it is over
_LOADING = re.compile(r"^vllm:num_requests_kv_fetch_by_stage\{[^}]*stage=\"in_progress\"[^}]*\} (\S+)$", re.MULTILINE)
_BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", re.MULTILINE)
_LINE = "Tell me what you wrote into the books. "


class Frozen:
    """A window, fresh sessions of it whose KV is in no memory of the engine, and what is the right answer in them."""

    def __init__(self, stack: Stack, gateway: Gateway) -> None:
        self._stack = stack
        self._gateway = gateway
        self._count = 0
        per_line = len(self._tokenize(_LINE * 50)) / 50
        text = {"role": "user", "content": _LINE * int(_TOKENS / per_line)}
        reply = chat(gateway.client("origin"), [text]).choices[0].message.content
        gateway.freeze("origin", "origin")
        self._kept = set(stack.redis.scan_iter(count=10**4))
        self._asked = [text, {"role": "assistant", "content": reply}, {"role": "user", "content": "Go on."}]
        self._witness = self._tokenize(_LINE * 100)

    def sessions(self, count: int) -> list[str]:
        """Thaw isolated clones, each with its own salt."""
        made = []
        for _ in range(count):
            self._count += 1
            body = {"target_window": f"clone-{self._count}", "isolate": True}
            answer = self._gateway.http.post("/admin/windows/origin/clone", json=body)
            assert answer.status_code == 201, answer.text
            made.append(self._gateway.thaw(f"clone-{self._count}")["session_id"])
        return made

    def ask(self, count: int) -> "InFlight":
        """Send a streamed turn in several sessions at once."""
        body = json.dumps({"model": "demo", "messages": self._asked, "max_tokens": 200, "stream": True}).encode()
        return InFlight(self._gateway.url, self.sessions(count), body)

    def loads(self) -> bool:
        """Wait until the engine loads; False where it was too quick to be seen."""
        end = time.monotonic() + _SEEN_WITHIN_S
        while time.monotonic() < end:
            if self._gauge(_LOADING):
                return True
        return False

    def unlink_clones(self) -> None:
        """Remove their KV from Redis: that of a hundred is gigabytes of memory."""
        for key in self._stack.redis.scan_iter(count=10**4):
            if key not in self._kept:
                self._stack.redis.unlink(key)

    def _gauge(self, pattern: re.Pattern[str]) -> float:
        return sum(map(float, pattern.findall(self._stack.engine.get("/metrics").text)))

    def locked(self) -> int:
        """Objects that the cache keeps in memory for readers."""
        answer = httpx.get(f"{self._stack.plan.cache_url}/status").json()
        return int(answer["storage_manager"]["l1_managers"]["_default"]["read_locked_count"])

    def answer(self) -> tuple[int, Any]:
        """How much of a turn's prompt was loaded, and the reply with its logprobs."""
        (session,) = self.sessions(1)
        reply = chat(self._gateway.client(session), self._asked, logprobs=True)
        choice = reply.choices[0]
        return reply.usage.prompt_tokens_details.cached_tokens, [(t.token, t.logprob) for t in choice.logprobs.content]

    def computed(self) -> Any:
        """What the engine makes of a prompt that it has to compute, in the blocks that it freed last.

        It is alone by then: computed together with another prompt, the same tokens have other last bits. The requests
        of those that left are no longer counted, though their loads may continue.
        """
        until(lambda: not self._gauge(_BUSY), "those who left are aborted")
        body = {"prompt": self._witness, "max_tokens": 4, "temperature": 0, "logprobs": 0}
        answer = self._stack.engine.post(
            "/v1/completions", json={"model": "demo", "cache_salt": secrets.token_hex(8), **body}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["logprobs"]["token_logprobs"]

    def _tokenize(self, text: str) -> list[int]:
        answer = self._stack.engine.post("/tokenize", json={"model": "demo", "prompt": text})
        return list(answer.json()["tokens"])


class InFlight:
    """Turns in flight; leaving closes their sockets at once."""

    def __init__(self, url: str, sessions: Sequence[str], body: bytes) -> None:
        address = urlsplit(url)
        self._sockets = [socket.create_connection((address.hostname, address.port)) for _ in sessions]
        for sock, session in zip(self._sockets, sessions, strict=True):
            head = f"POST /s/{session}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def leave(self) -> None:
        for sock in self._sockets:
            sock.close()


def go(frozen: Frozen, count: int, how: Callable[[InFlight], object]) -> None:
    """Ask, and go while the engine loads."""
    for _ in range(_TRIES):
        asked = frozen.ask(count)
        seen = frozen.loads()
        if seen:
            how(asked)
        asked.leave()
        if seen:
            return
    raise AssertionError("no load was seen")


def life(stack: Stack) -> tuple[int, str]:
    """The engine's process, and when it was started."""
    pid = stack.processes.engine.pid
    assert stack.processes.engine.exit_code is None, stack.processes.engine.last_lines()
    return pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.fixture(scope="module")
def gateway(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("leaving")
    gateway = Gateway(stack.settings(folder / "data", CWG_ABORT_GRACE_S="0"), folder / "gateway.log").start()
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def frozen(stack: Stack, gateway: Gateway) -> Iterator[Frozen]:
    frozen = Frozen(stack, gateway)
    yield frozen
    frozen.unlink_clones()


def test_clients_that_disconnect_during_loads_harm_neither_engine_nor_others(stack: Stack, frozen: Frozen) -> None:
    before, loaded, computed = life(stack), frozen.answer(), frozen.computed()
    assert loaded[0] >= _TOKENS * 0.9, "the answer to compare with was loaded itself"
    for _ in range(_LEAVES):
        go(frozen, _CLIENTS, InFlight.leave)
        assert frozen.computed() == computed, "something was written into freed blocks"
        frozen.unlink_clones()
    until(lambda: frozen.locked() == 0, "nothing is kept in memory for those who left")
    assert frozen.answer() == loaded
    assert life(stack) == before


def test_gateways_killed_during_loads_harm_neither_the_engine_nor_others(
    stack: Stack, gateway: Gateway, frozen: Frozen
) -> None:
    before, loaded, computed = life(stack), frozen.answer(), frozen.computed()
    for _ in range(_KILLS):
        go(frozen, _CUT, lambda _: gateway.kill())
        assert frozen.computed() == computed, "something was written into freed blocks"
        frozen.unlink_clones()
        gateway.start()
    until(lambda: frozen.locked() == 0, "nothing is kept in memory for a gateway that is gone")
    assert frozen.answer() == loaded
    assert life(stack) == before


def test_the_engine_reports_that_clients_may_disconnect(gateway: Gateway) -> None:
    checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
    assert [check["status"] for check in checks if check["name"] == "aborts"] == ["ok"]

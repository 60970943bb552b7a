"""Driving the real stack: a Redis server, a gateway process, and conversations."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import redis

from gateway.stack import local
from gateway.stack.trial_tiers import valkey_server

WAIT_S = 30.0


class Gateway:
    """A gateway process in front of a stack that is already running."""

    def __init__(self, settings: Mapping[str, str], log: Path) -> None:
        (self.port,) = local.free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._env = {**_clean_environment(), **settings, "CWG_PORT": str(self.port)}
        self._process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self._clients: list[openai.OpenAI] = []

    def start(self) -> "Gateway":
        """Start it and wait until requests will succeed."""
        argv = [sys.executable, "-m", "gateway", "serve"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(argv, env=self._env, stdout=log, stderr=log)
        until(lambda: self.get_status("/readyz") == 200, f"gateway is ready; see {self.log}")
        return self

    def get_status(self, path: str) -> int:
        """The status of a GET, 0 without an answer."""
        try:
            return self.http.get(path).status_code
        except httpx.TransportError:
            return 0

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Send a signal and wait for its end."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(WAIT_S)
            self._process = None

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.stop(signal.SIGKILL)

    def client(self, session_id: str) -> openai.OpenAI:
        """The openai client with nothing changed but its base URL."""
        client = openai.OpenAI(base_url=f"{self.url}/s/{session_id}/v1", api_key="none", max_retries=0, timeout=120)
        self._clients.append(client)
        return client

    def close(self) -> None:
        """Stop it, and close the clients that the test opened."""
        self.stop()
        for client in self._clients:
            client.close()
        self.http.close()

    def freeze(self, session_id: str, name: str, **more: Any) -> dict[str, Any]:
        """Freeze, and insist that it worked."""
        answer = self.http.post("/admin/windows", json={"session_id": session_id, "window_name": name, **more})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def thaw(self, name: str, **more: Any) -> dict[str, Any]:
        """Thaw, and insist that it worked."""
        answer = self.http.post(f"/admin/windows/{name}/thaw", json=more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


def chat(client: openai.OpenAI, messages: list[dict[str, Any]], **more: Any) -> Any:
    """One greedy turn of exact length unless said otherwise."""
    arguments = {"max_tokens": 12, "temperature": 0, "seed": 1, "extra_body": {"ignore_eos": True}} | more
    return client.chat.completions.create(model="demo", messages=messages, **arguments)  # type: ignore[call-overload]


def converse(client: openai.OpenAI, topic: str, turns: int = 3, words: int = 60) -> list[dict[str, Any]]:
    """Hold a conversation and return its messages, the last reply included."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are terse."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{topic} {turn} " * words})
        reply = chat(client, messages, temperature=1, seed=turn)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    return messages


def same_bytes(ask: Callable[[str], tuple[bytes, bytes]], tries: int = 12) -> None:
    """Insist that two answers are the same, of which `ask` gets a pair each time, under its own salt.

    A busy vLLM puts two tokens into one event, or computes two choices in other steps and so other last bits. So it is
    tried again: a gateway that changed anything would never give the same.
    """
    for number in range(tries):
        one, other = ask(f"direct{number}")
        if one == other:
            return
    assert one == other


def until(holds: Callable[[], Any], what: str, within: float = WAIT_S) -> None:
    """Wait until something holds; fail with what it was if it does not."""
    assert comes_true(holds, within), f"not within {within:g} s: {what}"


def comes_true(holds: Callable[[], Any], within: float = WAIT_S) -> bool:
    """Wait until something holds, and return whether it did in time."""
    end = time.monotonic() + within
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(held)


@contextmanager
def redis_server(directory: Path, port: int | None = None) -> Iterator[tuple[redis.Redis, subprocess.Popen[bytes]]]:
    """A redis-server on a free port, gone afterwards."""
    process, client = start_redis(directory, port or local.free_ports(1)[0])
    try:
        yield client, process
    finally:
        client.close()
        process.kill()
        process.wait()


def start_redis(directory: Path, port: int) -> tuple[subprocess.Popen[bytes], redis.Redis]:
    """Start redis-server and wait for it."""
    argv = [str(valkey_server()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)
    until(lambda: _answers(client), "redis-server is up")
    return process, client


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("CWG_")}

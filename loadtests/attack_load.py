"""Expensive requests: whatever one client sends, nobody else waits 250 ms, and memory stays below 4 x the body."""

import random
import time
from collections.abc import Callable, Iterable

from loadtests import attack_bodies as bodies
from loadtests.attack_rig import (
    Effect,
    Gateway,
    Ground,
    Trials,
    Verdict,
    head,
    least,
    many,
    read_reply,
    verdict,
)

TRIALS = Trials()
_SMALL, _LARGE = 6 * 2**20, 60 * 2**20
_FUZZ_S = 75.0
_ANSWER_S = 60.0


class Opened:
    """A gateway that is there when it is asked for, made anew where a request has killed it or bloated it."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._engine = ground.canned()
        self._gateway: Gateway | None = None

    def __call__(self) -> Gateway:
        """One that runs."""
        if self._gateway is None or not self._gateway.alive or self._gateway.memory() > 600 * 2**20:
            if self._gateway is not None:
                self._gateway.close()
            self._gateway = self._ground.gateway(self._engine)
            # What is loaded at first use belongs to nobody's body.
            self._gateway.chat("warm", model="canned")
            self._gateway.post("/mcp", {"jsonrpc": "2.0", "id": 1, "method": "ping"}, _MCP)
        return self._gateway


_MCP = {"accept": "application/json, text/event-stream"}


def _send(method: str, path: str, body: bytes) -> Callable[[Gateway], str]:
    def send(gateway: Gateway) -> str:
        answer = gateway.ask(method, path, body, _MCP if path == "/mcp" else None, timeout=_ANSWER_S)
        code = answer.json() if answer.status >= 400 else {}
        said = code.get("error") if isinstance(code, dict) else None
        name = said.get("code", "") if isinstance(said, dict) else ""
        return f"{answer.status} {name}".strip()

    return send


def _shapes(ground: Ground, size: int, names: Iterable[str] | None = None) -> Verdict:
    """Every shape of a turn at one size."""
    opened = Opened(ground)
    seen: dict[str, Effect] = {}
    for name in names or bodies.CHAT_SHAPES:
        body = bodies.CHAT_SHAPES[name](size)
        seen[name] = least(opened, _send("POST", bodies.CHAT, body), len(body))
    return _summed(seen)


def _summed(seen: dict[str, Effect]) -> Verdict:
    wrong = {name: one for name, one in seen.items() if not one.in_bounds or " 500" in f" {one.answer}"}
    longest = max(seen, key=lambda name: seen[name].pause_ms)
    largest = max(seen, key=lambda name: seen[name].grown / max(seen[name].size, 2**20))
    figures = [
        f"{len(seen)} shapes",
        f"longest: {longest}: {seen[longest]}",
        f"most memory: {largest}: {seen[largest]}",
    ]
    return verdict(not wrong, *(f"NOT {name}: {one}" for name, one in wrong.items()), *figures)


@TRIALS.add
def turns_of_6_mb(ground: Ground) -> Verdict:
    """No shape of a turn of 6 MB keeps others waiting or takes memory"""
    return _shapes(ground, _SMALL)


@TRIALS.add
def turns_of_60_mb(ground: Ground) -> Verdict:
    """No shape of a turn of 60 MB keeps others waiting or takes memory"""
    names = (
        "messages {}", "messages without text", "empty user messages", "arguments of numbers", "one text",
        "one key", "text of escapes", "model of text", "no JSON", "user of text",
    )  # fmt: skip
    return _shapes(ground, _LARGE, names)


@TRIALS.add
def other_bodies_of_6_mb(ground: Ground) -> Verdict:
    """No shape of 6 MB at any other endpoint keeps others waiting or takes memory"""
    return _others(ground, _SMALL)


@TRIALS.add
def other_bodies_of_60_mb(ground: Ground) -> Verdict:
    """The same with 60 MB, for those that go to the engine, and a key of the admin API"""
    return _others(
        ground, _LARGE, ("completions of token ids", "responses of items", "freeze with a key", "embeddings")
    )


def _others(ground: Ground, size: int, names: Iterable[str] | None = None) -> Verdict:
    opened = Opened(ground)
    seen: dict[str, Effect] = {}
    for name in names or bodies.OTHER_SHAPES:
        where, shape = bodies.OTHER_SHAPES[name]
        method, _, path = where.rpartition(" ")
        body = shape(size)
        seen[name] = least(opened, _send(method or "POST", path, body), len(body))
    return _summed(seen)


@TRIALS.add
def text_plain_of_6_mb(ground: Ground) -> Verdict:
    """A blind text/plain POST of a web page is refused without reading what is in it"""
    opened = Opened(ground)
    body = bodies.CHAT_SHAPES["messages {}"](_SMALL)
    foreign = {"content-type": "text/plain", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}

    def send(gateway: Gateway) -> str:
        return str(gateway.post(bodies.CHAT, body, foreign, timeout=_ANSWER_S).status)

    seen = least(opened, send, len(body))
    return verdict(seen.in_bounds and seen.answer in {"403", "415"}, seen)


@TRIALS.add
def several_at_once(ground: Ground) -> Verdict:
    """Eight turns of 6 MB at once, each of another shape, keep nobody waiting for longer than one"""
    opened = Opened(ground)
    names = (
        "one text",
        "short messages",
        "text parts",
        "tools",
        "arguments of numbers",
        "metadata",
        "no JSON",
        "tool calls",
    )
    every = [bodies.CHAT_SHAPES[name](_SMALL) for name in names]

    def send(gateway: Gateway) -> str:
        heads = [head("POST", bodies.CHAT, length=len(body)) for body in every]
        with many(len(every), lambda _: gateway.wire(timeout=_ANSWER_S)) as socks:
            for sock, first, body in zip(socks, heads, every, strict=True):
                sock.sendall(first + body[:-1])
            for sock in socks:
                sock.sendall(b"}")
            return " ".join(str(read_reply(sock).status) for sock in socks)

    seen = least(opened, send, sum(map(len, every)))
    return verdict(seen.in_bounds, seen)


@TRIALS.add
def query_names(ground: Ground) -> Verdict:
    """A query of 63 KB keeps nobody waiting, at any door, whatever is in it"""
    opened = Opened(ground)
    queries = {
        "names": "&".join(f"{number:x}" for number in range(0x1000, 0x1000 + 12500)),
        "names with values": "&".join(f"a{number}=1" for number in range(8000)),
        "one name": "&".join(["a=1"] * 15000),
        "tags": "&".join(["tags=a"] * 9000),
        "tags of commas": "tags=" + "," * 62000,
        "escapes": "a=" + "%41" * 20000,
        "empty": "&" * 62000,
        "a name": "a" * 62000,
    }
    paths = ("/admin/sessions", "/admin/windows", "/healthz", "/metrics", "/v1/models", "/admin/openapi.json")
    seen: dict[str, Effect] = {}
    for name, query in queries.items():
        for path in paths if name in {"names", "one name"} else paths[:2]:
            raw = head("GET", f"{path}?{query}", "connection: close")
            seen[f"{path}?{name}"] = least(opened, lambda g, raw=raw: g.raw(raw).status, len(raw))  # type: ignore[misc]
    return _summed(seen)


@TRIALS.add
def paths_and_headers(ground: Ground) -> Verdict:
    """A path or a header of 60 KB keeps nobody waiting"""
    opened = Opened(ground)
    close = "connection: close"
    heads = {
        "path of slashes": head("GET", "/" * 60000, close),
        "path of a/": head("GET", "/v1" + "/a" * 30000, close),
        "path of %2f": head("GET", "/v1" + "%2f" * 20000, close),
        "path of dots": head("GET", "/v1" + "/.." * 20000, close),
        "session in the path": head("POST", "/s/" + "a" * 60000 + bodies.CHAT, close, length=0),
        "session header": head("POST", bodies.CHAT, "x-session-id: " + "a" * 60000, close, length=0),
        "window header": head("POST", bodies.CHAT, "x-window: " + "a" * 60000, close, length=0),
        "codex metadata": head("POST", bodies.CHAT, "x-codex-turn-metadata: " + "[" * 60000, close, length=2) + b"{}",
        "accept": head("GET", "/admin/sessions", "accept: " + "a/b," * 15000, close),
        "cookie": head("GET", "/admin/sessions", "cookie: " + "a=b;" * 15000, close),
        "key": head("GET", "/admin/sessions", "authorization: Bearer " + "k" * 60000, close),
        "6,000 headers": head("GET", "/admin/sessions", *[f"a{n}: b" for n in range(6000)], close),
        "content type": head("POST", "/admin/windows", "content-type: " + "a/b;" * 15000, close, length=2) + b"{}",
    }
    seen = {name: least(opened, lambda g, raw=raw: g.raw(raw).status, len(raw)) for name, raw in heads.items()}  # type: ignore[misc]
    return _summed(seen)


@TRIALS.add
def fuzz(ground: Ground) -> Verdict:
    """One request of any kind and any size: no pause of 250 ms, memory below four times the body"""
    chance = random.Random(ground.seed)
    opened, seen, number = Opened(ground), {}, 0
    doors = [("POST", bodies.CHAT)] * 4 + [
        ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"), ("POST", "/v1/embeddings"),
        ("POST", "/v1/messages/count_tokens"), ("POST", "/tokenize"), ("POST", "/admin/windows"), ("POST", "/mcp"),
        ("PUT", "/admin/policies"), ("POST", "/admin/windows/w/thaw"), ("POST", "/admin/windows/import"),
    ]  # fmt: skip
    end = time.monotonic() + _FUZZ_S
    while time.monotonic() < end:
        number += 1
        size = int(2 ** chance.uniform(10, 25.8))
        method, path = chance.choice(doors)
        name, shape = chance.choice([*bodies.CHAT_SHAPES.items(), ("drawn", None), ("drawn", None), ("drawn", None)])
        body = shape(size) if shape else bodies.drawn(chance, size)
        one = least(opened, _send(method, path, body), len(body))
        seen[f"{number}: {method} {path} {name}"] = one
    found = _summed(seen)
    return Verdict(found.held, f"seed {ground.seed}, {found.figures}")

"""Expensive requests: whatever one client sends, no other waits 250 ms, and memory stays below 4 x the body."""

import random
import time
from collections.abc import Callable, Iterable

from loadtests import attack_bodies as bodies
from loadtests.attack_harness import (
    Gateway,
    Impact,
    Testbed,
    Trials,
    Verdict,
    head,
    least_impact,
    open_connections,
    read_reply,
    verdict,
)

TRIALS = Trials()
_SMALL, _LARGE = 6 * 2**20, 60 * 2**20
_FUZZ_S = 75.0
_ANSWER_S = 60.0


class ReusableGateway:
    """A running gateway, replaced once a request has killed it or made it grow."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self._engine = testbed.canned_engine()
        self._gateway: Gateway | None = None

    def __call__(self) -> Gateway:
        """Return a gateway that runs and is small."""
        if self._gateway is None or not self._gateway.alive or self._gateway.memory() > 600 * 2**20:
            if self._gateway is not None:
                self._gateway.close()
            self._gateway = self._testbed.gateway(self._engine)
            # Modules loaded at first use must not count as memory of a body.
            self._gateway.chat("warm", model="canned")
            self._gateway.post("/mcp", {"jsonrpc": "2.0", "id": 1, "method": "ping"}, _MCP)
        return self._gateway


_MCP = {"accept": "application/json, text/event-stream"}


def _send(method: str, path: str, body: bytes) -> Callable[[Gateway], str]:
    def send(gateway: Gateway) -> str:
        answer = gateway.request(method, path, body, _MCP if path == "/mcp" else None, timeout=_ANSWER_S)
        body_json = answer.json() if answer.status >= 400 else {}
        error = body_json.get("error") if isinstance(body_json, dict) else None
        code = error.get("code", "") if isinstance(error, dict) else ""
        return f"{answer.status} {code}".strip()

    return send


def _measure_shapes(testbed: Testbed, size: int, names: Iterable[str] | None = None) -> Verdict:
    """Send every shape of a chat turn at one size."""
    gateways = ReusableGateway(testbed)
    impacts: dict[str, Impact] = {}
    for name in names or bodies.CHAT_SHAPES:
        body = bodies.CHAT_SHAPES[name](size)
        impacts[name] = least_impact(gateways, _send("POST", bodies.CHAT, body), len(body))
    return _summarize(impacts)


def _summarize(impacts: dict[str, Impact]) -> Verdict:
    failures = {
        name: impact for name, impact in impacts.items() if not impact.within_limits or " 500" in f" {impact.answer}"
    }
    longest = max(impacts, key=lambda name: impacts[name].pause_ms)
    largest = max(impacts, key=lambda name: impacts[name].memory_growth / max(impacts[name].size, 2**20))
    figures = [
        f"{len(impacts)} shapes",
        f"longest: {longest}: {impacts[longest]}",
        f"most memory: {largest}: {impacts[largest]}",
    ]
    return verdict(not failures, *(f"NOT {name}: {impact}" for name, impact in failures.items()), *figures)


@TRIALS.add
def turns_of_6_mb(testbed: Testbed) -> Verdict:
    """No shape of a 6 MB turn blocks other requests or takes excessive memory"""
    return _measure_shapes(testbed, _SMALL)


@TRIALS.add
def turns_of_60_mb(testbed: Testbed) -> Verdict:
    """No shape of a 60 MB turn blocks other requests or takes excessive memory"""
    names = (
        "messages {}", "messages without text", "empty user messages", "arguments of numbers", "one text",
        "one key", "text of escapes", "model of text", "no JSON", "user of text",
    )  # fmt: skip
    return _measure_shapes(testbed, _LARGE, names)


@TRIALS.add
def other_bodies_of_6_mb(testbed: Testbed) -> Verdict:
    """No shape of a 6 MB body at any other endpoint blocks other requests or takes excessive memory"""
    return _measure_other_shapes(testbed, _SMALL)


@TRIALS.add
def other_bodies_of_60_mb(testbed: Testbed) -> Verdict:
    """The same with 60 MB, for endpoints that reach the engine, and a key of the admin API"""
    return _measure_other_shapes(
        testbed, _LARGE, ("completions of token ids", "responses of items", "freeze with a key", "embeddings")
    )


def _measure_other_shapes(testbed: Testbed, size: int, names: Iterable[str] | None = None) -> Verdict:
    gateways = ReusableGateway(testbed)
    impacts: dict[str, Impact] = {}
    for name in names or bodies.OTHER_SHAPES:
        where, shape = bodies.OTHER_SHAPES[name]
        method, _, path = where.rpartition(" ")
        body = shape(size)
        impacts[name] = least_impact(gateways, _send(method or "POST", path, body), len(body))
    return _summarize(impacts)


@TRIALS.add
def text_plain_of_6_mb(testbed: Testbed) -> Verdict:
    """A blind text/plain POST from a web page is refused without parsing its body"""
    gateways = ReusableGateway(testbed)
    body = bodies.CHAT_SHAPES["messages {}"](_SMALL)
    foreign = {"content-type": "text/plain", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}

    def send(gateway: Gateway) -> str:
        return str(gateway.post(bodies.CHAT, body, foreign, timeout=_ANSWER_S).status)

    impact = least_impact(gateways, send, len(body))
    return verdict(impact.within_limits and impact.answer in {"403", "415"}, impact)


@TRIALS.add
def several_at_once(testbed: Testbed) -> Verdict:
    """Eight concurrent 6 MB turns of different shapes block others no longer than one does"""
    gateways = ReusableGateway(testbed)
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
    all_bodies = [bodies.CHAT_SHAPES[name](_SMALL) for name in names]

    def send(gateway: Gateway) -> str:
        heads = [head("POST", bodies.CHAT, length=len(body)) for body in all_bodies]
        with open_connections(len(all_bodies), lambda _: gateway.connect(timeout=_ANSWER_S)) as socks:
            for sock, first, body in zip(socks, heads, all_bodies, strict=True):
                sock.sendall(first + body[:-1])
            for sock in socks:
                sock.sendall(b"}")
            return " ".join(str(read_reply(sock).status) for sock in socks)

    impact = least_impact(gateways, send, sum(map(len, all_bodies)))
    return verdict(impact.within_limits, impact)


@TRIALS.add
def query_strings(testbed: Testbed) -> Verdict:
    """A 63 KB query string does not block other requests, at any endpoint, whatever it contains"""
    gateways = ReusableGateway(testbed)
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
    impacts: dict[str, Impact] = {}
    for name, query in queries.items():
        for path in paths if name in {"names", "one name"} else paths[:2]:
            raw = head("GET", f"{path}?{query}", "connection: close")
            impacts[f"{path}?{name}"] = least_impact(gateways, lambda g, raw=raw: g.send_raw(raw).status, len(raw))  # type: ignore[misc]
    return _summarize(impacts)


@TRIALS.add
def paths_and_headers(testbed: Testbed) -> Verdict:
    """A 60 KB path or header does not block other requests"""
    gateways = ReusableGateway(testbed)
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
    impacts = {
        name: least_impact(gateways, lambda g, raw=raw: g.send_raw(raw).status, len(raw)) for name, raw in heads.items()
    }  # type: ignore[misc]
    return _summarize(impacts)


@TRIALS.add
def fuzz(testbed: Testbed) -> Verdict:
    """Any one request of any size: no pause of 250 ms, memory below four times the body"""
    rng = random.Random(testbed.seed)
    gateways, impacts, number = ReusableGateway(testbed), {}, 0
    endpoints = [("POST", bodies.CHAT)] * 4 + [
        ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"), ("POST", "/v1/embeddings"),
        ("POST", "/v1/messages/count_tokens"), ("POST", "/tokenize"), ("POST", "/admin/windows"), ("POST", "/mcp"),
        ("PUT", "/admin/policies"), ("POST", "/admin/windows/w/thaw"), ("POST", "/admin/windows/import"),
    ]  # fmt: skip
    end = time.monotonic() + _FUZZ_S
    while time.monotonic() < end:
        number += 1
        size = int(2 ** rng.uniform(10, 25.8))
        method, path = rng.choice(endpoints)
        name, shape = rng.choice([*bodies.CHAT_SHAPES.items(), ("random", None), ("random", None), ("random", None)])
        body = shape(size) if shape else bodies.random_body(rng, size)
        impact = least_impact(gateways, _send(method, path, body), len(body))
        impacts[f"{number}: {method} {path} {name}"] = impact
    summary = _summarize(impacts)
    return Verdict(summary.passed, f"seed {testbed.seed}, {summary.figures}")

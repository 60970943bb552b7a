"""Slow clients, clients that vanish, and many of them."""

import json
import socket
import struct
import threading
import time
from pathlib import Path

from loadtests.attack_bodies import CHAT
from loadtests.attack_http import Endless
from loadtests.attack_rig import (
    Gateway,
    Ground,
    Trials,
    Verdict,
    first_false,
    head,
    many,
    read_reply,
    together,
    verdict,
    wait_for,
)
from tests.support.fakes.engine import MODEL, Exchange, delta

TRIALS = Trials()
_AT_ONCE = struct.pack("ii", 1, 0)
_PIECE = delta(content="x" * 60_000)
_MCP = {"accept": "application/json, text/event-stream"}


def _body(**more: object) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def _stream(gateway: Gateway, session: str, *, receive_buffer: int = 0) -> socket.socket:
    """A streamed turn of which nothing has been read."""
    sock = gateway.wire(receive_buffer=receive_buffer)
    body = _body(stream=True)
    sock.sendall(head("POST", CHAT, f"x-session-id: {session}", length=len(body)) + body)
    return sock


class Fast:
    """A reply of megabytes for sessions that stream, an ordinary one for the others."""

    def __init__(self, exchange: Exchange) -> None:
        exchange.begin()
        for _ in range(400):
            exchange.chunk(_PIECE)
        exchange.end()


@TRIALS.add
def readers_that_stall(ground: Ground) -> Verdict:
    """As many clients that read nothing as turns may wait for the store: others are answered, and it ends"""
    engine = ground.engine()
    ordinary = engine.answer_chat
    engine.on_chat = lambda e: Fast(e) and None if e.request.json.get("stream") else ordinary(e)
    gateway = ground.gateway(engine.url, turn_queue=20, client_timeout_s=3, busy_wait_s=1)
    with many(22, lambda n: _stream(gateway, f"stalled-{n}", receive_buffer=4096)):
        time.sleep(1)
        other = gateway.chat("other", "x", timeout=5)
        freed = wait_for(lambda: gateway.delete("/admin/sessions/stalled-0").status in (200, 404), 20)
    return first_false(
        {f"another turn is answered, not {other.status}": other.status == 200, "their sessions come free": freed}
    )


@TRIALS.add
def engine_that_is_silent(ground: Ground) -> Verdict:
    """As many turns at an engine that says nothing as turns may wait for the store: others are answered"""
    engine = ground.engine()
    over = threading.Event()
    ordinary = engine.answer_chat
    engine.on_chat = lambda e: over.wait(30) and None if e.request.json.get("stream") else ordinary(e)
    gateway = ground.gateway(engine.url, turn_queue=20)
    with many(22, lambda n: _stream(gateway, f"waiting-{n}")):
        time.sleep(1)
        other = gateway.chat("other", "x", timeout=5)
        over.set()
    return verdict(other.status == 200, f"another turn: {other.status}")


@TRIALS.add
def slow_heads(ground: Ground) -> Verdict:
    """500 half heads are closed in time, and others are served meanwhile"""
    gateway = ground.gateway(ground.engine().url, client_timeout_s=2)

    def half(_: int) -> socket.socket:
        sock = gateway.wire()
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhos")
        return sock

    with many(500, half) as socks:
        began = time.monotonic()
        served = gateway.chat("a", "x", timeout=5).status
        for _ in range(5):  # one byte each second does not keep it open
            time.sleep(1)
            _drip(socks[0], b"t")
        closed = sum(_closed(sock) for sock in socks)
    return verdict(
        closed == 500 and served == 200,
        f"{closed} of 500 closed after {time.monotonic() - began:.0f} s, a turn {served}",
    )


@TRIALS.add
def slow_bodies(ground: Ground) -> Verdict:
    """A body that comes byte by byte has an end"""
    engine = ground.engine()
    try:
        gateway = ground.gateway(engine.url, client_timeout_s=1, body_timeout_s=5)
    except RuntimeError:  # a gateway that knows no such setting
        gateway = ground.gateway(engine.url, client_timeout_s=1)
    began, closed = time.monotonic(), 0.0
    with gateway.wire() as sock:
        sock.sendall(head("POST", CHAT, length=100_000) + b'{"')
        while time.monotonic() - began < 25 and not closed:
            time.sleep(0.4)
            if not _drip(sock, b"a") or _closed(sock, quick=True):
                closed = time.monotonic() - began
    return verdict(
        bool(closed),
        f"closed after {closed:.1f} s" if closed else "open after 25 s, at client_timeout_s=1, body_timeout_s=5",
    )


def _drip(sock: socket.socket, data: bytes) -> bool:
    try:
        sock.sendall(data)
    except OSError:
        return False
    return True


def _closed(sock: socket.socket, *, quick: bool = False) -> bool:
    sock.settimeout(0.001 if quick else 0.05)
    try:
        return sock.recv(4096) == b"" or not quick or True
    except TimeoutError:
        return False
    except OSError:
        return True


@TRIALS.add
def keep_alive_of_sockets(ground: Ground) -> Verdict:
    """The kernel looks whether a silent client is still there (SO_KEEPALIVE)"""
    engine = ground.engine()
    endless = threading.Event()
    engine.on_chat = lambda exchange: (exchange.begin(), exchange.chunk(delta(content="x")), endless.wait(5))[0]
    gateway = ground.gateway(engine.url)
    with _stream(gateway, "a") as sock:
        time.sleep(1)
        timer = _timer(gateway.port, sock.getsockname()[1])
        endless.set()
    return verdict(timer == "02", f"timer {timer or 'none'} of the connection in /proc/net/tcp (02: keepalive)")


def _timer(port: int, client: int) -> str:
    """The timer of the server's end of a connection."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == port and int(fields[2].split(":")[1], 16) == client:
            return fields[5].split(":")[0]
    return ""


@TRIALS.add
def soft_limit_1024(ground: Ground) -> Verdict:
    """With ulimit -n 1024 560 streams at once are served: the gateway raises its limit"""
    return _streams(ground, 1024, 560)


def _streams(ground: Ground, limit: int, count: int) -> Verdict:
    engine = ground.engine()
    endless = Endless(engine)
    gateway = ground.gateway(engine.url, {"nofile": f"{limit}:"})
    with many(count, lambda n: _stream(gateway, f"s{n}")) as socks:
        statuses = [_status(sock) for sock in socks]
        idle = gateway.get("/healthz", timeout=5).status
        endless.over.set()
    after = gateway.chat("after", "x", timeout=10).status
    good = statuses.count(200)
    return verdict(
        good == count and idle == after == 200,
        f"{good} of {count} streams, healthz beside them {idle}, a turn after {after}",
    )


def _status(sock: socket.socket) -> int:
    sock.settimeout(15)
    try:
        data = sock.recv(16)
        return int(data.split(b" ")[1]) if data.startswith(b"HTTP/1.1 ") else 0
    except (OSError, IndexError, ValueError):
        return 0


@TRIALS.add
def hard_limit_300(ground: Ground) -> Verdict:
    """Where there are no more descriptors, that is said in the log and in a 503, and is no engine's fault"""
    engine = ground.engine()
    endless = Endless(engine)
    gateway = ground.gateway(engine.url, {"nofile": "300:300"})
    socks = [_stream(gateway, f"s{n}") for n in range(200)]
    statuses = [_status(sock) for sock in socks]
    time.sleep(3)
    later = [gateway.get("/admin/sessions", timeout=3).status for _ in range(5)]
    probed = gateway.get("/healthz", timeout=3).status
    endless.over.set()
    for sock in socks:
        sock.close()
    back = wait_for(lambda: gateway.chat("after", "x", timeout=5).status == 200, 10)
    log = gateway.log.lower()
    good, refused, closed = (statuses.count(status) for status in (200, 503, 0))
    checks = {
        f"in a burst each is served or refused in words, not {sorted(set(statuses))}": good + refused == 200,
        "a probe is answered while all are busy": probed == 200,
        f"one by one each is refused in words, not {later}": all(status in (200, 503) for status in later),
        "the log says so": any(word in log for word in ("files may be open", "open files", "emfile", "connections")),
        "a turn works afterwards": back,
    }
    return first_false(checks, f"of 200 {good} served, {refused} refused, {closed} closed, later ones {later}")


@TRIALS.add
def idle_connections(ground: Ground) -> Verdict:
    """3,000 idle connections keep nobody out, and take little"""
    gateway = ground.gateway(ground.engine().url)
    before = gateway.memory()
    with many(3000, lambda _: gateway.wire()):
        served = gateway.chat("a", "x", timeout=5).status
        grown = gateway.memory() - before
    return verdict(served == 200 and grown < 64 * 2**20, f"a turn beside them {served}, +{grown >> 20} MB")


@TRIALS.add
def resets(ground: Ground) -> Verdict:
    """300 streams that are reset at once leave no turn in flight, no descriptor and no error in the log"""
    engine = ground.engine()
    endless = Endless(engine)
    gateway = ground.gateway(engine.url, busy_wait_s=1)
    with _stream(gateway, "warm") as sock:
        _status(sock)
    before = gateway.fds()
    with many(300, lambda n: _stream(gateway, f"s{n}")) as socks:
        good = [_status(sock) for sock in socks].count(200)
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    back = wait_for(lambda: gateway.fds() <= before + 40, 15)
    free = wait_for(lambda: gateway.delete("/admin/sessions/s7").status == 200, 10)
    endless.over.set()
    errors = gateway.log.count(" ERROR ")
    return first_false(
        {"descriptors are back": back, "sessions are free": free, "no errors": not errors},
        f"{good} streams, {gateway.fds() - before:+} descriptors",
    )


@TRIALS.add
def leaving_at_every_byte(ground: Ground) -> Verdict:
    """A client that leaves after any number of bytes of its request leaves nothing behind"""
    engine = ground.engine()
    gateway = ground.gateway(engine.url)
    gateway.chat("warm")
    before = gateway.fds()
    body = _body(stream=True)
    whole = head("POST", CHAT, "x-session-id: leaver", length=len(body)) + body
    for at in range(1, len(whole) + 1, 3):
        with gateway.wire() as sock:
            sock.sendall(whole[:at])
            if at % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    back = wait_for(lambda: gateway.fds() <= before + 12, 10)
    return first_false(
        {
            "descriptors are back": back,
            "no errors": " ERROR " not in gateway.log,
            "alive": gateway.chat("x").status == 200,
        },
        f"{len(whole) // 3} clients",
    )


@TRIALS.add
def mcp_calls_aborted(ground: Ground) -> Verdict:
    """400 aborted MCP calls leave no memory, no descriptor and no error"""
    gateway = ground.gateway(ground.engine().url)
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "session_list", "arguments": {}}}
    gateway.post("/mcp", call, _MCP)
    raw = json.dumps(call).encode()
    request = head("POST", "/mcp", "accept: application/json, text/event-stream", length=len(raw)) + raw
    before, fds = gateway.memory(), gateway.fds()
    for number in range(400):
        with gateway.wire() as sock:
            sock.sendall(request)
            if number % 3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            if number % 3 == 2:
                time.sleep(0.002)
    back = wait_for(lambda: gateway.fds() <= fds + 12, 10)
    grown = gateway.memory() - before
    works = gateway.post("/mcp", call, _MCP)
    return first_false(
        {
            "descriptors are back": back,
            f"memory +{grown >> 20} MB": grown < 48 * 2**20,
            "it works": works.status == 200,
            "no errors": " ERROR " not in gateway.log,
        }
    )


@TRIALS.add
def new_sessions(ground: Ground) -> Verdict:
    """3,000 new sessions leave little memory behind"""
    gateway = ground.gateway(ground.engine().url)
    body = _body()

    def some(first: int) -> int:
        done = 0
        with gateway.wire() as sock:
            for number in range(first, first + 750):
                sock.sendall(head("POST", CHAT, f"x-session-id: n{number}", length=len(body)) + body)
                done += read_reply(sock).status == 200
        return done

    some(0)
    before = gateway.memory()
    began = time.monotonic()
    done: list[int] = together(*(lambda n=n: some(1000 * n) for n in range(1, 5)), within=60)  # type: ignore[misc]
    took = time.monotonic() - began
    grown = gateway.memory() - before
    return verdict(
        sum(filter(None, done)) == 3000 and grown < 32 * 2**20,
        f"{sum(filter(None, done))} turns in {took:.0f} s, +{grown >> 20} MB",
    )

"""Slow clients, clients that disappear, and large numbers of them."""

import json
import socket
import threading
import time
from pathlib import Path

from loadtests.attack_bodies import CHAT
from loadtests.attack_harness import (
    Gateway,
    Testbed,
    Trials,
    Verdict,
    check_all,
    head,
    open_connections,
    read_reply,
    run_concurrently,
    verdict,
    wait_for,
)
from loadtests.attack_http import EndlessReply
from tests.support.fakes.engine import MODEL, Exchange, delta
from tests.support.raw_http import reset_on_close

TRIALS = Trials()
_LARGE_CHUNK = delta(content="x" * 60_000)
_MCP = {"accept": "application/json, text/event-stream"}


def _body(**more: object) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def _stream(gateway: Gateway, session: str, *, receive_buffer: int = 0) -> socket.socket:
    """Send a streamed turn, and read nothing of its response."""
    sock = gateway.connect(receive_buffer=receive_buffer)
    body = _body(stream=True)
    sock.sendall(head("POST", CHAT, f"x-session-id: {session}", length=len(body)) + body)
    return sock


def _stream_megabytes(exchange: Exchange) -> None:
    exchange.begin()
    for _ in range(400):
        exchange.chunk(_LARGE_CHUNK)
    exchange.end()


@TRIALS.add
def stalled_readers(testbed: Testbed) -> Verdict:
    """With the whole turn queue held by clients that do not read, others are answered, and it drains"""
    engine = testbed.engine()
    ordinary = engine.answer_chat
    engine.on_chat = lambda e: _stream_megabytes(e) if e.request.json.get("stream") else ordinary(e)
    gateway = testbed.gateway(engine.url, turn_queue=20, client_timeout_s=3, busy_wait_s=1)
    with open_connections(22, lambda n: _stream(gateway, f"stalled-{n}", receive_buffer=4096)):
        time.sleep(1)
        other = gateway.chat("other", "x", timeout=5)
        freed = wait_for(lambda: gateway.delete("/admin/sessions/stalled-0").status in (200, 404), 20)
    return check_all(
        {
            f"another turn is answered, not {other.status}": other.status == 200,
            "the stalled sessions can be deleted": freed,
        }
    )


@TRIALS.add
def silent_engine(testbed: Testbed) -> Verdict:
    """With the whole turn queue held by turns at a silent engine, others are answered"""
    engine = testbed.engine()
    finished = threading.Event()
    ordinary = engine.answer_chat
    engine.on_chat = lambda e: finished.wait(30) and None if e.request.json.get("stream") else ordinary(e)
    gateway = testbed.gateway(engine.url, turn_queue=20)
    with open_connections(22, lambda n: _stream(gateway, f"waiting-{n}")):
        time.sleep(1)
        other = gateway.chat("other", "x", timeout=5)
        finished.set()
    return verdict(other.status == 200, f"another turn: {other.status}")


@TRIALS.add
def slow_headers(testbed: Testbed) -> Verdict:
    """500 incomplete request heads are closed in time, and others are served meanwhile"""
    gateway = testbed.gateway(testbed.engine().url, client_timeout_s=2)

    def half(_: int) -> socket.socket:
        sock = gateway.connect()
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhos")
        return sock

    with open_connections(500, half) as socks:
        began = time.monotonic()
        served = gateway.chat("a", "x", timeout=5).status
        for _ in range(5):  # one byte each second does not keep it open
            time.sleep(1)
            _sends(socks[0], b"t")
        closed = sum(_closed(sock) for sock in socks)
    return verdict(
        closed == 500 and served == 200,
        f"{closed} of 500 closed after {time.monotonic() - began:.0f} s, a turn {served}",
    )


@TRIALS.add
def slow_bodies(testbed: Testbed) -> Verdict:
    """A body that arrives byte by byte is cut off in the end"""
    engine = testbed.engine()
    try:
        gateway = testbed.gateway(engine.url, client_timeout_s=1, body_timeout_s=5)
    except RuntimeError:  # an older gateway without body_timeout_s
        gateway = testbed.gateway(engine.url, client_timeout_s=1)
    began, closed = time.monotonic(), 0.0
    with gateway.connect() as sock:
        sock.sendall(head("POST", CHAT, length=100_000) + b'{"')
        while time.monotonic() - began < 25 and not closed:
            time.sleep(0.4)
            if not _sends(sock, b"a") or _closed(sock, quick=True):
                closed = time.monotonic() - began
    return verdict(
        bool(closed),
        f"closed after {closed:.1f} s" if closed else "open after 25 s, at client_timeout_s=1, body_timeout_s=5",
    )


def _sends(sock: socket.socket, data: bytes) -> bool:
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
def socket_keepalive(testbed: Testbed) -> Verdict:
    """The kernel checks whether a silent client is still there (SO_KEEPALIVE)"""
    engine = testbed.engine()
    endless = threading.Event()
    engine.on_chat = lambda exchange: (exchange.begin(), exchange.chunk(delta(content="x")), endless.wait(5))[0]
    gateway = testbed.gateway(engine.url)
    with _stream(gateway, "a") as sock:
        time.sleep(1)
        timer = _timer(gateway.port, sock.getsockname()[1])
        endless.set()
    return verdict(timer == "02", f"timer {timer or 'none'} of the connection in /proc/net/tcp (02: keepalive)")


def _timer(port: int, client: int) -> str:
    """Return the kernel's timer of the server side of a connection, or ""."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == port and int(fields[2].split(":")[1], 16) == client:
            return fields[5].split(":")[0]
    return ""


@TRIALS.add
def soft_limit_1024(testbed: Testbed) -> Verdict:
    """With a soft limit of 1,024 files, 560 concurrent streams are served: the gateway raises the limit"""
    return _streams(testbed, 1024, 560)


def _streams(testbed: Testbed, limit: int, count: int) -> Verdict:
    engine = testbed.engine()
    endless = EndlessReply(engine)
    gateway = testbed.gateway(engine.url, {"nofile": f"{limit}:"})
    with open_connections(count, lambda n: _stream(gateway, f"s{n}")) as socks:
        statuses = [_status(sock) for sock in socks]
        idle = gateway.get("/healthz", timeout=5).status
        endless.finished.set()
    after = gateway.chat("after", "x", timeout=10).status
    served = statuses.count(200)
    return verdict(
        served == count and idle == after == 200,
        f"{served} of {count} streams, healthz meanwhile {idle}, a turn after {after}",
    )


def _status(sock: socket.socket) -> int:
    sock.settimeout(15)
    try:
        data = sock.recv(16)
        return int(data.split(b" ")[1]) if data.startswith(b"HTTP/1.1 ") else 0
    except (OSError, IndexError, ValueError):
        return 0


@TRIALS.add
def hard_limit_300(testbed: Testbed) -> Verdict:
    """Out of file descriptors, the gateway says so in the log and in a 503, and blames no engine"""
    engine = testbed.engine()
    endless = EndlessReply(engine)
    gateway = testbed.gateway(engine.url, {"nofile": "300:300"})
    socks = [_stream(gateway, f"s{n}") for n in range(200)]
    statuses = [_status(sock) for sock in socks]
    time.sleep(3)
    later = [gateway.get("/admin/sessions", timeout=3).status for _ in range(5)]
    probed = gateway.get("/healthz", timeout=3).status
    endless.finished.set()
    for sock in socks:
        sock.close()
    back = wait_for(lambda: gateway.chat("after", "x", timeout=5).status == 200, 10)
    log = gateway.log.lower()
    served, refused, closed = (statuses.count(status) for status in (200, 503, 0))
    checks = {
        f"in a burst each is served or gets a 503, not {sorted(set(statuses))}": served + refused == 200,
        "a probe is answered while all are busy": probed == 200,
        f"later ones are served or get a 503, not {later}": all(status in (200, 503) for status in later),
        "the log says so": any(word in log for word in ("files may be open", "open files", "emfile", "connections")),
        "a turn works afterwards": back,
    }
    return check_all(checks, f"of 200 {served} served, {refused} refused, {closed} closed, later ones {later}")


@TRIALS.add
def idle_connections(testbed: Testbed) -> Verdict:
    """3,000 idle connections do not keep others out, and take little memory"""
    gateway = testbed.gateway(testbed.engine().url)
    before = gateway.memory()
    with open_connections(3000, lambda _: gateway.connect()):
        served = gateway.chat("a", "x", timeout=5).status
        memory_growth = gateway.memory() - before
    return verdict(
        served == 200 and memory_growth < 64 * 2**20, f"a turn meanwhile {served}, +{memory_growth >> 20} MB"
    )


@TRIALS.add
def connection_resets(testbed: Testbed) -> Verdict:
    """300 streams reset at once leave no turn in flight, no descriptor and no error in the log"""
    engine = testbed.engine()
    endless = EndlessReply(engine)
    gateway = testbed.gateway(engine.url, busy_wait_s=1)
    with _stream(gateway, "warm") as sock:
        _status(sock)
    before = gateway.open_files()
    with open_connections(300, lambda n: _stream(gateway, f"s{n}")) as socks:
        served = [_status(sock) for sock in socks].count(200)
        for sock in socks:
            reset_on_close(sock)
    back = wait_for(lambda: gateway.open_files() <= before + 40, 15)
    free = wait_for(lambda: gateway.delete("/admin/sessions/s7").status == 200, 10)
    endless.finished.set()
    errors = gateway.log.count(" ERROR ")
    return check_all(
        {"descriptors are back": back, "sessions are free": free, "no errors": not errors},
        f"{served} streams, {gateway.open_files() - before:+} descriptors",
    )


@TRIALS.add
def disconnect_at_every_byte(testbed: Testbed) -> Verdict:
    """A client that disconnects after any number of bytes of its request leaves nothing behind"""
    engine = testbed.engine()
    gateway = testbed.gateway(engine.url)
    gateway.chat("warm")
    before = gateway.open_files()
    body = _body(stream=True)
    request = head("POST", CHAT, "x-session-id: leaver", length=len(body)) + body
    for at in range(1, len(request) + 1, 3):
        with gateway.connect() as sock:
            sock.sendall(request[:at])
            if at % 2:
                reset_on_close(sock)
    back = wait_for(lambda: gateway.open_files() <= before + 12, 10)
    return check_all(
        {
            "descriptors are back": back,
            "no errors": " ERROR " not in gateway.log,
            "alive": gateway.chat("x").status == 200,
        },
        f"{len(request) // 3} clients",
    )


@TRIALS.add
def aborted_mcp_calls(testbed: Testbed) -> Verdict:
    """400 aborted MCP calls leak no memory, no descriptor and no error"""
    gateway = testbed.gateway(testbed.engine().url)
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "session_list", "arguments": {}}}
    gateway.post("/mcp", call, _MCP)
    raw = json.dumps(call).encode()
    request = head("POST", "/mcp", "accept: application/json, text/event-stream", length=len(raw)) + raw
    before, fds = gateway.memory(), gateway.open_files()
    for number in range(400):
        with gateway.connect() as sock:
            sock.sendall(request)
            if number % 3:
                reset_on_close(sock)
            if number % 3 == 2:
                time.sleep(0.002)
    back = wait_for(lambda: gateway.open_files() <= fds + 12, 10)
    memory_growth = gateway.memory() - before
    works = gateway.post("/mcp", call, _MCP)
    return check_all(
        {
            "descriptors are back": back,
            f"memory +{memory_growth >> 20} MB": memory_growth < 48 * 2**20,
            "it works": works.status == 200,
            "no errors": " ERROR " not in gateway.log,
        }
    )


@TRIALS.add
def new_sessions(testbed: Testbed) -> Verdict:
    """3,000 new sessions leave little memory behind"""
    gateway = testbed.gateway(testbed.engine().url)
    body = _body()

    def send_turns(first: int) -> int:
        succeeded = 0
        with gateway.connect() as sock:
            for number in range(first, first + 750):
                sock.sendall(head("POST", CHAT, f"x-session-id: n{number}", length=len(body)) + body)
                succeeded += read_reply(sock).status == 200
        return succeeded

    send_turns(0)
    before = gateway.memory()
    began = time.monotonic()
    succeeded: list[int] = run_concurrently(*(lambda n=n: send_turns(1000 * n) for n in range(1, 5)), within=60)  # type: ignore[misc]
    took = time.monotonic() - began
    memory_growth = gateway.memory() - before
    return verdict(
        sum(filter(None, succeeded)) == 3000 and memory_growth < 32 * 2**20,
        f"{sum(filter(None, succeeded))} turns in {took:.0f} s, +{memory_growth >> 20} MB",
    )

"""HTTP itself: endless heads and trailers, malformed framing, and responses of an engine that never end."""

import json
import threading
import time
from collections.abc import Callable

from loadtests.attack_bodies import CHAT
from loadtests.attack_harness import (
    KEY,
    PAUSE_MS,
    Gateway,
    Impact,
    Reply,
    Testbed,
    Trials,
    Verdict,
    check_all,
    head,
    measure,
    send_repeatedly,
    verdict,
)
from tests.support.fakes.engine import DONE, MODEL, Exchange, FakeEngine, delta

TRIALS = Trials()
_BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
_STREAM = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
_SENT_BYTES = 50 * 2**20
_MEMORY_LIMIT = 8 * 2**20


class EndlessReply:
    """Makes an engine stream chat replies until `finished` is set."""

    def __init__(self, engine: FakeEngine) -> None:
        self.finished = threading.Event()
        engine.on_chat = self._answer

    def _answer(self, exchange: Exchange) -> None:
        exchange.begin()
        while not self.finished.wait(0.1):
            exchange.chunk(delta(content="x"))
        exchange.chunk(DONE)
        exchange.end()


def _send_endless_head(gateway: Gateway, begin: Callable[[], object], first: bytes, piece: bytes) -> Impact:
    """Send `first`, then `piece` repeatedly, on a new connection."""

    def send() -> str:
        with gateway.connect(timeout=10) as sock:
            sock.sendall(first)
            begin()
            return f"{send_repeatedly(sock, piece, _SENT_BYTES) >> 10} KB taken"

    return measure(gateway, send, 0, give_up_s=20)


def _within_limits(impact: Impact) -> bool:
    return impact.pause_ms <= PAUSE_MS and impact.memory_growth < _MEMORY_LIMIT


def _warmed_up(gateway: Gateway) -> Gateway:
    for number in range(5):
        gateway.chat(f"warm-{number}", stream=True)
    gateway.longest_pause()
    return gateway


@TRIALS.add
def pipelined_headers(testbed: Testbed) -> Verdict:
    """While a response streams, headers of the next request on its connection are bounded"""
    engine = testbed.engine()
    gateway = _warmed_up(testbed.gateway_in_front_of(engine, api_key=KEY))
    key, passed, figures = f"x-api-key: {KEY}", True, []
    for name, piece in {"lines": b"a:b\r\n" * 4096, "one value": b"x" * 2**16}.items():
        endless = EndlessReply(engine)
        first = head("POST", CHAT, key, length=len(_STREAM)) + _STREAM + head("GET", "/healthz")[:-2] + b"y: "
        impact = _send_endless_head(gateway, lambda: time.sleep(0.5), first, piece)
        endless.finished.set()
        passed, figures = passed and _within_limits(impact), [*figures, f"{name}: {impact}"]
    return verdict(passed and gateway.alive, *figures)


@TRIALS.add
def endless_trailers(testbed: Testbed) -> Verdict:
    """Endless trailers are bounded"""
    gateway = _warmed_up(testbed.gateway_in_front_of(testbed.engine(), api_key=KEY))
    first = head("POST", CHAT, f"x-api-key: {KEY}", "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n"
    impact = _send_endless_head(gateway, lambda: None, first, b"a:b\r\n" * 4096)
    return verdict(_within_limits(impact) and gateway.alive, impact)


@TRIALS.add
def endless_headers(testbed: Testbed) -> Verdict:
    """Endless request heads are bounded: lines, one value, the path, chunk extensions"""
    gateway = _warmed_up(testbed.gateway_in_front_of(testbed.engine()))
    chunked = head("POST", CHAT, "transfer-encoding: chunked")
    ways = {
        "lines": (b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"a:b\r\n" * 4096),
        "one value": (b"GET /healthz HTTP/1.1\r\nhost: x\r\na: ", b"x" * 2**16),
        "one name": (b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"x" * 2**16),
        "path": (b"GET /", b"x" * 2**16),
        "method": (b"", b"G" * 2**16),
        "empty lines": (b"", b"\r\n" * 2**15),
        "chunk extension": (chunked + b"2;", b"x" * 2**16),
        "chunk size": (chunked, b"0" * 2**16),
        "upgrade": (b"GET / HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n", b"a:b\r\n" * 4096),
    }
    impacts = {name: _send_endless_head(gateway, lambda: None, first, piece) for name, (first, piece) in ways.items()}
    failures = {name: impact for name, impact in impacts.items() if not _within_limits(impact)}
    most = max(impacts.values(), key=lambda impact: impact.memory_growth)
    return verdict(
        not failures and gateway.alive, *(f"NOT {name}: {impact}" for name, impact in failures.items()), f"most: {most}"
    )


@TRIALS.add
def large_head_in_one_read(testbed: Testbed) -> Verdict:
    """A head of 70 KB and 6,000 headers that arrives in one read is refused"""
    gateway = testbed.gateway_in_front_of(testbed.engine())
    large = gateway.send_raw(head("GET", "/healthz", *[f"abc: {n:05}" for n in range(6000)], "connection: close"))
    return verdict(large.status in (0, 400, 431), f"answered {large.status}")


@TRIALS.add
def tiny_chunks(testbed: Testbed) -> Verdict:
    """A body of 2 MB in one-byte chunks does not block other requests and costs no extra memory"""
    gateway = _warmed_up(testbed.gateway_in_front_of(testbed.engine()))
    body = b'{"model":"demo","messages":[{"role":"user","content":"' + b"a" * (2 * 2**20) + b'"}]}'
    raw = head("POST", CHAT, "transfer-encoding: chunked", "connection: close")
    raw += b"".join(b"1\r\n%c\r\n" % letter for letter in body) + b"0\r\n\r\n"
    impact = measure(gateway, lambda: gateway.send_raw(raw, 30).status, len(raw), give_up_s=30)
    return verdict(impact.within_limits, impact)


@TRIALS.add
def trailers_are_not_headers(testbed: Testbed) -> Verdict:
    """A trailer never acts as a header: not as a session, not as a key, and not towards the engine"""
    engine = testbed.engine()
    keyed, keyless = testbed.gateway_in_front_of(engine, api_key=KEY), testbed.gateway_in_front_of(engine)
    chunked = b"%x\r\n%b\r\n0\r\n" % (len(_BODY), _BODY)

    def post(gateway: Gateway, trailer: str) -> Reply:
        return gateway.send_raw(
            head("POST", CHAT, "transfer-encoding: chunked", "connection: close")
            + chunked
            + trailer.encode()
            + b"\r\n\r\n"
        )

    session_reply = post(keyless, "x-session-id: from-a-trailer\r\nx-evil: 1")
    key_reply = post(keyed, f"x-api-key: {KEY}")
    at_engine = any(request.header("x-evil") for request in engine.asked)
    return check_all(
        {
            "the session is not the trailer's": session_reply.headers.get("x-session-id") != "from-a-trailer",
            "the key does not count": key_reply.status in (0, 400, 401),
            "the engine does not get it": not at_engine,
        },
        f"{session_reply.status}, {key_reply.status}",
    )


@TRIALS.add
def framing(testbed: Testbed) -> Verdict:
    """Malformed framing never splits a request in two: the engine sees one request or none"""
    engine = testbed.engine()
    gateway = testbed.gateway_in_front_of(engine)
    evil = b"POST /v1/evil HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    valid = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY)
    length = b"content-length: %d\r\n" % len(_BODY)
    malformed = {
        "length and chunked": start + length + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n" + evil,
        "two lengths": start + b"content-length: 0\r\n" + length + b"\r\n" + _BODY,
        "length list": start + b"content-length: 5, 5\r\n\r\n12345" + evil,
        "plus length": start + b"content-length: +%d\r\n\r\n" % len(_BODY) + _BODY,
        "hex length": start + b"content-length: 0x10\r\n\r\n" + evil,
        "negative length": start + b"content-length: -1\r\n\r\n" + evil,
        "huge length": start + b"content-length: 99999999999999999999\r\n\r\n" + evil,
        "space before colon": start + b"content-length : 5\r\n\r\n12345" + evil,
        "folded": start + b"x: a\r\n b\r\n" + length + b"\r\n" + _BODY,
        "bare LF": start.replace(b"\r\n", b"\n") + length.replace(b"\r\n", b"\n") + b"\n" + _BODY,
        "bare CR in a value": start + b"x: a\rPOST /v1/evil HTTP/1.1\r\n" + length + b"\r\n" + _BODY,
        "LF in a value": start + b"x: a\nPOST /v1/evil HTTP/1.1\n" + length + b"\r\n" + _BODY,
        "NUL in a value": start + b"x: a\0b\r\n" + length + b"\r\n" + _BODY,
        "identity": start + b"transfer-encoding: identity\r\n" + length + b"\r\n" + _BODY,
        "chunked twice": start + b"transfer-encoding: chunked, chunked\r\n\r\n" + valid,
        "xchunked": start + b"transfer-encoding: xchunked\r\n\r\n" + valid + evil,
        "gzip, chunked": start + b"transfer-encoding: gzip, chunked\r\n\r\n" + valid,
        "chunked of HTTP/1.0": start.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n" + valid,
        "chunk size -1": start + b"transfer-encoding: chunked\r\n\r\n-1\r\n" + evil,
        "chunk size of 17 digits": start
        + b"transfer-encoding: chunked\r\n\r\n10000000000000002\r\nhi\r\n0\r\n\r\n"
        + evil,
        "chunk without CRLF": start + b"transfer-encoding: chunked\r\n\r\n2\r\nhiXX0\r\n\r\n" + evil,
        "path with a space": b"POST /v1/chat/completions /v1/evil HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n" + _BODY,
        "path with CRLF": b"POST /v1/x%0d%0aevil:%201 HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        "upgrade": start + b"upgrade: h2c\r\nconnection: upgrade\r\n" + length + b"\r\n" + _BODY + evil[:0],
        "CONNECT": b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nhost: x\r\n\r\n" + evil,
    }
    failures = []
    for name, raw in malformed.items():
        engine.requests.clear()
        # The short timeout ends requests for which the gateway waits for more bytes.
        status = gateway.send_raw(raw, timeout=1).status
        requests = engine.asked
        split = any(r.path == "/v1/evil" and b"evil" not in raw.split(b"\r\n")[0] and evil not in raw for r in requests)
        smuggled = any(r.header("evil") or (r.path != "/v1/evil" and b"/v1/evil" in r.body) for r in requests)
        if split or smuggled or status >= 500 or not gateway.alive:
            failures.append(f"NOT {name}: {status}, {[r.target for r in requests]}")
    return verdict(not failures, *failures, f"{len(malformed)} malformed requests")


@TRIALS.add
def http_1_0(testbed: Testbed) -> Verdict:
    """An HTTP/1.0 client gets no chunked encoding"""
    engine = testbed.engine()
    gateway = testbed.gateway_in_front_of(engine)
    raw = head("POST", CHAT, length=len(_STREAM)).replace(b"HTTP/1.1", b"HTTP/1.0") + _STREAM
    with gateway.connect() as sock:
        sock.sendall(raw)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return verdict(b"chunked" not in answer.lower() and b"data: " in answer, answer.partition(b"\r\n")[0].decode())


@TRIALS.add
def endless_engine_replies(testbed: Testbed) -> Verdict:
    """An endless head or event from an engine ends in an error and takes bounded memory"""
    engine = testbed.engine()
    gateway = _warmed_up(testbed.gateway_in_front_of(engine))

    def long_head(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\n")
        for _ in range(2000):
            exchange.raw(b"a: " + b"b" * 16384 + b"\r\n")
        exchange.cut()

    def long_event(exchange: Exchange) -> None:
        exchange.begin()
        for _ in range(1200):
            exchange.chunk(b"x" * 65536)
        exchange.cut()

    passed, figures = True, []
    for name, reply, limit in (("head", long_head, 8 * 2**20), ("event", long_event, 200 * 2**20)):
        engine.on_chat = reply
        impact = measure(gateway, lambda: gateway.chat("a", stream=True).status, 0, give_up_s=20)
        passed, figures = (
            passed and impact.memory_growth < limit and impact.pause_ms < PAUSE_MS,
            [*figures, f"{name}: {impact}"],
        )
    return verdict(passed, *figures)

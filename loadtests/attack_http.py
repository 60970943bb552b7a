"""The HTTP doors: heads without end, trailers, framing, keys, pages of other sites, and what may get to the engine."""

import json
import threading
import time
from collections.abc import Callable

from loadtests.attack_bodies import CHAT
from loadtests.attack_rig import (
    KEY,
    PAUSE_MS,
    Effect,
    Gateway,
    Ground,
    Reply,
    Trials,
    Verdict,
    effect,
    first_false,
    head,
    pour,
    verdict,
)
from tests.support.fakes.engine import DONE, MODEL, Exchange, FakeEngine, delta

TRIALS = Trials()
_BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
_STREAM = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
_POURED = 50 * 2**20
_HEADERS_MAY_TAKE = 8 * 2**20


class Endless:
    """A reply that goes on until the trial is over."""

    def __init__(self, engine: FakeEngine) -> None:
        self.over = threading.Event()
        engine.on_chat = self._answer

    def _answer(self, exchange: Exchange) -> None:
        exchange.begin()
        while not self.over.wait(0.1):
            exchange.chunk(delta(content="x"))
        exchange.chunk(DONE)
        exchange.end()


def _poured(gateway: Gateway, begin: Callable[[], object], first: bytes, piece: bytes) -> Effect:
    """Headers without end on a connection that has begun somehow."""

    def send() -> str:
        with gateway.wire(timeout=10) as sock:
            sock.sendall(first)
            begin()
            return f"{pour(sock, piece, _POURED) >> 10} KB taken"

    return effect(gateway, send, 0, give_up_s=20)


def _bounded(seen: Effect) -> bool:
    return seen.pause_ms <= PAUSE_MS and seen.grown < _HEADERS_MAY_TAKE


def _warm(gateway: Gateway) -> Gateway:
    for number in range(5):
        gateway.chat(f"warm-{number}", stream=True)
    gateway.lap()
    return gateway


@TRIALS.add
def heads_pipelined(ground: Ground) -> Verdict:
    """While a stream is on, the headers of a next request on its connection are bounded"""
    engine = ground.engine()
    gateway = _warm(ground.before(engine, api_key=KEY))
    key, held, figures = f"x-api-key: {KEY}", True, []
    for name, piece in {"lines": b"a:b\r\n" * 4096, "one value": b"x" * 2**16}.items():
        endless = Endless(engine)
        first = head("POST", CHAT, key, length=len(_STREAM)) + _STREAM + head("GET", "/healthz")[:-2] + b"y: "
        seen = _poured(gateway, lambda: time.sleep(0.5), first, piece)
        endless.over.set()
        held, figures = held and _bounded(seen), [*figures, f"{name}: {seen}"]
    return verdict(held and gateway.alive, *figures)


@TRIALS.add
def heads_in_a_trailer(ground: Ground) -> Verdict:
    """Trailers without end are bounded"""
    gateway = _warm(ground.before(ground.engine(), api_key=KEY))
    first = head("POST", CHAT, f"x-api-key: {KEY}", "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n"
    seen = _poured(gateway, lambda: None, first, b"a:b\r\n" * 4096)
    return verdict(_bounded(seen) and gateway.alive, seen)


@TRIALS.add
def heads_before_a_body(ground: Ground) -> Verdict:
    """A head without end, in lines, in one value, in the path, in chunk extensions: bounded"""
    gateway = _warm(ground.before(ground.engine()))
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
    seen = {name: _poured(gateway, lambda: None, first, piece) for name, (first, piece) in ways.items()}
    wrong = {name: one for name, one in seen.items() if not _bounded(one)}
    most = max(seen.values(), key=lambda one: one.grown)
    return verdict(not wrong and gateway.alive, *(f"NOT {name}: {one}" for name, one in wrong.items()), f"most: {most}")


@TRIALS.add
def heads_in_one_read(ground: Ground) -> Verdict:
    """A head of 70 KB and of 10,000 headers that comes in one read is refused"""
    gateway = ground.before(ground.engine())
    large = gateway.raw(head("GET", "/healthz", *[f"abc: {n:05}" for n in range(6000)], "connection: close"))
    return verdict(large.status in (0, 400, 431), f"answered {large.status}")


@TRIALS.add
def tiny_chunks(ground: Ground) -> Verdict:
    """A body of 2 MB in chunks of one byte keeps nobody waiting and takes no memory"""
    gateway = _warm(ground.before(ground.engine()))
    body = b'{"model":"demo","messages":[{"role":"user","content":"' + b"a" * (2 * 2**20) + b'"}]}'
    raw = head("POST", CHAT, "transfer-encoding: chunked", "connection: close")
    raw += b"".join(b"1\r\n%c\r\n" % letter for letter in body) + b"0\r\n\r\n"
    seen = effect(gateway, lambda: gateway.raw(raw, 30).status, len(raw), give_up_s=30)
    return verdict(seen.in_bounds, seen)


@TRIALS.add
def trailers_are_no_headers(ground: Ground) -> Verdict:
    """What comes in a trailer is no header: neither a session, nor a key, nor anything for the engine"""
    engine = ground.engine()
    keyed, open_ = ground.before(engine, api_key=KEY), ground.before(engine)
    chunked = b"%x\r\n%b\r\n0\r\n" % (len(_BODY), _BODY)

    def post(gateway: Gateway, trailer: str) -> Reply:
        return gateway.raw(
            head("POST", CHAT, "transfer-encoding: chunked", "connection: close")
            + chunked
            + trailer.encode()
            + b"\r\n\r\n"
        )

    named = post(open_, "x-session-id: from-a-trailer\r\nx-evil: 1")
    let_in = post(keyed, f"x-api-key: {KEY}")
    at_engine = any(request.header("x-evil") for request in engine.asked)
    return first_false(
        {
            "the session is not the trailer's": named.headers.get("x-session-id") != "from-a-trailer",
            "the key does not count": let_in.status in (0, 400, 401),
            "the engine does not get it": not at_engine,
        },
        f"{named.status}, {let_in.status}",
    )


@TRIALS.add
def framing(ground: Ground) -> Verdict:
    """Odd framing splits no request in two: the engine sees one request of ours or none"""
    engine = ground.engine()
    gateway = ground.before(engine)
    evil = b"POST /v1/evil HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    one = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY)
    length = b"content-length: %d\r\n" % len(_BODY)
    odd = {
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
        "chunked twice": start + b"transfer-encoding: chunked, chunked\r\n\r\n" + one,
        "xchunked": start + b"transfer-encoding: xchunked\r\n\r\n" + one + evil,
        "gzip, chunked": start + b"transfer-encoding: gzip, chunked\r\n\r\n" + one,
        "chunked of HTTP/1.0": start.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n" + one,
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
    wrong = []
    for name, raw in odd.items():
        engine.requests.clear()
        # Ended, so that bytes which stay are not waited for.
        status = gateway.raw(raw, timeout=1).status
        seen = engine.asked
        split = any(r.path == "/v1/evil" and b"evil" not in raw.split(b"\r\n")[0] and evil not in raw for r in seen)
        smuggled = any(r.header("evil") or (r.path != "/v1/evil" and b"/v1/evil" in r.body) for r in seen)
        if split or smuggled or status >= 500 or not gateway.alive:
            wrong.append(f"NOT {name}: {status}, {[r.target for r in seen]}")
    return verdict(not wrong, *wrong, f"{len(odd)} odd requests")


@TRIALS.add
def http_1_0(ground: Ground) -> Verdict:
    """A client of HTTP/1.0 gets no chunks"""
    engine = ground.engine()
    gateway = ground.before(engine)
    raw = head("POST", CHAT, length=len(_STREAM)).replace(b"HTTP/1.1", b"HTTP/1.0") + _STREAM
    with gateway.wire() as sock:
        sock.sendall(raw)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return verdict(b"chunked" not in answer.lower() and b"data: " in answer, answer.partition(b"\r\n")[0].decode())


@TRIALS.add
def replies_that_lie(ground: Ground) -> Verdict:
    """A head, or one event, without end from an engine ends in an error and takes bounded memory"""
    engine = ground.engine()
    gateway = _warm(ground.before(engine))

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

    held, figures = True, []
    for name, lie, most in (("head", long_head, 8 * 2**20), ("event", long_event, 200 * 2**20)):
        engine.on_chat = lie
        seen = effect(gateway, lambda: gateway.chat("a", stream=True).status, 0, give_up_s=20)
        held, figures = held and seen.grown < most and seen.pause_ms < PAUSE_MS, [*figures, f"{name}: {seen}"]
    return verdict(held, *figures)

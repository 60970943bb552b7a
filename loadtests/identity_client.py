"""Sends a trace through a gateway: many conversations at once, each in its own order, and no id in any of them."""

import asyncio
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httptools
import orjson

from loadtests.identity_score import Seen
from loadtests.identity_talk import Request
from loadtests.scripted_upstream import Kind

_PATH = b"/v1/chat/completions"
_WITHIN_S = 30.0
_PATIENCE_S = 0.05  # of a client whose engine stalls


class ReplayError(Exception):
    """The gateway did not answer as it must, whatever session it chose."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What was seen, in the order in which it was sent, and the seconds each turn that completed took."""

    seen: list[Seen]
    took_s: list[float]


async def replay(port: int, requests: Sequence[Request], workers: int = 32) -> Replay:
    """Send each request once all that it comes after is over, those that can be sent in the order of the trace."""
    run = _Run(port, requests, workers)
    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(run.work())
    return Replay([Seen(request, run.sessions[request.number]) for request in run.sent], run.took_s)


class _Run:
    def __init__(self, port: int, requests: Sequence[Request], workers: int) -> None:
        self._port = port
        self._workers = workers
        self._place = {request.number: place for place, request in enumerate(requests)}
        self._requests = requests
        self._missing = {request.number: len(request.after) for request in requests}
        self._followers: dict[int, list[Request]] = {request.number: [] for request in requests}
        for request in requests:
            for before in request.after:
                self._followers[before.number].append(request)
        self._ready: list[int] = []
        self._left = len(requests)
        self._news = asyncio.Semaphore(0)
        self.sent: list[Request] = []
        self.sessions: dict[int, str] = {}
        self.took_s: list[float] = []
        for request in requests:
            if not request.after:
                self._push(request)

    async def work(self) -> None:
        """One worker: whatever is ready, until all is sent."""
        connection = Connection(self._port)
        while True:
            await self._news.acquire()
            if not self._ready:
                break
            request = self._requests[heapq.heappop(self._ready)]
            self.sent.append(request)
            began = time.perf_counter()
            self.sessions[request.number] = await _send(connection, request)
            if request.kind < Kind.FAILS:
                self.took_s.append(time.perf_counter() - began)
            self._over(request)
        connection.close()

    def _push(self, request: Request) -> None:
        heapq.heappush(self._ready, self._place[request.number])
        self._news.release()

    def _over(self, request: Request) -> None:
        self._left -= 1
        for follower in self._followers[request.number]:
            self._missing[follower.number] -= 1
            if not self._missing[follower.number]:
                asyncio.get_running_loop().call_later(follower.pause_s, self._push, follower)
        if not self._left:
            for _ in range(self._workers):  # whoever waits goes home
                self._news.release()


async def _send(connection: "Connection", request: Request) -> str:
    """Post a request as its client does; return the session that the answer names."""
    answer = await connection.post(orjson.dumps(request.body), leaves=request.kind)
    wanted = {Kind.FAILS: 503, Kind.STALLS: 0}.get(request.kind, 200)
    if answer.status != wanted or not (answer.session or request.kind is Kind.STALLS):
        raise ReplayError(f"{request.trace}, {request.step}: status {answer.status}, session {answer.session!r}")
    return answer.session


@dataclass(slots=True)
class Answer:
    """As much of an answer as counts here."""

    status: int = 0
    session: str = ""


class Connection:
    """A connection that is opened when it is needed and kept as long as both sides like it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._wire: _Wire

    async def post(self, body: bytes, leaves: Kind) -> Answer:
        """Post a body. Who `leaves` does so after the first bytes of a cut reply, or when it has waited enough."""
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            self._transport, self._wire = await loop.create_connection(_Wire, "127.0.0.1", self._port)
        answer, begun, done = self._wire.expect()
        self._transport.write(_head(self._port, len(body)) + body)
        if leaves is Kind.STALLS:
            await asyncio.wait([done], timeout=_PATIENCE_S)
        else:
            async with asyncio.timeout(_WITHIN_S):
                await (begun if leaves is Kind.CUT else done)
        if leaves in (Kind.STALLS, Kind.CUT):
            self.close()
        return answer

    def close(self) -> None:
        """Leave."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None


class _Wire(asyncio.Protocol):
    def __init__(self) -> None:
        self.expect()

    def expect(self) -> tuple[Answer, asyncio.Future[None], asyncio.Future[None]]:
        """What the next answer fills in, and what tells that its body has begun, and is over."""
        loop = asyncio.get_running_loop()
        self._answer, self._begun, self._done = Answer(), loop.create_future(), loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        return self._answer, self._begun, self._done

    # The loop's calls.

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_body(b"")
        self.on_message_complete()

    # The parser's calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-session-id":
            self._answer.session = value.decode()

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, _: bytes) -> None:
        if not self._begun.done():
            self._begun.set_result(None)

    def on_message_complete(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


def _head(port: int, length: int) -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (
        _PATH, port, length,
    )  # fmt: skip

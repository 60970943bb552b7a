"""Sends a trace through a gateway: many concurrent conversations, each in its own order and without ids."""

import asyncio
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httptools
import orjson

from loadtests.identity_conversation import Request
from loadtests.identity_score import Observation
from loadtests.scripted_upstream import Kind

_PATH = b"/v1/chat/completions"
_TIMEOUT_S = 30.0
_CLIENT_TIMEOUT_S = 0.05  # of a client whose engine stalls


class ReplayError(Exception):
    """The gateway returned an unexpected status, or no session."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The observations in the order of sending, and the duration of each completed turn in seconds."""

    observations: list[Observation]
    durations_s: list[float]


async def replay(port: int, requests: Sequence[Request], workers: int = 32) -> Replay:
    """Send each request once those it depends on have finished, ready ones in the order of the trace."""
    run = _Run(port, requests, workers)
    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(run.work())
    return Replay([Observation(request, run.sessions[request.number]) for request in run.sent], run.durations_s)


class _Run:
    def __init__(self, port: int, requests: Sequence[Request], workers: int) -> None:
        self._port = port
        self._workers = workers
        self._positions = {request.number: position for position, request in enumerate(requests)}
        self._requests = requests
        self._missing = {request.number: len(request.after) for request in requests}
        self._followers: dict[int, list[Request]] = {request.number: [] for request in requests}
        for request in requests:
            for before in request.after:
                self._followers[before.number].append(request)
        self._ready: list[int] = []
        self._forked_from = len(requests)
        self._ready_count = asyncio.Semaphore(0)
        self.sent: list[Request] = []
        self.sessions: dict[int, str] = {}
        self.durations_s: list[float] = []
        for request in requests:
            if not request.after:
                self._push(request)

    async def work(self) -> None:
        """Send requests that are ready until all are sent."""
        connection = Connection(self._port)
        while True:
            await self._ready_count.acquire()
            if not self._ready:
                break
            request = self._requests[heapq.heappop(self._ready)]
            self.sent.append(request)
            began = time.perf_counter()
            self.sessions[request.number] = await _send(connection, request)
            if request.kind < Kind.FAILS:
                self.durations_s.append(time.perf_counter() - began)
            self._finish(request)
        connection.close()

    def _push(self, request: Request) -> None:
        heapq.heappush(self._ready, self._positions[request.number])
        self._ready_count.release()

    def _finish(self, request: Request) -> None:
        self._forked_from -= 1
        for follower in self._followers[request.number]:
            self._missing[follower.number] -= 1
            if not self._missing[follower.number]:
                asyncio.get_running_loop().call_later(follower.pause_s, self._push, follower)
        if not self._forked_from:
            for _ in range(self._workers):  # let every worker stop
                self._ready_count.release()


async def _send(connection: "Connection", request: Request) -> str:
    """POST a request as its client does; return the session that the response names."""
    response = await connection.post(orjson.dumps(request.body), request.kind)
    expected = {Kind.FAILS: 503, Kind.STALLS: 0}.get(request.kind, 200)
    if response.status != expected or not (response.session or request.kind is Kind.STALLS):
        raise ReplayError(f"{request.trace}, {request.step}: status {response.status}, session {response.session!r}")
    return response.session


@dataclass(slots=True)
class Response:
    """The parts of a response that matter here."""

    status: int = 0
    session: str = ""


class Connection:
    """A connection that is opened on first use and reopened once closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._reader: _ResponseReader

    async def post(self, body: bytes, kind: Kind) -> Response:
        """POST a body; disconnect after the first bytes of a cut reply, or after a timeout if the engine stalls."""
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            self._transport, self._reader = await loop.create_connection(_ResponseReader, "127.0.0.1", self._port)
        response, started, finished = self._reader.next_response()
        self._transport.write(_head(self._port, len(body)) + body)
        if kind is Kind.STALLS:
            await asyncio.wait([finished], timeout=_CLIENT_TIMEOUT_S)
        else:
            async with asyncio.timeout(_TIMEOUT_S):
                await (started if kind is Kind.CUT else finished)
        if kind in (Kind.STALLS, Kind.CUT):
            self.close()
        return response

    def close(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None


class _ResponseReader(asyncio.Protocol):
    def __init__(self) -> None:
        self.next_response()

    def next_response(self) -> tuple[Response, asyncio.Future[None], asyncio.Future[None]]:
        """Return the next response to be filled in, and futures for the start and the end of its body."""
        loop = asyncio.get_running_loop()
        self._response, self._started, self._finished = Response(), loop.create_future(), loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        return self._response, self._started, self._finished

    # Callbacks of the event loop.

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_body(b"")
        self.on_message_complete()

    # Callbacks of the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-session-id":
            self._response.session = value.decode()

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()

    def on_body(self, _: bytes) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def on_message_complete(self) -> None:
        if not self._finished.done():
            self._finished.set_result(None)


def _head(port: int, length: int) -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (
        _PATH, port, length,
    )  # fmt: skip

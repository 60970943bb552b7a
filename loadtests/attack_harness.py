"""What every trial of the attack uses: a registry, a testbed with engines and gateways, and measurements."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import contenders
from loadtests.attack_gateway import Gateway, Reply, head, read_reply
from tests.support.fakes.engine import Exchange, FakeEngine

PAUSE_MS = 250.0  # the longest that one request may keep others waiting
MEMORY_FACTOR = 4  # times the body
MEMORY_FLOOR = 48 * 2**20  # allowed on top: buffers, modules loaded at first use
KEY = "attack-key"
_TRIES = 3
_CLEARLY_MS = 1000.0  # a pause this long is never the effect of another process on the machine


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a trial. `passed` is None if it could not run here."""

    passed: bool | None
    figures: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial: its name, what it requires, and the function that runs it."""

    name: str
    requirement: str
    run: Callable[["Testbed"], Verdict]
    needs_stack: bool


class Trials:
    """The trials of a module, in source order."""

    def __init__(self, *, needs_stack: bool = False) -> None:
        self.all: list[Trial] = []
        self._needs_stack = needs_stack

    def add(self, run: Callable[["Testbed"], Verdict]) -> Callable[["Testbed"], Verdict]:
        """Register a trial, named after its function; the first line of the docstring is its requirement."""
        requirement = (run.__doc__ or "").partition("\n")[0].rstrip(".")
        self.all.append(Trial(run.__name__.replace("_", "-"), requirement, run, self._needs_stack))
        return run


@dataclass(frozen=True, slots=True)
class Impact:
    """What a request did to the gateway: pauses of other requests in ms, and memory growth in bytes."""

    pause_ms: float
    clock_ms: float
    memory_growth: int
    size: int
    answer: str

    @property
    def within_limits(self) -> bool:
        """Whether neither the pause nor the memory growth exceeded its limit."""
        return self.pause_ms <= PAUSE_MS and self.memory_growth <= MEMORY_FACTOR * self.size + MEMORY_FLOOR

    def __str__(self) -> str:
        times = f" ({self.memory_growth / self.size:.1f} x {self.size / 2**20:.1f} MB)" if self.size > 2**20 else ""
        return f"pause {self.pause_ms:.0f} ms, memory +{self.memory_growth / 2**20:.0f} MB{times}, {self.answer}"


def measure(gateway: Gateway, send: Callable[[], object], size: int, give_up_s: float = 8.0) -> Impact:
    """Measure what a request does to the gateway. If it still blocks after `give_up_s`, the gateway is killed."""
    gateway.longest_pause()
    before = gateway.reset_memory_peak()
    answers: list[object] = []

    def do() -> None:
        try:
            answers.append(send())
        except OSError as error:  # the gateway has closed the connection, or is gone
            answers.append(f"{type(error).__name__}")

    sender = threading.Thread(target=do, daemon=True)
    sender.start()
    sender.join(give_up_s)
    time.sleep(0.05)
    pauses, memory_growth = gateway.longest_pause(), gateway.memory(peak=True) - before
    stuck = sender.is_alive() and pauses["pause_ms"] > PAUSE_MS
    if stuck:
        gateway.kill()
    sender.join(10)
    answer = str(answers[0]) if answers else "no answer"
    if not gateway.alive:
        answer += ", given up" if stuck else ", the gateway is dead"
    return Impact(pauses["pause_ms"], pauses["clock_ms"], memory_growth, size, answer)


def least_impact(open_gateway: Callable[[], Gateway], send: Callable[[Gateway], object], size: int) -> Impact:
    """Measure up to three times until one is within limits: noise from the machine passes, a defect stays."""
    impacts: list[Impact] = []
    while len(impacts) < _TRIES and not any(impact.within_limits for impact in impacts):
        gateway = open_gateway()
        impacts.append(measure(gateway, lambda gateway=gateway: send(gateway), size))  # type: ignore[misc]
        if not gateway.alive or impacts[-1].pause_ms > _CLEARLY_MS:
            break
    return min(impacts, key=lambda impact: (not impact.within_limits, impact.pause_ms))


class Engine(FakeEngine):
    """A fake engine that answers invalid requests with a 400, as vLLM does."""

    def _answer(self, exchange: Exchange) -> None:
        try:
            super()._answer(exchange)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError):
            exchange.json({"error": {"message": "nonsense", "code": 400}}, 400)


class Testbed:
    """Where one trial runs: a folder, and engines and gateways that stop when the trial ends."""

    def __init__(self, folder: Path, source: Path, seed: int) -> None:
        self.folder = folder
        self.source = source
        self.seed = seed
        self._stack = ExitStack()
        self._gateways = 0

    def __enter__(self) -> "Testbed":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def engine(self, engine: FakeEngine | None = None) -> FakeEngine:
        """Start an engine whose every answer the trial controls."""
        started = (engine or Engine()).start()
        self._stack.callback(_stop_quietly, started)
        return started

    def canned_engine(self) -> str:
        """Start an engine that accepts large bodies, in a separate process; return its URL."""
        folder = self.folder / f"canned-{self._gateways}"
        folder.mkdir()
        return self._stack.enter_context(contenders.upstream(folder)).url("")

    def gateway(self, engine_url: str, limits: Mapping[str, str] | None = None, **settings: object) -> Gateway:
        """Start a gateway and wait until it is ready."""
        return self.unstarted_gateway(engine_url, limits, **settings).start()

    def gateway_in_front_of(self, engine: FakeEngine, **settings: object) -> Gateway:
        """Start a gateway in front of this engine, and clear the requests that the engine has recorded so far."""
        gateway = self.gateway(engine.url, **settings)
        engine.requests.clear()
        return gateway

    def unstarted_gateway(
        self, engine_url: str, limits: Mapping[str, str] | None = None, **settings: object
    ) -> Gateway:
        """Create a gateway without starting it."""
        self._gateways += 1
        folder = self.folder / f"gateway-{self._gateways}"
        folder.mkdir()
        gateway = Gateway(folder, self.source, engine_url, limits or {}, **settings)
        self._stack.callback(lambda: gateway.close() if hasattr(gateway, "process") else None)
        return gateway

    def enter_context(self, context: Any) -> Any:
        """Enter a context that ends with the trial."""
        return self._stack.enter_context(context)


def verdict(passed: bool, *figures: object) -> Verdict:
    """Return a verdict with its figures in one line."""
    return Verdict(bool(passed), ", ".join(str(each) for each in figures if str(each)))


def check_all(checks: Mapping[str, bool], figures: str = "") -> Verdict:
    """Pass if every check is true; otherwise name those that are not."""
    failed = [name for name, good in checks.items() if not good]
    return verdict(not failed, *(f"NOT {name}" for name in failed), figures or f"{len(checks)} checks")


def wait_for(condition: Callable[[], bool], within: float) -> bool:
    """Poll a condition; return whether it became true within that many seconds."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def run_concurrently(*functions: Callable[[], Any], within: float = 60) -> list[Any]:
    """Call functions concurrently; the result is None for one that has not returned in time."""
    results: list[Any] = [None] * len(functions)

    def do(at: int) -> None:
        results[at] = functions[at]()

    threads = [threading.Thread(target=do, args=(at,), daemon=True) for at in range(len(functions))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + within
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return results


def send_repeatedly(sock: socket.socket, piece: bytes, total: int) -> int:
    """Send a piece repeatedly; return how many bytes were sent before the peer closed or stopped reading."""
    sent = 0
    try:
        while sent < total:
            sock.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@contextmanager
def open_connections(count: int, open_gateway: Callable[[int], socket.socket]) -> Iterator[Sequence[socket.socket]]:
    """Open `count` connections, and close them at the end of the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(open_gateway(number)) for number in range(count)]


def _stop_quietly(engine: FakeEngine) -> None:
    with suppress(OSError, RuntimeError):
        engine.drop_connections()
        engine.stop()


__all__ = ["Gateway", "Reply", "head", "read_reply"]

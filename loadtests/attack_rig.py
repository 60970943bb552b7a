"""What every trial of the attack uses: a registry, a ground with engines and gateways, and figures of what was done."""

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
MEMORY_FLOOR = 48 * 2**20  # what small requests may take besides: buffers, modules loaded at first use
KEY = "attack-key"
_TRIES = 3
_CLEARLY_MS = 1000.0  # not what another process did to us


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial saw. `held` is None where it could not be tried here."""

    held: bool | None
    figures: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial: its name, what has to hold, and how it is tried."""

    name: str
    promise: str
    run: Callable[["Ground"], Verdict]
    needs_stack: bool


class Trials:
    """The trials of a module, in the order in which they are written."""

    def __init__(self, *, needs_stack: bool = False) -> None:
        self.all: list[Trial] = []
        self._needs_stack = needs_stack

    def add(self, run: Callable[["Ground"], Verdict]) -> Callable[["Ground"], Verdict]:
        """Decorate a trial: the function's name is its name, the first line of its docstring its promise."""
        promise = (run.__doc__ or "").partition("\n")[0].rstrip(".")
        self.all.append(Trial(run.__name__.replace("_", "-"), promise, run, self._needs_stack))
        return run


@dataclass(frozen=True, slots=True)
class Effect:
    """What a request did to the gateway."""

    pause_ms: float
    clock_ms: float
    grown: int
    size: int
    answer: str

    @property
    def in_bounds(self) -> bool:
        """Whether it kept nobody waiting and took no more memory than it may."""
        return self.pause_ms <= PAUSE_MS and self.grown <= MEMORY_FACTOR * self.size + MEMORY_FLOOR

    def __str__(self) -> str:
        times = f" ({self.grown / self.size:.1f} x {self.size / 2**20:.1f} MB)" if self.size > 2**20 else ""
        return f"pause {self.pause_ms:.0f} ms, memory +{self.grown / 2**20:.0f} MB{times}, {self.answer}"


def effect(gateway: Gateway, send: Callable[[], object], size: int, give_up_s: float = 8.0) -> Effect:
    """What it does to a gateway to be sent something. After `give_up_s` it is enough: the gateway is killed."""
    gateway.lap()
    before = gateway.forget_peak()
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
    lap, grown = gateway.lap(), gateway.memory(peak=True) - before
    stuck = sender.is_alive() and lap["pause_ms"] > PAUSE_MS
    if stuck:
        gateway.kill()
    sender.join(10)
    said = str(answers[0]) if answers else "no answer"
    if not gateway.alive:
        said += ", given up" if stuck else ", the gateway is dead"
    return Effect(lap["pause_ms"], lap["clock_ms"], grown, size, said)


def least(open_: Callable[[], Gateway], send: Callable[[Gateway], object], size: int) -> Effect:
    """The effect; where it is out of bounds, the least of three: what others do here passes, a fault stays."""
    seen: list[Effect] = []
    while len(seen) < _TRIES and not any(one.in_bounds for one in seen):
        gateway = open_()
        seen.append(effect(gateway, lambda gateway=gateway: send(gateway), size))  # type: ignore[misc]
        if not gateway.alive or seen[-1].pause_ms > _CLEARLY_MS:
            break
    return min(seen, key=lambda one: (not one.in_bounds, one.pause_ms))


class Engine(FakeEngine):
    """One that answers nonsense with a 400, as vLLM does."""

    def _answer(self, exchange: Exchange) -> None:
        try:
            super()._answer(exchange)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError):
            exchange.json({"error": {"message": "nonsense", "code": 400}}, 400)


class Ground:
    """Where a trial is tried: a folder of its own, engines and gateways that end with it."""

    def __init__(self, folder: Path, source: Path, seed: int) -> None:
        self.folder = folder
        self.source = source
        self.seed = seed
        self._open = ExitStack()
        self._gateways = 0

    def __enter__(self) -> "Ground":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def engine(self, engine: FakeEngine | None = None) -> FakeEngine:
        """An engine whose every answer is in the trial's hands."""
        started = (engine or Engine()).start()
        self._open.callback(_stop_quietly, started)
        return started

    def canned(self) -> str:
        """The URL of an engine that takes large bodies, in a process of its own."""
        folder = self.folder / f"canned-{self._gateways}"
        folder.mkdir()
        return self._open.enter_context(contenders.upstream(folder)).url("")

    def gateway(self, engine_url: str, limits: Mapping[str, str] | None = None, **settings: object) -> Gateway:
        """A gateway that is ready."""
        return self.idle(engine_url, limits, **settings).start()

    def before(self, engine: FakeEngine, **settings: object) -> Gateway:
        """A gateway that is ready, before an engine that has seen nothing yet."""
        gateway = self.gateway(engine.url, **settings)
        engine.requests.clear()
        return gateway

    def idle(self, engine_url: str, limits: Mapping[str, str] | None = None, **settings: object) -> Gateway:
        """A gateway that is not started yet."""
        self._gateways += 1
        folder = self.folder / f"gateway-{self._gateways}"
        folder.mkdir()
        gateway = Gateway(folder, self.source, engine_url, limits or {}, **settings)
        self._open.callback(lambda: gateway.close() if hasattr(gateway, "process") else None)
        return gateway

    def enter(self, context: Any) -> Any:
        """Enter a context that ends with the trial."""
        return self._open.enter_context(context)


def verdict(held: bool, *figures: object) -> Verdict:
    """A verdict, its figures in one line."""
    return Verdict(bool(held), ", ".join(str(each) for each in figures if str(each)))


def first_false(checks: Mapping[str, bool], figures: str = "") -> Verdict:
    """Held if every check is true; else which are not."""
    wrong = [name for name, good in checks.items() if not good]
    return verdict(not wrong, *(f"NOT {name}" for name in wrong), figures or f"{len(checks)} checks")


def wait_for(holds: Callable[[], bool], within: float) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + within
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def together(*works: Callable[[], Any], within: float = 60) -> list[Any]:
    """Do things at once; None for what has not come to an end."""
    results: list[Any] = [None] * len(works)

    def do(at: int) -> None:
        results[at] = works[at]()

    threads = [threading.Thread(target=do, args=(at,), daemon=True) for at in range(len(works))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + within
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return results


def pour(sock: socket.socket, piece: bytes, total: int) -> int:
    """Send a piece again and again; return how many bytes went out before the other side closed, or did not read."""
    sent = 0
    try:
        while sent < total:
            sock.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@contextmanager
def many(count: int, open_: Callable[[int], socket.socket]) -> Iterator[Sequence[socket.socket]]:
    """So many connections."""
    with ExitStack() as stack:
        yield [stack.enter_context(open_(number)) for number in range(count)]


def _stop_quietly(engine: FakeEngine) -> None:
    with suppress(OSError, RuntimeError):
        engine.drop_connections()
        engine.stop()


__all__ = ["Gateway", "Reply", "head", "read_reply"]

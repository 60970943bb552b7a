"""What the gateway costs: beside the upstream alone and beside peers, in turns, in one run.

`python -m loadtests.relay_overhead` starts a canned engine and every proxy that is installed on free loopback ports,
drives each with wrk and with a streaming client of our own, and writes a table, the raw samples and a plot. Every round
measures every contender, one right after the other, and only what was measured in the same round is compared: the
machine may be busy, but then it is busy for all of them.
"""

import argparse
import asyncio
import itertools
import re
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson
import uvloop

from loadtests import canned_upstream, contenders, machine, relay_report, streams, wrk
from loadtests.contenders import GATEWAY, PEERS, Contender
from loadtests.relay_samples import HISTORY, JSON, SSE, Crowd, Cuts, Gaps, Loaded, Run

T = TypeVar("T")

_SESSIONS = 64
_HISTORY_SESSIONS = 8  # 64 copies of half a megabyte would be wrk's memory, not a finding
_HISTORY_BYTES = 500_000
_HISTORY_MESSAGES = 100
_SMALL_BYTES = 600
_DRAIN_S = 5.0
_SLOW_S = 6  # litellm ends its first stream of 32 after a second or two; in less time its rate is chance
_GAP_STREAMS = (1, 32)
_GAP_WAVES = {1: 3, 32: 2}  # a wave of paced streams lasts 0.33 s
_STREAM_S = 30.0
_CROWD = 1000
_CROWD_S = 60.0
_MORE_CROWDS = 5
_CROWD_ALL_S = 60.0  # what all crowds together take, about
_STAMP = re.compile(rb"@(\d+)")


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    rounds: int
    seconds: int
    minutes: float
    crowd: int
    out: Path
    only: frozenset[str]
    paths: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to load a server with wrk."""

    name: str
    load: wrk.Load


def main() -> None:
    """Measure, and write what was seen."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to end"))  # so that what was started is stopped
    wrk_version = wrk.version()
    with tempfile.TemporaryDirectory(prefix="relay-overhead-") as directory, ExitStack() as stack:
        work = Path(directory)
        running, missing = _start(stack, work, options)
        run = Run(
            machine={**machine.describe(), "wrk": wrk_version},
            versions={contender.name: contender.version for contender in running},
            missing=missing,
            seconds=options.seconds,
        )
        _measure(run, running, _scenarios(work), options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "relay_overhead.json").write_bytes(orjson.dumps(asdict(run), option=orjson.OPT_INDENT_2) + b"\n")
    text = relay_report.markdown(run)
    (options.out / "relay_overhead.md").write_text(text)
    relay_report.plot(run, options.out / "relay_overhead.svg")
    print(f"\n{text}\nwritten to {options.out}")


def _options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default 5)")
    parser.add_argument("--seconds", type=int, default=2, help="how long wrk drives one contender (default 2)")
    parser.add_argument("--minutes", type=float, default=8, help="no round begins that would end later (default 8)")
    parser.add_argument("--streams", type=int, default=_CROWD, help=f"concurrent streams (default {_CROWD}; 0: none)")
    parser.add_argument("--only", default="", help="names of the contenders to measure, with commas; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="where results go")
    for kind in PEERS:
        parser.add_argument(f"--{kind.name}", metavar="PATH", help=f"executable of {kind.name}; default: looked for")
    given = parser.parse_args()
    paths = {kind.name: getattr(given, kind.name.replace("-", "_")) for kind in PEERS}
    only = frozenset(filter(None, given.only.split(",")))
    return Options(
        max(1, given.rounds), max(1, given.seconds), given.minutes, max(0, given.streams), given.out, only, paths
    )


def _start(stack: ExitStack, work: Path, options: Options) -> tuple[list[Contender], dict[str, str]]:
    engine = stack.enter_context(contenders.upstream(work))
    running, missing = [engine], {}
    if not options.only or GATEWAY in options.only:
        running.append(stack.enter_context(contenders.gateway(work, engine)))
    for kind in PEERS:
        if options.only and kind.name not in options.only:
            continue
        executable = contenders.find(kind, options.paths[kind.name])
        if executable is None:
            missing[kind.name] = f"not installed; {kind.get_it}"
            print(f"{kind.name} is not installed and is left out; to have it: {kind.get_it}")
            continue
        try:
            running.append(stack.enter_context(contenders.peer(kind, executable, work, engine)))
        except contenders.DoesNotStart as error:  # a peer's own trouble is no reason to measure nothing
            missing[kind.name] = "it did not start here"
            print(f"{error}\n{kind.name} is left out")
    return running, missing


def _scenarios(work: Path) -> list[Scenario]:
    plain, streamed, history = work / "plain.json", work / "streamed.json", work / "history.json"
    plain.write_bytes(_small(stream=False))
    streamed.write_bytes(_small(stream=True))
    history.write_bytes(_long())
    return [
        Scenario(f"{JSON}_c1", wrk.Load(plain, 1, _SESSIONS, "json-")),
        Scenario(f"{JSON}_c32", wrk.Load(plain, 32, _SESSIONS, "json-")),
        Scenario(f"{SSE}_c1", wrk.Load(streamed, 1, _SESSIONS, "sse-")),
        Scenario(f"{SSE}_c32", wrk.Load(streamed, 32, _SESSIONS, "sse-")),
        Scenario(f"{HISTORY}_c1", wrk.Load(history, 1, _HISTORY_SESSIONS, "history-")),
    ]


def _small(*, stream: bool) -> bytes:
    messages = [
        {"role": "system", "content": "You are a careful assistant. Answer briefly and name your sources."},
        {"role": "user", "content": "Which of the two log files shows the earlier failure?"},
        {"role": "assistant", "content": "The second: its first error is from 09:12, the other's from 09:40."},
        {"role": "user", "content": ""},
    ]
    body: dict[str, Any] = {"model": "canned", "messages": messages, "temperature": 0.2, "max_tokens": 64}
    if stream:
        body["stream"] = True
    messages[-1]["content"] = "x" * (_SMALL_BYTES - len(orjson.dumps(body)))
    return orjson.dumps(body)


def _long() -> bytes:
    """A history of half a megabyte, about 128 k tokens, in as many messages as a long session of an agent has."""
    text = "The quick brown fox jumps over the lazy dog \u2014 and logs it.\n"
    each = _HISTORY_BYTES // _HISTORY_MESSAGES
    long = text * (each // len(text) + 1)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"{i}: {long}"[: each - 90]}
        for i in range(_HISTORY_MESSAGES - 1)
    ]
    return orjson.dumps({"model": "canned", "messages": messages, "temperature": 0.2, "max_tokens": 64})


def _measure(run: Run, running: Sequence[Contender], scenarios: Sequence[Scenario], options: Options) -> None:
    began, busy, ours = time.monotonic(), machine.busy_s(), _our_cpu_s(running)
    end = began + options.minutes * 60 - (_CROWD_ALL_S if options.crowd else 0)
    _warm_up(run, running, scenarios)
    for number in range(options.rounds):
        at = time.monotonic()
        _round(run, running, scenarios, number, options.seconds)
        run.rounds = number + 1
        took = time.monotonic() - at
        print(f"round {run.rounds} of {options.rounds} took {took:.0f} s", flush=True)
        if run.rounds < options.rounds and time.monotonic() + took > end:
            print(f"no time for another within --minutes {options.minutes:g}")
            break
    if options.crowd:
        # litellm handles some 30 streams a second; a thousand would only tell that again.
        for contender in (c for c in running if c.name != "litellm"):
            run.crowds.append(_in_loop(_crowd(contender, options.crowd)))
    run.took_s = time.monotonic() - began
    cores = int(run.machine["cores"])
    others = machine.busy_s() - busy - (_our_cpu_s(running) - ours)
    run.others_share = max(0.0, others) / (run.took_s * cores)


def _warm_up(run: Run, running: Sequence[Contender], scenarios: Sequence[Scenario]) -> None:
    for contender in running:
        run.cuts.append(_in_loop(_cuts(contender)))
        for scenario in scenarios:
            if scenario.load.connections > 1:
                wrk.run(contender.url(streams.PATH.decode()), scenario.load, 1)


def _round(
    run: Run, running: Sequence[Contender], scenarios: Sequence[Scenario], number: int, seconds: int
) -> None:  # fmt: skip
    for scenario in scenarios:
        for contender in _turned(running, number):
            run.loaded.append(_load(contender, scenario, number, seconds))
    for contender in _turned(running, number):
        run.gaps += [_in_loop(_gaps(contender, number, count)) for count in _GAP_STREAMS]


def _our_cpu_s(running: Sequence[Contender]) -> float:
    return sum(machine.cpu_s(contender.pid) for contender in running) + machine.own_cpu_s()


def _turned(running: Sequence[Contender], number: int) -> Iterator[Contender]:
    """The contenders, each round beginning with another, so that nobody always follows the slowest."""
    at = number % len(running)
    yield from (*running[at:], *running[:at])


def _load(contender: Contender, scenario: Scenario, number: int, seconds: int) -> Loaded:
    before = machine.cpu_s(contender.pid)
    slow = contender.name == "litellm" and scenario.load.connections > 1
    seen = wrk.run(contender.url(streams.PATH.decode()), scenario.load, max(seconds, _SLOW_S) if slow else seconds)
    # Turns that the gateway has yet to record are part of its cost: they are waited for, and counted. A peer only has
    # to be quiet before the next is measured.
    drained = machine.wait_idle(contender.pid, _DRAIN_S)
    late = drained if contender.name == GATEWAY else 0.0
    cpu = machine.cpu_s(contender.pid) - before
    return Loaded(
        scenario=scenario.name,
        contender=contender.name,
        round=number,
        p50_ms=seen.p50_us / 1000,
        p99_ms=seen.p99_us / 1000,
        per_s=seen.requests / (seen.duration_us / 1e6 + late),
        drain_s=drained,
        cpu_us=cpu * 1e6 / max(1, seen.requests),
        requests=seen.requests,
        failed=seen.failed,
    )


def _in_loop(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def _cuts(contender: Contender) -> Cuts:
    """Whether a stream arrives as it was sent: same bytes, same order, same HTTP chunks."""

    async def kept(model: str, expected: list[bytes], *, usage: bool) -> bool:
        body = streams.question(model, usage=usage)
        return (await streams.ask(contender.port, body, f"cuts-{model}", _STREAM_S)).chunks == expected

    return Cuts(
        contender=contender.name,
        plain=await kept("canned", canned_upstream.events("canned", usage=False), usage=False),
        usage=await kept("canned", canned_upstream.events("canned", usage=True), usage=True),
        ragged=await kept("canned-ragged", canned_upstream.ragged("canned-ragged", usage=True), usage=True),
    )


async def _gaps(contender: Contender, number: int, count: int) -> Gaps:
    """How much longer than at the source the pauses between chunks are when they arrive."""
    found: list[float] = []
    failed = 0
    for wave in range(_GAP_WAVES[count]):
        bodies = [streams.question("canned-5ms")] * count
        for stream in await streams.ask_at_once(contender.port, bodies, f"gaps-{wave}-", _STREAM_S):
            failed += bool(stream.error)
            found += _added_ms(stream)
    found.sort()
    return Gaps(contender.name, number, count, found[int(len(found) * 0.99)] if found else 0.0, len(found), failed)


def _added_ms(stream: streams.Stream) -> list[float]:
    stamped = [(int(found[1]), came) for chunk, came in zip(stream.chunks, stream.times, strict=True)
               if (found := _STAMP.search(chunk))]  # fmt: skip
    lags = [came - sent for sent, came in stamped]
    return [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(lags)]


async def _crowd(contender: Contender, count: int) -> Crowd:
    """Many streams at once, and for the gateway again and again: none may fail, and memory may not go on growing."""
    models = ["canned-100ms", *["canned-5ms"] * (_MORE_CROWDS if contender.name == GATEWAY else 0)]
    before = machine.resident_bytes(contender.pid)
    after: list[int] = []
    failed, together, errors = 0, 0, set[str]()
    for wave, model in enumerate(models):
        bodies = [streams.question(model)] * count
        seen = await streams.ask_at_once(contender.port, bodies, f"crowd-{wave}-", _CROWD_S)
        broken = [stream for stream in seen if stream.error or not _complete(stream)]
        failed += len(broken)
        errors |= {stream.error or f"status {stream.status}, {len(stream.chunks)} chunks" for stream in broken}
        together = together or _together(seen)
        await asyncio.to_thread(machine.wait_idle, contender.pid, _DRAIN_S)
        after.append(machine.resident_bytes(contender.pid))
    return Crowd(contender.name, count, together, failed, sorted(errors)[:3], before, after)


def _complete(stream: streams.Stream) -> bool:
    stamps = [int(found[1]) for chunk in stream.chunks if (found := _STAMP.search(chunk))]
    whole = len(stamps) == canned_upstream.EVENTS - 2 and b"[DONE]" in b"".join(stream.chunks[-1:])
    return stream.status == 200 and whole and stamps == sorted(stamps)


def _together(seen: Sequence[streams.Stream]) -> int:
    """How many streams were under way when the first of them ended."""
    first_end = min(stream.ended for stream in seen)
    return sum(bool(stream.times) and stream.times[0] <= first_end for stream in seen)


if __name__ == "__main__":
    main()

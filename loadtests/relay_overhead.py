"""The overhead of the gateway, compared with the upstream alone and with peers, alternating in one run.

`python -m loadtests.relay_overhead` starts a canned engine and every installed proxy on free loopback ports, drives
each with wrk and with a streaming client, and writes a table, the raw samples and a plot. Each round measures all
contenders one right after the other, and only values of the same round are compared, so that other load on the machine
affects them alike.
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
from loadtests.relay_samples import HISTORY, JSON, SSE, Chunking, CrowdSample, GapSample, LoadSample, Run

T = TypeVar("T")

_SESSIONS = 64
_HISTORY_SESSIONS = 8  # 64 copies of half a megabyte would only fill wrk's memory
_HISTORY_BYTES = 500_000
_HISTORY_MESSAGES = 100
_SMALL_BYTES = 600
_DRAIN_S = 5.0
_SLOW_S = 6  # litellm finishes the first of 32 streams after 1-2 s; a shorter run gives no meaningful rate
_GAP_STREAMS = (1, 32)
_GAP_WAVES = {1: 3, 32: 2}  # a wave of paced streams lasts 0.33 s
_STREAM_S = 30.0
_CROWD = 1000
_CROWD_S = 60.0
_MORE_CROWDS = 5
_CROWD_ALL_S = 60.0  # approximate time for all crowds
_TIMESTAMP = re.compile(rb"@(\d+)")


@dataclass(frozen=True, slots=True)
class Options:
    """The command-line options."""

    rounds: int
    seconds: int
    minutes: float
    crowd: int
    out: Path
    only: frozenset[str]
    paths: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load that wrk applies to a server."""

    name: str
    load: wrk.Load


def main() -> None:
    """Measure, and write the report, the samples and the plot."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # so that child processes are stopped
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
    parser.add_argument("--rounds", type=int, default=5, help="number of measuring rounds (default 5)")
    parser.add_argument("--seconds", type=int, default=2, help="duration of one wrk run (default 2)")
    parser.add_argument("--minutes", type=float, default=8, help="start no round that would end later (default 8)")
    parser.add_argument("--streams", type=int, default=_CROWD, help=f"concurrent streams (default {_CROWD}; 0: none)")
    parser.add_argument("--only", default="", help="comma-separated contenders to measure; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="results directory")
    for kind in PEERS:
        parser.add_argument(f"--{kind.name}", metavar="PATH", help=f"executable of {kind.name}; default: search for it")
    args = parser.parse_args()
    paths = {kind.name: getattr(args, kind.name.replace("-", "_")) for kind in PEERS}
    only = frozenset(filter(None, args.only.split(",")))
    return Options(max(1, args.rounds), max(1, args.seconds), args.minutes, max(0, args.streams), args.out, only, paths)


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
            missing[kind.name] = f"not installed; {kind.how_to_install}"
            print(f"{kind.name} is not installed, skipping it; to install: {kind.how_to_install}")
            continue
        try:
            running.append(stack.enter_context(contenders.peer(kind, executable, work, engine)))
        except contenders.StartError as error:  # the others can still be measured
            missing[kind.name] = "did not start"
            print(f"{error}\nskipping {kind.name}")
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
    """Return a request with a history of half a megabyte, about 128 k tokens, like a long session of an agent."""
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
            print(f"no time for another round within --minutes {options.minutes:g}")
            break
    if options.crowd:
        # litellm handles about 30 streams a second; a thousand would show nothing new.
        for contender in (c for c in running if c.name != "litellm"):
            run.crowds.append(_in_loop(_crowd(contender, options.crowd)))
    run.took_s = time.monotonic() - began
    cores = int(run.machine["cores"])
    others = machine.busy_s() - busy - (_our_cpu_s(running) - ours)
    run.others_share = max(0.0, others) / (run.took_s * cores)


def _warm_up(run: Run, running: Sequence[Contender], scenarios: Sequence[Scenario]) -> None:
    for contender in running:
        run.chunking.append(_in_loop(_chunking(contender)))
        for scenario in scenarios:
            if scenario.load.connections > 1:
                wrk.run(contender.url(streams.PATH.decode()), scenario.load, 1)


def _round(
    run: Run, running: Sequence[Contender], scenarios: Sequence[Scenario], number: int, seconds: int
) -> None:  # fmt: skip
    for scenario in scenarios:
        for contender in _rotated(running, number):
            run.loads.append(_load(contender, scenario, number, seconds))
    for contender in _rotated(running, number):
        run.gaps += [_in_loop(_gaps(contender, number, count)) for count in _GAP_STREAMS]


def _our_cpu_s(running: Sequence[Contender]) -> float:
    return sum(machine.cpu_s(contender.pid) for contender in running) + machine.own_cpu_s()


def _rotated(running: Sequence[Contender], number: int) -> Iterator[Contender]:
    """Yield the contenders, each round starting with another one, so that none always follows the slowest."""
    at = number % len(running)
    yield from (*running[at:], *running[:at])


def _load(contender: Contender, scenario: Scenario, number: int, seconds: int) -> LoadSample:
    before = machine.cpu_s(contender.pid)
    slow = contender.name == "litellm" and scenario.load.connections > 1
    result = wrk.run(contender.url(streams.PATH.decode()), scenario.load, max(seconds, _SLOW_S) if slow else seconds)
    # Turns that the gateway has yet to record are part of its cost: wait for them and count that time. A peer only
    # has to be idle before the next measurement.
    drained = machine.wait_idle(contender.pid, _DRAIN_S)
    recording_s = drained if contender.name == GATEWAY else 0.0
    cpu = machine.cpu_s(contender.pid) - before
    return LoadSample(
        scenario=scenario.name,
        contender=contender.name,
        round=number,
        p50_ms=result.p50_us / 1000,
        p99_ms=result.p99_us / 1000,
        per_s=result.requests / (result.duration_us / 1e6 + recording_s),
        drain_s=drained,
        cpu_us=cpu * 1e6 / max(1, result.requests),
        requests=result.requests,
        failed=result.failed,
    )


def _in_loop(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def _chunking(contender: Contender) -> Chunking:
    """Check whether a stream arrives as it was sent: same bytes, same order, same HTTP chunks."""

    async def unchanged(model: str, expected: list[bytes], *, usage: bool) -> bool:
        body = streams.question(model, usage=usage)
        return (await streams.request(contender.port, body, f"cuts-{model}", _STREAM_S)).chunks == expected

    return Chunking(
        contender=contender.name,
        plain=await unchanged("canned", canned_upstream.events("canned", usage=False), usage=False),
        usage=await unchanged("canned", canned_upstream.events("canned", usage=True), usage=True),
        ragged=await unchanged("canned-ragged", canned_upstream.ragged("canned-ragged", usage=True), usage=True),
    )


async def _gaps(contender: Contender, number: int, count: int) -> GapSample:
    """Measure how much longer the gaps between chunks are on arrival than at the source."""
    gaps: list[float] = []
    failed = 0
    for wave in range(_GAP_WAVES[count]):
        bodies = [streams.question("canned-5ms")] * count
        for stream in await streams.request_concurrently(contender.port, bodies, f"gaps-{wave}-", _STREAM_S):
            failed += bool(stream.error)
            gaps += _added_ms(stream)
    gaps.sort()
    return GapSample(contender.name, number, count, gaps[int(len(gaps) * 0.99)] if gaps else 0.0, len(gaps), failed)


def _added_ms(stream: streams.Stream) -> list[float]:
    timestamps = [(int(match[1]), received) for chunk, received in zip(stream.chunks, stream.times, strict=True)
               if (match := _TIMESTAMP.search(chunk))]  # fmt: skip
    lags = [received - sent for sent, received in timestamps]
    return [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(lags)]


async def _crowd(contender: Contender, count: int) -> CrowdSample:
    """Open many concurrent streams, for the gateway repeatedly: none may fail, and memory must stop growing."""
    models = ["canned-100ms", *["canned-5ms"] * (_MORE_CROWDS if contender.name == GATEWAY else 0)]
    before = machine.resident_bytes(contender.pid)
    after: list[int] = []
    failed, concurrent, errors = 0, 0, set[str]()
    for wave, model in enumerate(models):
        bodies = [streams.question(model)] * count
        replies = await streams.request_concurrently(contender.port, bodies, f"crowd-{wave}-", _CROWD_S)
        broken = [stream for stream in replies if stream.error or not _complete(stream)]
        failed += len(broken)
        errors |= {stream.error or f"status {stream.status}, {len(stream.chunks)} chunks" for stream in broken}
        concurrent = concurrent or _concurrent(replies)
        await asyncio.to_thread(machine.wait_idle, contender.pid, _DRAIN_S)
        after.append(machine.resident_bytes(contender.pid))
    return CrowdSample(contender.name, count, concurrent, failed, sorted(errors)[:3], before, after)


def _complete(stream: streams.Stream) -> bool:
    stamps = [int(match[1]) for chunk in stream.chunks if (match := _TIMESTAMP.search(chunk))]
    complete = len(stamps) == canned_upstream.EVENTS - 2 and b"[DONE]" in b"".join(stream.chunks[-1:])
    return stream.status == 200 and complete and stamps == sorted(stamps)


def _concurrent(replies: Sequence[streams.Stream]) -> int:
    """Return how many streams were in progress when the first of them ended."""
    first_end = min(stream.ended for stream in replies)
    return sum(bool(stream.times) and stream.times[0] <= first_end for stream in replies)


if __name__ == "__main__":
    main()

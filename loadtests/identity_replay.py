"""How well the gateway recognises conversations without ids.

`python -m loadtests.identity_replay` starts an engine whose replies are known beforehand and a gateway in front of it,
sends traces of agents and people with many concurrent conversations (`loadtests.identity_traces`) through
`/v1/chat/completions`, and compares the session that each response names with the true conversation
(`loadtests.identity_score`).
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import orjson
import uvloop

from loadtests import contenders, identity_cache, identity_report, identity_score, identity_traces, machine
from loadtests.identity_cache import CacheHits
from loadtests.identity_score import Verdict
from loadtests.identity_sender import Replay, replay

_DRAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a run.

    `cached`: prefix cache hits by kind of conversation; `kinds`: number of sessions by `recognised_by`.
    """

    machine: dict[str, str]
    version: str
    seed: int
    verdicts: list[Verdict]
    unseen: int
    cached: dict[str, CacheHits]
    kinds: dict[str, int]
    durations_ms: list[float]
    duration_s: float
    workers: int


def main() -> None:
    """Replay the traces, and write the report and the verdicts."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # so that child processes are stopped
    requests = identity_traces.generate(options.seed, options.turns)
    with tempfile.TemporaryDirectory(prefix="identity-replay-") as directory:
        work = Path(directory)
        with (
            contenders.upstream(work, "loadtests.scripted_upstream") as engine,
            contenders.gateway(work, engine) as ours,
        ):
            began = time.monotonic()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                replayed = runner.run(replay(ours.port, requests, options.workers))
            duration = time.monotonic() - began
            machine.wait_idle(ours.pid, _DRAIN_S)
            run = _run(replayed, fetch_sessions(ours.port, replayed), options, ours.version, duration)
    options.out.mkdir(parents=True, exist_ok=True)
    text = identity_report.markdown(run)
    (options.out / "identity_replay.md").write_text(text)
    (options.out / "identity_replay.json").write_bytes(orjson.dumps(_raw(run), option=orjson.OPT_INDENT_2) + b"\n")
    print(f"{text}\nwritten to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20_000, help="number of requests (default 20,000)")
    parser.add_argument("--workers", type=int, default=32, help="concurrent requests (default 32)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the traces (default 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="results directory")
    return parser.parse_args()


def fetch_sessions(port: int, replayed: Replay) -> dict[str, dict[str, Any]]:
    """Fetch each session that a response named from the gateway's admin API."""
    names = sorted({observed.session for observed in replayed.observations if observed.session})
    chunks = [names[i::4] for i in range(4)]
    with ThreadPoolExecutor(len(chunks)) as pool:
        results = pool.map(lambda chunk: _fetch(port, chunk), chunks)
        return {name: session for result in results for name, session in result.items()}


def _fetch(port: int, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    sessions = {}
    for name in names:
        connection.request("GET", f"/admin/sessions/{name}")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"session {name}: status {answer.status}: {body[:300]!r}")
        sessions[name] = orjson.loads(body)
    connection.close()
    return sessions


def _run(
    replayed: Replay, sessions: dict[str, dict[str, Any]], options: argparse.Namespace, version: str, duration_s: float
) -> Run:
    lineages = {name: str(session["lineage"]) for name, session in sessions.items()}
    return Run(
        machine=machine.describe(),
        version=version,
        seed=options.seed,
        verdicts=identity_score.judge(replayed.observations, lineages),
        cached=identity_cache.by_trace(replayed.observations, lineages),
        unseen=sum(not observed.session for observed in replayed.observations),
        kinds=dict(Counter(str(session.get("recognised_by")) for session in sessions.values())),
        durations_ms=sorted(1000 * duration for duration in replayed.durations_s),
        duration_s=duration_s,
        workers=options.workers,
    )


def _raw(run: Run) -> dict[str, Any]:
    verdicts = [
        {
            "number": v.request.number, "conversation": v.request.conversation, "trace": v.request.trace,
            "step": v.request.step, "client": v.request.client, "session": v.session, "joined": v.joined,
            "correct": v.correct, "continues": v.continues, "matched": v.matched, "fault": v.fault,
        }
        for v in run.verdicts
    ]  # fmt: skip
    cached = {trace: asdict(hits) for trace, hits in run.cached.items()}
    facts = {"machine": run.machine, "version": run.version, "seed": run.seed, "kinds": run.kinds}
    return {**facts, "cached": cached, "verdicts": verdicts}


if __name__ == "__main__":
    main()

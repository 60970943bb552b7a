"""How well the gateway recognises conversations that bring no id.

`python -m loadtests.identity_replay` starts an engine whose replies are known beforehand and the gateway before it,
sends it traces of agents and people with many conversations at once (`loadtests.identity_traces`) through
`/v1/chat/completions`, and compares the session that each answer names with the true conversation
(`loadtests.identity_score`).
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import orjson
import uvloop

from loadtests import contenders, identity_cache, identity_report, identity_score, identity_traces, machine
from loadtests.identity_cache import Found
from loadtests.identity_client import Replay, replay
from loadtests.identity_score import Verdict

_DRAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """What a report is made of.

    `cached`: what a prefix cache would have found, by kind of conversation; `kinds`: how the gateway says that it
    recognised its sessions.
    """

    machine: dict[str, str]
    version: str
    seed: int
    verdicts: list[Verdict]
    unseen: int
    cached: dict[str, Found]
    kinds: dict[str, int]
    took_ms: list[float]
    duration_s: float
    workers: int


def main() -> None:
    """Measure, and write what was seen."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to end"))  # so that what was started is stopped
    requests = identity_traces.generate(options.seed, options.turns)
    with tempfile.TemporaryDirectory(prefix="identity-replay-") as directory:
        work = Path(directory)
        with (
            contenders.upstream(work, "loadtests.scripted_upstream") as engine,
            contenders.gateway(work, engine) as ours,
        ):
            began = time.monotonic()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                seen = runner.run(replay(ours.port, requests, options.workers))
            duration = time.monotonic() - began
            machine.wait_idle(ours.pid, _DRAIN_S)
            run = _run(seen, sessions(ours.port, seen), options, ours.version, duration)
    options.out.mkdir(parents=True, exist_ok=True)
    text = identity_report.markdown(run)
    (options.out / "identity_replay.md").write_text(text)
    (options.out / "identity_replay.json").write_bytes(orjson.dumps(_raw(run), option=orjson.OPT_INDENT_2) + b"\n")
    print(f"{text}\nwritten to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20_000, help="how many requests (default 20,000)")
    parser.add_argument("--workers", type=int, default=32, help="how many at the same time (default 32)")
    parser.add_argument("--seed", type=int, default=1, help="of the traces (default 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="where results go")
    return parser.parse_args()


def sessions(port: int, seen: Replay) -> dict[str, dict[str, Any]]:
    """What the gateway's admin door says about each session that an answer named."""
    names = sorted({one.session for one in seen.seen if one.session})
    parts = [names[i::4] for i in range(4)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return {
            name: shown for part in pool.map(lambda some: _shown(port, some), parts) for name, shown in part.items()
        }


def _shown(port: int, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    found = {}
    for name in names:
        connection.request("GET", f"/admin/sessions/{name}")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"session {name}: status {answer.status}: {body[:300]!r}")
        found[name] = orjson.loads(body)
    connection.close()
    return found


def _run(seen: Replay, shown: dict[str, dict[str, Any]], options: argparse.Namespace, version: str, took: float) -> Run:
    kinds: dict[str, int] = {}
    for session in shown.values():
        how = str(session.get("recognised_by"))
        kinds[how] = kinds.get(how, 0) + 1
    lineages = {name: str(session["lineage"]) for name, session in shown.items()}
    return Run(
        machine=machine.describe(),
        version=version,
        seed=options.seed,
        verdicts=identity_score.judge(seen.seen, lineages),
        cached=identity_cache.by_trace(seen.seen, lineages),
        unseen=sum(not one.session for one in seen.seen),
        kinds=kinds,
        took_ms=sorted(1000 * took for took in seen.took_s),
        duration_s=took,
        workers=options.workers,
    )


def _raw(run: Run) -> dict[str, Any]:
    verdicts = [
        {
            "number": v.request.number, "conversation": v.request.conversation, "trace": v.request.trace,
            "step": v.request.step, "client": v.request.client, "session": v.session, "joined": v.joined,
            "right": v.right, "goes_on": v.goes_on, "hit": v.hit, "wrong": v.wrong,
        }
        for v in run.verdicts
    ]  # fmt: skip
    cached = {trace: asdict(found) for trace, found in run.cached.items()}
    about = {"machine": run.machine, "version": run.version, "seed": run.seed, "kinds": run.kinds}
    return {**about, "cached": cached, "verdicts": verdicts}


if __name__ == "__main__":
    main()

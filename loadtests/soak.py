"""Mixed traffic for an hour, and what is left of it afterwards.

`python -m loadtests.soak --stack` soaks the gateway before vLLM and LMCache with the demo model, `--canned` before an
engine that costs nothing and so takes many more requests. Samples are taken every minute; at the end every session and
window is deleted through the admin door, and what then is left must be what was there at the start. The report goes to
loadtests/results/soak_stack.md or soak_canned.md. Exits with 1 when a check has failed.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import httpx

from gateway.stack import local
from loadtests import contenders, machine, soak_report
from loadtests.soak_traffic import MESSAGES, RESPONSES, Pace, Traffic
from loadtests.soak_watch import Sample, Watch, Watched

_DATED = re.compile(r"\d{4}-\d\d-\d\d ")
_READY_S, _DRAIN_S, _STOP_S = 120.0, 60.0, 30.0
_LOOKS = 4
_SWEPT_LOOKS, _LOOK_S = 36, 5.0  # two sweeps (sweep_every_s), and what the second takes
_IDLE_S = 8.0  # vLLM closes an idle connection after 5
_PACES = {
    "stack": Pace(per_s=2, at_once=4, words=60, tokens=12),
    "canned": Pace(per_s=60, at_once=16, words=60, tokens=12),
}


def main() -> int:
    """Soak, write the report and return an exit code."""
    options = _options()
    kind = "canned" if options.canned else "stack"
    with tempfile.TemporaryDirectory(prefix="cwg-soak-") as folder:
        work = Path(folder)
        opened = canned(work) if options.canned else stack(work, options.redis)
        with opened as watched:
            run = asyncio.run(_soak(kind, watched, options))
        run.log = complaints(work / "gateway.log")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"soak_{kind}.json").write_text(json.dumps(asdict(run)) + "\n")
    (options.out / f"soak_{kind}.md").write_text(text := soak_report.markdown(run))
    soak_report.plot(run, options.out / f"soak_{kind}.svg")
    print(text)
    return int(not all(check.held for check in soak_report.checks(run)))


async def _soak(kind: str, watched: Watched, options: argparse.Namespace) -> soak_report.Run:
    url = f"http://127.0.0.1:{watched.port}"
    model = "canned" if kind == "canned" else "demo"
    pace = _PACES[kind]
    watch = Watch(watched)
    await asyncio.sleep(_IDLE_S)  # what looks at the engine now and then has looked once
    samples = [await asyncio.to_thread(watch.sample, note="start")]
    traffic = Traffic(url, model, pace, await _dialects(url, model), strict=kind == "stack")
    began = time.monotonic()
    going = asyncio.create_task(traffic.run(options.minutes * 60))
    every = min(60.0, options.minutes * 60 / 20)
    while not going.done():
        await asyncio.wait([going], timeout=every)
        samples.append(await _sample(watch, traffic, "" if not going.done() else "traffic over"))
        _say(samples[-1])
    await going
    await traffic.close()
    took = time.monotonic() - began
    async with httpx.AsyncClient(base_url=url, timeout=_DRAIN_S) as http:
        await _delete_all(http, "/admin/windows", "windows", "name")
        await _delete_all(http, "/admin/sessions", "sessions", "id")
    await asyncio.sleep(_IDLE_S)
    await _swept(watch, traffic)
    samples.append(await _at_rest(watch, traffic))
    _say(samples[-1])
    return soak_report.Run(
        kind=kind,
        machine=machine.describe(),
        minutes=options.minutes,
        took_s=round(took, 1),
        per_s=pace.per_s,
        at_once=pace.at_once,
        done=dict(traffic.done),
        answers=[(route, status, count) for (route, status), count in traffic.answers.items()],
        failed=traffic.failed,
        failures=traffic.failures,
        samples=samples,
    )


async def _sample(watch: Watch, traffic: Traffic, note: str) -> Sample:
    return await asyncio.to_thread(watch.sample, traffic.requests, traffic.failed, note)


async def _swept(watch: Watch, traffic: Traffic) -> None:
    """Wait for the sweep to settle the salts of what was deleted: LMCache may write a while after the last reply."""
    for _ in range(_SWEPT_LOOKS):
        if not (await _sample(watch, traffic, "")).rows.get("loose_salts"):
            return
        await asyncio.sleep(_LOOK_S)


async def _at_rest(watch: Watch, traffic: Traffic) -> Sample:
    """The last sample. A task counts that is there each time: the engine is looked at now and then."""
    seen = []
    for _ in range(_LOOKS):
        seen.append(await _sample(watch, traffic, "all deleted"))
        await asyncio.sleep(0.5)
    lasting = {name: min(sample.tasks.get(name, 0) for sample in seen) for name in seen[-1].tasks}
    return replace(seen[-1], tasks={name: count for name, count in lasting.items() if count})


async def _dialects(url: str, model: str) -> Collection[str]:
    """Which of the other APIs there are behind the gateway."""
    bodies = {RESPONSES: {"input": "x", "max_output_tokens": 1}, MESSAGES: {"messages": [_HELLO], "max_tokens": 1}}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        answers = {path: await http.post(path, json={"model": model, **body}) for path, body in bodies.items()}
    return [path for path, answer in answers.items() if answer.status_code == 200]


_HELLO = {"role": "user", "content": "x"}


async def _delete_all(http: httpx.AsyncClient, path: str, key: str, name: str) -> None:
    """Delete page after page. A session whose turn is just over may be busy for a moment."""
    end = time.monotonic() + _DRAIN_S
    while found := (await http.get(path, params={"limit": 100})).raise_for_status().json()[key]:
        for each in found:
            answer = await http.delete(f"{path}/{each[name]}")
            if answer.status_code not in (200, 404, 409):
                raise RuntimeError(f"{path}/{each[name]} was not deleted: {answer.status_code} {answer.text}")
        if time.monotonic() > end + len(found):
            raise RuntimeError(f"{len(found)} {key} could not be deleted within {_DRAIN_S:g} s")


@contextmanager
def canned(work: Path) -> Iterator[Watched]:
    """A gateway before an engine that costs nothing."""
    with contenders.upstream(work) as engine:
        settings = {"CWG_ENGINE_URLS": engine.url(""), "CWG_DATA_DIR": str(work / "data")}
        with _gateway(work, settings) as (pid, port, eye):
            yield Watched(pid, eye, port, engine.port, work / "data" / "gateway.db", None, "")


@contextmanager
def stack(work: Path, redis_url: str) -> Iterator[Watched]:
    """A gateway before vLLM and LMCache."""
    options = local.LocalStack(data_dir=work / "stack", max_model_len=8192, redis_url=redis_url or None)
    with local.running(options) as (plan, _):
        settings = {
            "CWG_ENGINE_URLS": plan.engine_url,
            "CWG_CACHE_URL": plan.cache_url,
            "CWG_KV_DIR": str(plan.kv_dir),
            "CWG_KV_REDIS_URL": redis_url,
            "CWG_MODEL_FINGERPRINT": plan.model.fingerprint,
            "CWG_DATA_DIR": str(work / "data"),
        }
        with _gateway(work, settings) as (pid, port, eye):
            yield Watched(pid, eye, port, plan.engine_port, work / "data" / "gateway.db", plan.kv_dir, redis_url)


@contextmanager
def _gateway(work: Path, settings: Mapping[str, str]) -> Iterator[tuple[int, int, int]]:
    port, eye = contenders.free_port(), contenders.free_port()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CWG_")}
    argv = [sys.executable, "-m", "loadtests.watched", str(eye), "serve"]
    with (work / "gateway.log").open("wb") as log:
        process = subprocess.Popen(argv, env={**inherited, **settings, "CWG_PORT": str(port)}, stdout=log, stderr=log)
    try:
        _wait_ready(process, f"http://127.0.0.1:{port}/readyz", work / "gateway.log")
        yield process.pid, port, eye
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise RuntimeError(f"the gateway is not ready:\n{log.read_text(errors='replace')[-2000:]}")


def complaints(log: Path) -> list[str]:
    """The errors that the gateway wrote, each with its traceback."""
    lines = log.read_text(errors="replace").splitlines()
    starts = [at for at, line in enumerate(lines) if _DATED.match(line)]
    entries = ["\n".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]
    return [entry[:2000] for entry in entries if " ERROR " in entry or " CRITICAL " in entry]


def _say(sample: Sample) -> None:
    print(
        f"{sample.at_s:.0f} s: {sample.requests} requests, {sample.failures} failed, {sample.rss / 2**20:.1f} MB, "
        f"{sample.own_fds} fds, {sample.upstream} upstream, {sum(sample.tasks.values())} tasks, "
        f"{sum(sample.rows.values())} rows {sample.note}",
        file=sys.stderr,
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--stack", action="store_true", help="before vLLM and LMCache")
    which.add_argument("--canned", action="store_true", help="before an engine that costs nothing")
    parser.add_argument("--redis", default="", help="with --stack: a Redis for LMCache's second tier, in use by nobody")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

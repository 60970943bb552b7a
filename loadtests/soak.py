"""Mixed traffic for an hour, and a check for leaks afterwards.

`python -m loadtests.soak --stack` soaks the gateway in front of vLLM and LMCache with the demo model, `--canned` in
front of an engine that costs nothing and so takes many more requests. Samples are taken every minute; at the end every
session and window is deleted through the admin API, after which the gateway must hold what it held at the start. The
report goes to loadtests/results/soak_stack.md or soak_canned.md. Exits with 1 if a check fails.
"""

import argparse
import asyncio
import itertools
import json
import re
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
from loadtests.soak_sampler import GatewayUnderTest, Sample, Sampler
from loadtests.soak_traffic import MESSAGES, RESPONSES, Pace, Traffic
from tests.support import local_stack

_DATED = re.compile(r"\d{4}-\d\d-\d\d ")
_DRAIN_S = 60.0
_FINAL_SAMPLES = 4
_SWEEP_SAMPLES, _SAMPLE_EVERY_S = 36, 5.0  # two sweeps (sweep_every_s), and the time that the second takes
_IDLE_S = 8.0  # vLLM closes an idle connection after 5
_PACES = {
    "stack": Pace(per_s=2, concurrency=4, words=60, tokens=12),
    "canned": Pace(per_s=60, concurrency=16, words=60, tokens=12),
}


def main() -> int:
    """Run the soak test, write the report and return an exit code."""
    options = _options()
    kind = "canned" if options.canned else "stack"
    with tempfile.TemporaryDirectory(prefix="cwg-soak-") as folder:
        work = Path(folder)
        opened = canned(work) if options.canned else stack(work, options.redis)
        with opened as gateway:
            run = asyncio.run(_soak(kind, gateway, options))
        run.log = logged_errors(work / "gateway.log")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"soak_{kind}.json").write_text(json.dumps(asdict(run)) + "\n")
    (options.out / f"soak_{kind}.md").write_text(text := soak_report.markdown(run))
    soak_report.plot(run, options.out / f"soak_{kind}.svg")
    print(text)
    return int(not all(check.passed for check in soak_report.checks(run)))


async def _soak(kind: str, gateway: GatewayUnderTest, options: argparse.Namespace) -> soak_report.Run:
    url = f"http://127.0.0.1:{gateway.port}"
    model = "canned" if kind == "canned" else "demo"
    pace = _PACES[kind]
    sampler = Sampler(gateway)
    await asyncio.sleep(_IDLE_S)  # until the first health check of the engine is over
    samples = [await asyncio.to_thread(sampler.sample, note="start")]
    traffic = Traffic(url, model, pace, await _dialects(url, model), strict=kind == "stack")
    began = time.monotonic()
    traffic_task = asyncio.create_task(traffic.run(options.minutes * 60))
    every = min(60.0, options.minutes * 60 / 20)
    while not traffic_task.done():
        await asyncio.wait([traffic_task], timeout=every)
        samples.append(await _sample(sampler, traffic, "" if not traffic_task.done() else "end of traffic"))
        _print(samples[-1])
    await traffic_task
    await traffic.close()
    took = time.monotonic() - began
    async with httpx.AsyncClient(base_url=url, timeout=_DRAIN_S) as http:
        await _delete_all(http, "/admin/windows", "windows", "name")
        await _delete_all(http, "/admin/sessions", "sessions", "id")
    await asyncio.sleep(_IDLE_S)
    await _wait_for_sweep(sampler, traffic)
    samples.append(await _final_sample(sampler, traffic))
    _print(samples[-1])
    return soak_report.Run(
        kind=kind,
        machine=machine.describe(),
        minutes=options.minutes,
        took_s=round(took, 1),
        per_s=pace.per_s,
        concurrency=pace.concurrency,
        actions=dict(traffic.actions),
        answers=[(route, status, count) for (route, status), count in traffic.answers.items()],
        failed=traffic.failed,
        failures=traffic.failures,
        samples=samples,
    )


async def _sample(sampler: Sampler, traffic: Traffic, note: str) -> Sample:
    return await asyncio.to_thread(sampler.sample, traffic.requests, traffic.failed, note)


async def _wait_for_sweep(sampler: Sampler, traffic: Traffic) -> None:
    """Wait until sweeps have cleared the orphaned salts: LMCache may still write for a while after the last reply."""
    for _ in range(_SWEEP_SAMPLES):
        if not (await _sample(sampler, traffic, "")).rows.get("orphaned_salts"):
            return
        await asyncio.sleep(_SAMPLE_EVERY_S)


async def _final_sample(sampler: Sampler, traffic: Traffic) -> Sample:
    """Take the last sample. Only tasks present in each of several samples count, as health checks come and go."""
    samples = []
    for _ in range(_FINAL_SAMPLES):
        samples.append(await _sample(sampler, traffic, "all deleted"))
        await asyncio.sleep(0.5)
    lasting = {name: min(sample.tasks.get(name, 0) for sample in samples) for name in samples[-1].tasks}
    return replace(samples[-1], tasks={name: count for name, count in lasting.items() if count})


async def _dialects(url: str, model: str) -> Collection[str]:
    """Return the paths of the other APIs that the engine supports."""
    bodies = {RESPONSES: {"input": "x", "max_output_tokens": 1}, MESSAGES: {"messages": [_HELLO], "max_tokens": 1}}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        answers = {path: await http.post(path, json={"model": model, **body}) for path, body in bodies.items()}
        for answer in answers.values():  # lists leave out a session all of whose turns failed
            await http.delete(f"/admin/sessions/{answer.headers['x-session-id']}")
    return [path for path, answer in answers.items() if answer.status_code == 200]


_HELLO = {"role": "user", "content": "x"}


async def _delete_all(http: httpx.AsyncClient, path: str, key: str, name: str) -> None:
    """Delete page after page. A session whose turn has just ended may be busy for a moment."""
    end = time.monotonic() + _DRAIN_S
    while page := (await http.get(path, params={"limit": 100})).raise_for_status().json()[key]:
        for item in page:
            answer = await http.delete(f"{path}/{item[name]}")
            if answer.status_code not in (200, 404, 409):
                raise RuntimeError(f"{path}/{item[name]} was not deleted: {answer.status_code} {answer.text}")
        if time.monotonic() > end + len(page):
            raise RuntimeError(f"{len(page)} {key} could not be deleted within {_DRAIN_S:g} s")


@contextmanager
def canned(work: Path) -> Iterator[GatewayUnderTest]:
    """Run a gateway in front of an engine that costs nothing."""
    with contenders.upstream(work) as engine:
        settings = {"CWG_ENGINE_URLS": engine.url(""), "CWG_DATA_DIR": str(work / "data")}
        with _gateway(work, settings) as (pid, port, inspector_port):
            yield GatewayUnderTest(pid, inspector_port, port, engine.port, work / "data" / "gateway.db", None, "")


@contextmanager
def stack(work: Path, redis_url: str) -> Iterator[GatewayUnderTest]:
    """Run a gateway in front of vLLM and LMCache."""
    options = local.LocalStack(
        data_dir=work / "stack",
        demo="random",
        max_model_len=8192,
        redis_url=redis_url or None,
        cpu_cache_gb=1.0,
        engine_kv_gb=1.0,
    )
    with local_stack.running(options) as (plan, _):
        settings = {
            "CWG_ENGINE_URLS": plan.engine_url,
            "CWG_CACHE_URL": plan.cache_url,
            "CWG_KV_DIR": str(plan.kv_dir),
            "CWG_KV_REDIS_URL": redis_url,
            "CWG_MODEL_FINGERPRINT": plan.model.fingerprint,
            "CWG_DATA_DIR": str(work / "data"),
        }
        with _gateway(work, settings) as (pid, port, inspector_port):
            yield GatewayUnderTest(
                pid, inspector_port, port, plan.engine_port, work / "data" / "gateway.db", plan.kv_dir, redis_url
            )


@contextmanager
def _gateway(work: Path, settings: Mapping[str, str]) -> Iterator[tuple[int, int, int]]:
    port, inspector_port = contenders.free_port(), contenders.free_port()
    command = [sys.executable, "-m", "loadtests.inspected_gateway", str(inspector_port), "serve"]
    launch = contenders.Launch(command, "/readyz", {**settings, "CWG_PORT": str(port)})
    with contenders.run(contenders.GATEWAY, "", port, launch, work) as gateway:
        yield gateway.pid, port, inspector_port


def logged_errors(log: Path) -> list[str]:
    """Return the errors in the gateway's log, each with its traceback."""
    lines = log.read_text(errors="replace").splitlines()
    starts = [at for at, line in enumerate(lines) if _DATED.match(line)]
    entries = ["\n".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]
    return [entry[:2000] for entry in entries if " ERROR " in entry or " CRITICAL " in entry]


def _print(sample: Sample) -> None:
    print(
        f"{sample.at_s:.0f} s: {sample.requests} requests, {sample.failures} failed, {sample.rss / 2**20:.1f} MB, "
        f"{sample.own_fds} fds, {sample.upstream} upstream, {sum(sample.tasks.values())} tasks, "
        f"{sum(sample.rows.values())} rows {sample.note}",
        file=sys.stderr,
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine = parser.add_mutually_exclusive_group(required=True)
    engine.add_argument("--stack", action="store_true", help="in front of vLLM and LMCache")
    engine.add_argument("--canned", action="store_true", help="in front of an engine that costs nothing")
    parser.add_argument("--redis", default="", help="with --stack: URL of an unused Redis for LMCache's second tier")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Agents from the package indexes hold tool-using conversations through the gateway.

`python -m loadtests.agents_tour --agents-python ENV/bin/python --npm-bin DIR/node_modules/.bin`. The engine behind the
gateway is `loadtests.scripted_engine`; with `--stack` it is vLLM with the demo model, and no tool is called. Finally
each agent manages its own windows through the gateway's MCP tools, over HTTP and over stdio (`--windows`: only that);
with `--stack` the scripted engine decides which tools it calls, and the gateway that serves them is in front of vLLM.
With `--record FILE` the agents talk to the scripted engine without a gateway, and their requests are written to FILE:
tests/recordings/agents.json was made that way.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from gateway.stack import demo_model, local
from loadtests import agent_recordings, agent_windows, contenders, thaw_stack
from loadtests.agent_kinds import MODEL, Agent
from loadtests.agent_scenarios import PLAIN, SCENARIOS, Scenario
from loadtests.scripted_engine import ScriptedEngine

_FREEZE_S = 60.0
Gateway = tuple[str, Callable[[], int]]  # the gateway's URL, and how many tool results its engine has received


def main() -> int:
    """Run the tour and return an exit code."""
    options = _options()
    scenarios = PLAIN if options.stack else SCENARIOS
    selected = [s for s in scenarios if not options.only or s.kind.name in options.only]
    with tempfile.TemporaryDirectory(prefix="cwg-agents-") as folder:
        work = Path(folder)
        if options.record:
            recorded = [
                _record(scenario, _executable(options, scenario.kind), work / str(n))
                for n, scenario in enumerate(selected)
            ]
            agent_recordings.write(options.record, recorded, work)
            return 0
        opened = _real(work) if options.stack else _scripted(work)
        with opened as (gateway, results):
            code = 0 if options.windows else _tour(selected, options, work, gateway, results)
            return max(code, _manage_windows(options, work, gateway))


@contextmanager
def _scripted(work: Path) -> Iterator[Gateway]:
    with _engine(None) as engine, contenders.gateway(work, _address(engine)) as gateway:
        yield gateway.url(""), lambda: engine.results


@contextmanager
def _real(work: Path) -> Iterator[Gateway]:
    options = local.LocalStack(
        data_dir=work / "stack", demo="random", port=contenders.free_port(), max_model_len=demo_model.CONTEXT
    )
    with thaw_stack.running(options) as stack:
        yield stack.plan.url, lambda: 0


def _tour(
    scenarios: Sequence[Scenario], options: argparse.Namespace, work: Path, url: str, results: Callable[[], int]
) -> int:
    failed = 0
    for number, scenario in enumerate(scenarios):
        title = f"{scenario.kind.name}: {scenario.name}"
        agent = scenario.agent(_executable(options, scenario.kind), work / str(number), url)
        before, results_before = _sessions(url), results()
        try:
            for run in scenario.runs:
                agent.run(run)
            new = {name: turns for name, turns in _sessions(url).items() if turns != before.get(name)}
            _check(url, scenario, new, results() - results_before)
            print(f"ok    {title}: {agent.version()}; turns: {', '.join(map(str, new.values()))}", flush=True)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAIL  {title}: {error}", flush=True)
    return 1 if failed else 0


def _manage_windows(options: argparse.Namespace, work: Path, url: str) -> int:
    """Have each agent call the gateway's tools, over each transport; return an exit code."""
    failed = 0
    for scenario in agent_windows.TOOL_SCENARIOS:
        kind = scenario.kind
        if options.only and kind.name not in options.only:
            continue
        try:
            with _model_of(options, url) as (base_url, names):
                agent = kind(_executable(options, kind), work / names.session, base_url)
                agent.configure_tools(scenario.tools(url))
                before = agent_windows.operation_counts(url)
                agent.run(agent_windows.operations_run(kind, names))
            operations = agent_windows.operation_counts(url) - before
            summary = agent_windows.check(url, names, operations, real=options.stack)
            print(f"ok    {kind.name}: {scenario.name}: {agent.version()}; {summary}", flush=True)
        except (RuntimeError, subprocess.TimeoutExpired, httpx.HTTPError) as error:
            failed += 1
            print(f"FAIL  {kind.name}: {scenario.name}: {error}", flush=True)
    return 1 if failed else 0


@contextmanager
def _model_of(options: argparse.Namespace, url: str) -> Iterator[tuple[str, agent_windows.Names]]:
    """The base URL of the agent's model, and the names of the session it freezes: its own unless the engine is real."""
    names = agent_windows.new_names()
    if not options.stack:
        yield f"{url}/s/{names.session}", names
        return
    agent_windows.talk(url, names)
    with _engine(None) as engine:
        yield _address(engine).url(""), names


def _check(url: str, scenario: Scenario, new: Mapping[str, int], results: int) -> None:
    """Check that the tool results arrived and every turn was recorded. Raises RuntimeError."""
    if results < scenario.tools:
        raise RuntimeError(f"{results} tool results reached the engine, not {scenario.tools}")
    if not new:
        raise RuntimeError("the gateway has no new session")
    for session in new:
        _check_recorded(url, session)


def _check_recorded(url: str, session: str) -> None:
    """Check that every turn was recorded with its reply, and that the conversation can be frozen."""
    turns = httpx.get(f"{url}/admin/sessions/{session}").raise_for_status().json()["turns"]
    if {turn["outcome"] for turn in turns} != {"completed"}:
        raise RuntimeError(f"not all turns of {session} completed: {[turn['outcome'] for turn in turns]}")
    name = f"tour-{time.monotonic_ns()}"
    body = {"session_id": session, "window_name": name}
    frozen = httpx.post(f"{url}/admin/windows", json=body, timeout=_FREEZE_S)
    if frozen.status_code != 201:
        raise RuntimeError(f"{session} was not frozen: {frozen.text}")
    last = httpx.get(f"{url}/admin/windows/{name}/messages").raise_for_status().json()["messages"][-1]
    if last["role"] != "assistant":
        raise RuntimeError(f"the window of {session} ends with {last}")


def _record(scenario: Scenario, path: Path, work: Path) -> agent_recordings.Recording:
    """Run one scenario against the engine without a gateway, and record the requests."""
    work.mkdir()
    file = work / "requests.jsonl"
    with _engine(file) as engine:
        agent = scenario.agent(path, work, _address(engine).url(""))
        for run in scenario.runs:
            agent.run(run)
        return agent_recordings.Recording(agent.name, agent.version(), scenario.name, file.read_text().splitlines())


def _sessions(url: str) -> dict[str, int]:
    """Every session of the gateway, with its number of turns."""
    answer = httpx.get(f"{url}/admin/sessions", params={"limit": 100}).raise_for_status().json()
    return {session["id"]: session["turn_count"] for session in answer["sessions"]}


@contextmanager
def _engine(record: Path | None) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(0, (MODEL,), record)
    thread = threading.Thread(target=engine.serve_forever)
    thread.start()
    try:
        yield engine
    finally:
        engine.shutdown()
        thread.join()
        engine.server_close()


def _address(engine: ScriptedEngine) -> contenders.Contender:
    return contenders.Contender("scripted engine", "", engine.server_port, os.getpid())


def _executable(options: argparse.Namespace, kind: type[Agent]) -> Path:
    """Return the agent's executable. Exits if it is missing, as a tour must not silently skip an agent."""
    name = kind.executable
    path = options.agents_python if name == "python" else options.npm_bin / name
    if path is None or not path.exists():
        sys.exit(f"{kind.name} is not installed ({path}); `make agents-tour` installs all agents")
    return Path(path).absolute()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents-python", type=Path, help="a Python with openai-agents")
    parser.add_argument("--npm-bin", type=Path, default=Path("node_modules/.bin"), help="directory of the npm agents")
    parser.add_argument("--only", action="append", help="name of an agent; can be repeated")
    parser.add_argument("--stack", action="store_true", help="use vLLM with the demo model, which calls no tools")
    parser.add_argument("--windows", action="store_true", help="only the agents that manage their own windows")
    parser.add_argument("--record", type=Path, help="write the agents' requests to this file, without a gateway")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

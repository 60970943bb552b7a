"""Agents from the package indexes hold tool-using conversations through the gateway.

`python -m loadtests.agents_tour --agents-python ENV/bin/python --npm-bin DIR/node_modules/.bin`. The engine behind the
gateway is `loadtests.scripted_engine`; with `--stack` it is vLLM with the demo model, and no tool is called. At last
each agent keeps its own windows by the gateway's tools of MCP, over HTTP and over stdio (`--windows`: only that); with
`--stack` the scripted engine says which tools it calls, and the gateway that serves them stands before vLLM. With
`--record FILE` the agents speak to the scripted engine without a gateway, and what they send is written to FILE: that
is where tests/recordings/agents.json comes from.
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
Before = tuple[str, Callable[[], int]]  # the gateway's address, and how many tool results its engine has seen


def main() -> int:
    """Run the tour and return an exit code."""
    options = _options()
    known = PLAIN if options.stack else SCENARIOS
    chosen = [s for s in known if not options.only or s.kind.name in options.only]
    with tempfile.TemporaryDirectory(prefix="cwg-agents-") as folder:
        work = Path(folder)
        if options.record:
            recorded = [
                _record(scenario, _found(options, scenario.kind), work / str(n)) for n, scenario in enumerate(chosen)
            ]
            agent_recordings.write(options.record, recorded, work)
            return 0
        opened = _real(work) if options.stack else _scripted(work)
        with opened as (gateway, results):
            toured = 0 if options.windows else _tour(chosen, options, work, gateway, results)
            return max(toured, _keeping(options, work, gateway))


@contextmanager
def _scripted(work: Path) -> Iterator[Before]:
    with _engine(None) as engine, contenders.gateway(work, _address(engine)) as gateway:
        yield gateway.url(""), lambda: engine.results


@contextmanager
def _real(work: Path) -> Iterator[Before]:
    options = local.LocalStack(data_dir=work / "stack", port=contenders.free_port(), max_model_len=demo_model.CONTEXT)
    with thaw_stack.running(options) as stack:
        yield stack.plan.url, lambda: 0


def _tour(
    chosen: Sequence[Scenario], options: argparse.Namespace, work: Path, url: str, results: Callable[[], int]
) -> int:
    failed = 0
    for number, scenario in enumerate(chosen):
        title = f"{scenario.kind.name}: {scenario.name}"
        agent = scenario.agent(_found(options, scenario.kind), work / str(number), url)
        before, seen = _sessions(url), results()
        try:
            for doing in scenario.doings:
                agent.do(doing)
            new = {name: turns for name, turns in _sessions(url).items() if turns != before.get(name)}
            _check(url, scenario, new, results() - seen)
            print(f"ok    {title}: {agent.version()}; turns: {', '.join(map(str, new.values()))}", flush=True)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAIL  {title}: {error}", flush=True)
    return 1 if failed else 0


def _keeping(options: argparse.Namespace, work: Path, url: str) -> int:
    """Let each agent call the gateway's tools, over each transport."""
    failed = 0
    for keeping in agent_windows.KEEPING:
        kind = keeping.kind
        if options.only and kind.name not in options.only:
            continue
        try:
            with _model_of(options, url) as (base_url, names):
                agent = kind(_found(options, kind), work / names.session, base_url)
                agent.offer(keeping.tools(url))
                before = agent_windows.verbs(url)
                agent.do(agent_windows.doing(kind, names))
            done = agent_windows.verbs(url) - before
            seen = agent_windows.check(url, names, done, real=options.stack)
            print(f"ok    {kind.name}: {keeping.name}: {agent.version()}; {seen}", flush=True)
        except (RuntimeError, subprocess.TimeoutExpired, httpx.HTTPError) as error:
            failed += 1
            print(f"FAIL  {kind.name}: {keeping.name}: {error}", flush=True)
    return 1 if failed else 0


@contextmanager
def _model_of(options: argparse.Namespace, url: str) -> Iterator[tuple[str, agent_windows.Names]]:
    """Where the agent finds its model, and the session that it shall freeze: its own, unless the engine is real."""
    names = agent_windows.names()
    if not options.stack:
        yield f"{url}/s/{names.session}", names
        return
    agent_windows.talk(url, names)
    with _engine(None) as engine:
        yield _address(engine).url(""), names


def _check(url: str, scenario: Scenario, new: Mapping[str, int], results: int) -> None:
    """Insist that what was asked for has happened."""
    if results < scenario.tools:
        raise RuntimeError(f"{results} tool results reached the engine, not {scenario.tools}")
    if not new:
        raise RuntimeError("the gateway has no session of it")
    for session in new:
        _check_kept(url, session)


def _check_kept(url: str, session: str) -> None:
    """Insist that every turn is there with its reply: the conversation can be frozen as it was held."""
    turns = httpx.get(f"{url}/admin/sessions/{session}").raise_for_status().json()["turns"]
    if {turn["outcome"] for turn in turns} != {"completed"}:
        raise RuntimeError(f"the turns of {session} ended otherwise: {[turn['outcome'] for turn in turns]}")
    name = f"tour-{time.monotonic_ns()}"
    body = {"session_id": session, "window_name": name}
    frozen = httpx.post(f"{url}/admin/windows", json=body, timeout=_FREEZE_S)
    if frozen.status_code != 201:
        raise RuntimeError(f"{session} was not frozen: {frozen.text}")
    last = httpx.get(f"{url}/admin/windows/{name}/messages").raise_for_status().json()["messages"][-1]
    if last["role"] != "assistant":
        raise RuntimeError(f"the window of {session} ends with {last}")


def _record(scenario: Scenario, found: Path, work: Path) -> agent_recordings.Recording:
    """Hold one conversation with the engine alone."""
    work.mkdir()
    file = work / "requests.jsonl"
    with _engine(file) as engine:
        agent = scenario.agent(found, work, _address(engine).url(""))
        for doing in scenario.doings:
            agent.do(doing)
        return agent_recordings.Recording(agent.name, agent.version(), scenario.name, file.read_text().splitlines())


def _sessions(url: str) -> dict[str, int]:
    """Every session of the gateway and how many turns it has."""
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


def _found(options: argparse.Namespace, kind: type[Agent]) -> Path:
    """The agent's executable. Exits where it is not there: a tour that leaves an agent out has not seen it."""
    name = kind.executable
    path = options.agents_python if name == "python" else options.npm_bin / name
    if path is None or not path.exists():
        sys.exit(f"{kind.name} is not there ({path}); `make agents-tour` installs all of them")
    return Path(path).absolute()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents-python", type=Path, help="the Python that has openai-agents")
    parser.add_argument("--npm-bin", type=Path, default=Path("node_modules/.bin"), help="where claude, codex are")
    parser.add_argument("--only", action="append", help="the name of an agent; may be given several times")
    parser.add_argument("--stack", action="store_true", help="before vLLM with the demo model, which calls no tools")
    parser.add_argument("--windows", action="store_true", help="only the agents that keep their own windows")
    parser.add_argument("--record", type=Path, help="write what the agents send to this file, without a gateway")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

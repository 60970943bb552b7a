"""Agents from the package indexes hold tool-using conversations through the gateway.

`python -m loadtests.agents_tour --agents-python ENV/bin/python --npm-bin DIR/node_modules/.bin`. The engine behind the
gateway is `loadtests.scripted_engine`. With `--record FILE` the agents speak to the engine without a gateway, and what
they send is written to FILE: that is where tests/recordings/agents.json comes from.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from loadtests import agent_recordings, contenders
from loadtests.agent_kinds import MODEL
from loadtests.agent_scenarios import SCENARIOS, Scenario
from loadtests.scripted_engine import ScriptedEngine

_FREEZE_S = 60.0


def main() -> int:
    """Run the tour and return an exit code."""
    options = _options()
    chosen = [s for s in SCENARIOS if not options.only or s.kind.name in options.only]
    with tempfile.TemporaryDirectory(prefix="cwg-agents-") as folder:
        work = Path(folder)
        if options.record:
            recorded = [
                _record(scenario, _found(options, scenario), work / str(n)) for n, scenario in enumerate(chosen)
            ]
            agent_recordings.write(options.record, recorded, work)
            return 0
        return _tour(chosen, options, work)


def _tour(chosen: Sequence[Scenario], options: argparse.Namespace, work: Path) -> int:
    failed = 0
    with _engine(None) as engine, contenders.gateway(work, _address(engine)) as gateway:
        for number, scenario in enumerate(chosen):
            title = f"{scenario.kind.name}: {scenario.name}"
            try:
                print(f"ok    {title}: {_through(gateway, engine, scenario, options, work / str(number))}", flush=True)
            except RuntimeError as error:
                failed += 1
                print(f"FAIL  {title}: {error}", flush=True)
    return 1 if failed else 0


def _through(
    gateway: contenders.Contender, engine: ScriptedEngine, scenario: Scenario, options: argparse.Namespace, work: Path
) -> str:
    """Hold one conversation; say what the gateway knows of it."""
    before = _sessions(gateway)
    engine.results = 0
    agent = scenario.agent(_found(options, scenario), work, gateway.url(""))
    for doing in scenario.doings:
        agent.do(doing)
    if engine.results < scenario.tools:
        raise RuntimeError(f"{engine.results} tool results reached the engine, not {scenario.tools}")
    new = {name: turns for name, turns in _sessions(gateway).items() if turns != before.get(name)}
    if not new:
        raise RuntimeError("the gateway has no session of it")
    for session in new:
        _check_kept(gateway, session)
    return f"{agent.version()}; {len(new)} sessions of {', '.join(map(str, new.values()))} turns"


def _check_kept(gateway: contenders.Contender, session: str) -> None:
    """Insist that every turn is there with its reply: the conversation can be frozen as it was held."""
    turns = httpx.get(gateway.url(f"/admin/sessions/{session}")).raise_for_status().json()["turns"]
    if {turn["outcome"] for turn in turns} != {"completed"}:
        raise RuntimeError(f"the turns of {session} ended otherwise: {[turn['outcome'] for turn in turns]}")
    name = f"tour-{time.monotonic_ns()}"
    frozen = httpx.post(
        gateway.url("/admin/windows"), json={"session_id": session, "window_name": name}, timeout=_FREEZE_S
    )
    if frozen.status_code != 201:
        raise RuntimeError(f"{session} was not frozen: {frozen.text}")
    last = httpx.get(gateway.url(f"/admin/windows/{name}/messages")).raise_for_status().json()["messages"][-1]
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


def _sessions(gateway: contenders.Contender) -> dict[str, int]:
    """Every session of the gateway and how many turns it has."""
    answer = httpx.get(gateway.url("/admin/sessions"), params={"limit": 100}).raise_for_status().json()
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


def _found(options: argparse.Namespace, scenario: Scenario) -> Path:
    """The agent's executable. Exits where it is not there: a tour that leaves an agent out has not seen it."""
    name = scenario.kind.executable
    path = options.agents_python if name == "python" else options.npm_bin / name
    if path is None or not path.exists():
        sys.exit(f"{scenario.kind.name} is not there ({path}); `make agents-tour` installs all of them")
    return Path(path).absolute()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents-python", type=Path, help="the Python that has openai-agents")
    parser.add_argument("--npm-bin", type=Path, default=Path("node_modules/.bin"), help="where claude, codex are")
    parser.add_argument("--only", action="append", help="the name of an agent; may be given several times")
    parser.add_argument("--record", type=Path, help="write what the agents send to this file, without a gateway")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Attack trials: everything that once stopped, filled or fooled a gateway, and variations of it, tried again.

`python -m loadtests.attack` starts gateways in front of an engine whose every response it controls, and prints a line
for each trial: whether it passed, and the figures. The table goes to loadtests/results/attack.md. The exit code is 1
if a trial failed. `--stack` adds the trials that need the real vLLM and LMCache. All traffic stays on the loopback
interface, and time, traffic and memory are bounded.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests import (
    attack_access,
    attack_cache,
    attack_clients,
    attack_dependencies,
    attack_http,
    attack_load,
    attack_processes,
    attack_races,
    attack_stack,
    attack_storage,
    attack_text,
    machine,
)
from loadtests.attack_harness import Testbed, Trial, Verdict

_MODULES = (
    attack_http,
    attack_access,
    attack_text,
    attack_clients,
    attack_races,
    attack_storage,
    attack_dependencies,
    attack_cache,
    attack_processes,
    attack_load,
    attack_stack,
)
TRIALS: Sequence[Trial] = tuple(trial for module in _MODULES for trial in module.TRIALS.all)


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial, its verdict, and its duration in seconds."""

    trial: Trial
    verdict: Verdict
    duration_s: float

    @property
    def word(self) -> str:
        """The verdict in one word or two."""
        passed = self.verdict.passed
        return "not run" if passed is None else "passed" if passed else "failed"


def main() -> int:
    """Run the trials, write the table and return an exit code."""
    options = _options()
    selected = [trial for trial in TRIALS if _is_selected(trial, options)]
    if options.list:
        for trial in TRIALS:
            print(f"{trial.name:28} {trial.requirement}{' (--stack)' if trial.needs_stack else ''}")
        return 0
    if not selected:
        print(f"no trial is called {', '.join(options.only)}; see --list", file=sys.stderr)
        return 2
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"source {options.source}, seed {seed}", flush=True)
    began = time.monotonic()
    results = []
    for trial in selected:
        result = _run(trial, options.source, seed)
        results.append(result)
        print(f"{result.word:7} {trial.name} ({result.duration_s:.0f} s): {result.verdict.figures}", flush=True)
    text = _table(results, time.monotonic() - began, options.source, seed)
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "attack.md").write_text(text)
    failed = [result.trial.name for result in results if result.verdict.passed is False]
    print(f"{len(results)} trials, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _is_selected(trial: Trial, options: argparse.Namespace) -> bool:
    if options.only:
        return trial.name in options.only
    return options.stack or not trial.needs_stack


def _run(trial: Trial, source: Path, seed: int) -> TrialResult:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cwg-attack-", ignore_cleanup_errors=True) as folder:
        try:
            with Testbed(Path(folder), source, seed) as testbed:
                verdict = trial.run(testbed)
        except Exception as error:  # noqa: BLE001 - one broken trial must not stop the others
            verdict = Verdict(False, f"the trial raised {type(error).__name__}: {str(error)[-600:]}")
    return TrialResult(trial, verdict, time.monotonic() - began)


def _table(results: Sequence[TrialResult], duration_s: float, source: Path, seed: int) -> str:
    facts = machine.describe()
    rows = [
        f"| {result.trial.name} | {result.trial.requirement} | {result.word} | {_cell(result.verdict.figures)} |"
        for result in results
    ]
    passed = sum(result.verdict.passed is True for result in results)
    return (
        "# Attack trials\n\n"
        "Written by `python -m loadtests.attack` (`make attack`).\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}\n"
        f"- the gateway at {_commit(source)}, seed {seed}; {duration_s:.0f} s\n"
        "- a pause is the longest time in which /healthz was not answered on another connection, less the time in "
        "which the gateway or the monitor was runnable but had no core. The limit is 250 ms; if it is exceeded, the "
        "best of three counts. Memory is the growth of the peak resident size while a request was served. The limit "
        "is four times the body plus 48 MB\n"
        f"- {passed} of {len(results)} passed\n\n"
        "| trial | requirement | result | figures |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _cell(text: str) -> str:
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain.replace("|", "\\|")[:1500]


def _commit(source: Path) -> str:
    """The last commit that changed the gateway package, and whether there are uncommitted changes to it."""
    git = ["git", "-C", str(source)]
    last = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--", "gateway"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gateway"], capture_output=True, check=False)
    return (last.stdout.strip() or "an unknown commit") + " with changes" * bool(changed.returncode)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--stack", action="store_true", help="also run the trials that start vLLM and LMCache")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run only this trial; can be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list the trials and exit")
    parser.add_argument("--seed", type=int, help="seed of the random choices; default: the time")
    parser.add_argument(
        "--source",
        type=Path,
        default=root,
        help="run the gateway of this checkout; with --stack the engine and the cache stay those of this one",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.source = options.source.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())

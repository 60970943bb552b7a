"""A standing attack: what was once found to stop, fill or fool a gateway, and its kin, tried again.

`python -m loadtests.attack` starts gateways of its own before an engine of which it decides every answer, and prints a
line for each trial: what has to hold, whether it did, and the figures. The table goes to loadtests/results/attack.md.
It ends with 1 where a trial did not hold. `--stack` tries what needs the real vLLM and LMCache as well. Everything
stays on the loopback interface and is bounded in time, traffic and memory.
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
    attack_clients,
    attack_data,
    attack_doors,
    attack_http,
    attack_load,
    attack_neighbours,
    attack_processes,
    attack_races,
    attack_stack,
    attack_text,
    machine,
)
from loadtests.attack_rig import Ground, Trial, Verdict

_MODULES = (
    attack_http,
    attack_doors,
    attack_text,
    attack_clients,
    attack_races,
    attack_data,
    attack_neighbours,
    attack_processes,
    attack_load,
    attack_stack,
)
TRIALS: Sequence[Trial] = tuple(trial for module in _MODULES for trial in module.TRIALS.all)


@dataclass(frozen=True, slots=True)
class Tried:
    """A trial, and what came of it in how many seconds."""

    trial: Trial
    verdict: Verdict
    took_s: float

    @property
    def word(self) -> str:
        """The verdict in words."""
        held = self.verdict.held
        return "not tried" if held is None else "held" if held else "did not hold"


def main() -> int:
    """Try, write the table and return an exit code."""
    options = _options()
    chosen = [trial for trial in TRIALS if _wanted(trial, options)]
    if options.list:
        for trial in TRIALS:
            print(f"{trial.name:28} {trial.promise}{' (--stack)' if trial.needs_stack else ''}")
        return 0
    if not chosen:
        print(f"no trial is called {', '.join(options.only)}; see --list", file=sys.stderr)
        return 2
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"source {options.source}, seed {seed}", flush=True)
    began = time.monotonic()
    tried = []
    for trial in chosen:
        tried.append(_try(trial, options.source, seed))
        one = tried[-1]
        print(f"{one.word:12} {trial.name} ({one.took_s:.0f} s): {one.verdict.figures}", flush=True)
    text = _table(tried, time.monotonic() - began, options.source, seed)
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "attack.md").write_text(text)
    failed = [one.trial.name for one in tried if one.verdict.held is False]
    print(f"{len(tried)} trials, {len(failed)} did not hold" + (f": {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _wanted(trial: Trial, options: argparse.Namespace) -> bool:
    if options.only:
        return trial.name in options.only
    return options.stack or not trial.needs_stack


def _try(trial: Trial, source: Path, seed: int) -> Tried:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cwg-attack-", ignore_cleanup_errors=True) as folder:
        try:
            with Ground(Path(folder), source, seed) as ground:
                seen = trial.run(ground)
        except Exception as error:  # noqa: BLE001 - one trial that breaks must not end the others
            seen = Verdict(False, f"the trial broke: {type(error).__name__}: {str(error)[-600:]}")
    return Tried(trial, seen, time.monotonic() - began)


def _table(tried: Sequence[Tried], took_s: float, source: Path, seed: int) -> str:
    facts = machine.describe()
    rows = [f"| {one.trial.name} | {one.trial.promise} | {one.word} | {_cell(one.verdict.figures)} |" for one in tried]
    held = sum(one.verdict.held is True for one in tried)
    return (
        "# A standing attack\n\n"
        "Written by `python -m loadtests.attack` (`make attack`).\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}\n"
        f"- the gateway at {_commit(source)}, seed {seed}; {took_s:.0f} s\n"
        "- a pause is the longest time in which /healthz was not answered on another connection, without the time in "
        "which the kernel let neither the gateway nor the one that asked run; it may be 250 ms, and where it was more "
        "the least of three counts. Memory is the growth of the peak of resident bytes while a request was served; it "
        "may be four times the body and 48 MB\n"
        f"- {held} of {len(tried)} held\n\n"
        "| trial | what has to hold | held | figures |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _cell(text: str) -> str:
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain.replace("|", "\\|")[:1500]


def _commit(source: Path) -> str:
    """The last commit that changed the gateway itself, and whether it was changed since."""
    git = ["git", "-C", str(source)]
    last = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--", "gateway"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gateway"], capture_output=True, check=False)
    return (last.stdout.strip() or "an unknown commit") + " with changes" * bool(changed.returncode)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--stack", action="store_true", help="also what needs vLLM and LMCache; it starts them")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this trial alone; can be repeated")
    parser.add_argument("--list", action="store_true", help="tell the trials and end")
    parser.add_argument("--seed", type=int, help="of what is drawn by chance; else the time")
    parser.add_argument(
        "--source",
        type=Path,
        default=root,
        help="run the gateway of another checkout; engine and cache with --stack are those of this one",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.source = options.source.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())

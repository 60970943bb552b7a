"""The two demo models: which of them is served, and how it is made, in a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from gateway.stack import demo_model, smollm2
from gateway.stack.demo_model import Size
from gateway.stack.errors import StackError
from gateway.stack.model_dir import is_made, remove_unfinished
from gateway.stack.tied import tied

Demo = Literal["smollm2", "random"]
Progress = Callable[[str], None]


class DemoModel(NamedTuple):
    """A demo model on this disk; `warning` says why it is not the one that is served by default."""

    kind: Demo
    directory: Path
    about: str
    warning: str = ""


def context(demo: Demo | None) -> int:
    """The tokens that the demo model goes up to."""
    return demo_model.CONTEXT if demo == "random" else smollm2.CONTEXT


def prepare(folder: Path, demo: Demo | None, size: Size, progress: Progress) -> DemoModel:
    """Make the demo model in `folder` unless it is there.

    None: the one that talks, or random weights if that is not available. Raises `StackError`.
    """
    if demo == "random":
        return _random(folder, size, progress)
    directory = folder / "demo-smollm2"
    try:
        _make(directory, smollm2.RECIPE, progress, "gateway.stack.smollm2")
    except StackError as error:
        if demo:
            raise StackError(f"--demo smollm2: {error}; or use --demo random") from None
        warning = (
            f"{smollm2.NAME} is not available: {error}. Serving a model with random weights instead, which talks "
            "nonsense; with --demo random this is not tried"
        )
        return _random(folder, size, progress)._replace(warning=warning)
    return DemoModel("smollm2", directory, f"{smollm2.NAME}, {smollm2.LICENCE}")


def _random(folder: Path, size: Size, progress: Progress) -> DemoModel:
    directory = folder / f"demo-{size}"
    progress("building the model with random weights")
    _make(directory, demo_model.recipe(size), progress, "gateway.stack.demo_model", "--size", size)
    return DemoModel("random", directory, "random weights")


def _make(directory: Path, recipe: str, progress: Progress, module: str, *options: str) -> None:
    """Run a builder: its libraries would stay in this process's memory for as long as the stack runs."""
    if is_made(directory, recipe):
        return
    remove_unfinished(directory)  # of a build that was killed; none is under way: a builder dies with its `cwg up`
    argv = tied([sys.executable, "-m", module, str(directory), *options])
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as builder,
    ):
        try:
            for line in builder.stdout or ():
                progress(line.strip())
            builder.wait()
        finally:
            if builder.poll() is None:  # the user has had enough
                os.killpg(builder.pid, signal.SIGKILL)
                builder.wait()
                remove_unfinished(directory)
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if builder.returncode:
        raise StackError(said[-1] if said else f"{module} ended with exit code {builder.returncode}")

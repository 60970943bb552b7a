"""Directories of models made on this machine: written whole or not at all, and only over an older one of ours."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from gateway.stack.errors import StackError

MARKER = "cwg_demo_model"
"""The field of config.json that names the recipe a model was made by."""


def write_model(directory: Path, recipe: str, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new directory and move it to `directory`; a model of this recipe is left as it is.

    Raises `StackError` if something else is there, and what `write` raises: then nothing has changed.
    """
    if is_made(directory, recipe):
        return
    if directory.exists() and not _is_ours(directory):
        raise StackError(f"{directory} holds something that is not a demo model; move it away")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_prefix(directory), dir=directory.parent))
    try:
        write(unfinished)
        unfinished.chmod(0o755)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_made(directory: Path, recipe: str) -> bool:
    """Whether `directory` holds a model of this recipe."""
    return _recipe(directory) == recipe


def remove_unfinished(directory: Path) -> None:
    """Remove what is left of a process that was killed while it wrote. The caller knows that none does now."""
    for unfinished in directory.parent.glob(f"{_prefix(directory)}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _prefix(directory: Path) -> str:
    return f".{directory.name}-"


def _is_ours(directory: Path) -> bool:
    return bool(_recipe(directory)) or (directory.is_dir() and not any(directory.iterdir()))


def _recipe(directory: Path) -> str:
    try:
        return str(json.loads((directory / "config.json").read_bytes()).get(MARKER, ""))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return ""

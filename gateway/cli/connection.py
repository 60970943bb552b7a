"""How commands call a running gateway (CWG_URL, CWG_API_KEY) and report a failure."""

import difflib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gateway.cli.admin_client import Admin, AdminError, OnProgress
from gateway.cli.hints import WORDS
from gateway.cli.output import Result, line, say

_ERR = Console(stderr=True)
_MAX_NAMES = 1000  # windows, and sessions, with which a mistyped name is compared
_LOOKUP_TIMEOUT_S = 2.0  # for nearest names and completion
# Code of a 404: the detail with the missing name, and the kind of its nodes in the tree.
_MISSING = {"window_not_found": ("window_name", "window"), "session_not_found": ("session_id", "session")}


class Failure(click.ClickException):
    """A failure in one line; exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print it."""
        say(f"error: {self.message}", err=True)


class Word(click.Choice[str]):
    """A choice of words; the error for a mistyped one suggests the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """See `click.Choice`."""
        near = difflib.get_close_matches(str(value), self.choices, n=1)
        message = super().get_invalid_choice_message(value, ctx)
        return f"{message} Did you mean {near[0]!r}?" if near else message


def operation(command: Callable[..., Result]) -> click.Command:
    """Make a command of `cwg`, named after its function, that prints the result, as JSON with `--json`."""

    @functools.wraps(command)
    def run(*arguments: Any, as_json: bool, **options: Any) -> None:
        try:
            command(*arguments, **options).show(as_json=as_json)
        except (LookupError, TypeError) as error:
            problem = f"the answer is not that of a gateway of this version ({type(error).__name__}: {error})"
            raise Failure(f"{problem}; is CWG_URL right?") from error

    option = click.option("--json", "as_json", is_flag=True, help="print the answer as JSON")
    return click.command(command.__name__.rstrip("_"))(option(run))


def admin(timeout_s: float = 600, session_id: str = "") -> Admin:
    """The gateway's admin API. Raises AdminError for an invalid address, key or session id."""
    url = os.environ.get("CWG_URL", "http://127.0.0.1:8700").rstrip("/")
    return Admin(url, os.environ.get("CWG_API_KEY", ""), timeout_s, session_id)


@contextmanager
def failures() -> Iterator[None]:
    """Turn AdminError into Failure, in the words of `cwg`, and suggest the nearest name for a missing one."""
    try:
        yield
    except AdminError as error:
        hint = _nearest(error) or WORDS.translate(error.code, error.hint)
        raise Failure(f"{error.message} ({hint})" if hint else error.message) from error


def call(method: str, path: str, **arguments: Any) -> dict[str, Any]:
    """Send one request, and return its answer. Raises Failure."""
    with failures():
        return admin().call(method, path, **arguments)


def watched(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST, and show progress until the answer arrives. Raises Failure."""
    with failures(), progress_bar() as on_progress:
        return admin().watch(path, body, on_progress)


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A progress bar, on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_ERR, transient=True, disable=not _ERR.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(
            task, description=line(step["stage"]), completed=step["done"], total=step["total"] or None
        )


def names(kind: str) -> list[str]:
    """The names of windows, or of sessions; none if the gateway does not answer."""
    try:
        nodes = admin(_LOOKUP_TIMEOUT_S).call("GET", "/admin/tree", query={"limit": _MAX_NAMES})["nodes"]
        return [line(node["name"]) for node in nodes if node["kind"] == kind]
    except (AdminError, LookupError, TypeError):
        return []


def completing(kind: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Shell completion: the names that start with what was typed."""
    return lambda _context, _parameter, typed: [name for name in names(kind) if name.startswith(typed)]


window = click.argument("name", shell_complete=completing("window"))


def _nearest(error: AdminError) -> str:
    detail, kind = _MISSING.get(error.code, ("", ""))
    wrong = error.details.get(detail)
    near = difflib.get_close_matches(wrong, names(kind), n=1) if isinstance(wrong, str) else []
    return f"did you mean {near[0]!r}?" if near else ""


def window_path(name: str, operation: str = "") -> str:
    """The path of a window, or of an operation on it."""
    return f"/admin/windows/{quote(name, safe='')}" + (f"/{operation}" if operation else "")

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
from gateway.cli.output import line, say

_ERR = Console(stderr=True)
_NAMES = 1000  # windows, and sessions, that a mistyped name is compared with
_SOON_S = 2.0  # for what is only a help: nearest names, completion
# What a 404 is about: the detail that has the name, and what such nodes are called in the tree.
_MISSING = {"window_not_found": ("window_name", "window"), "session_not_found": ("session_id", "session")}


class Failure(click.ClickException):
    """A failure in one line; exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print it."""
        say(f"error: {self.message}", err=True)


class Word(click.Choice[str]):
    """One of some words; a mistyped one is answered with the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """See `click.Choice`."""
        near = difflib.get_close_matches(str(value), self.choices, n=1)
        said = super().get_invalid_choice_message(value, ctx)
        return f"{said} Did you mean {near[0]!r}?" if near else said


def verb(command: Callable[..., None]) -> click.Command:
    """A verb: a command of `cwg`, named after its function, with the option that every verb has."""
    option = click.option("--json", "as_json", is_flag=True, help="print the answer as JSON")

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (LookupError, TypeError) as error:
            what = f"the answer is not that of a gateway of this version ({type(error).__name__}: {error})"
            raise Failure(f"{what}; is CWG_URL right?") from error

    return click.command(command.__name__.rstrip("_"))(option(run))


def admin(timeout_s: float = 600) -> Admin:
    """The gateway's admin API. Raises AdminError where it cannot be spoken to."""
    url = os.environ.get("CWG_URL", "http://127.0.0.1:8700").rstrip("/")
    return Admin(url, os.environ.get("CWG_API_KEY", ""), timeout_s)


def call(method: str, path: str, **arguments: Any) -> dict[str, Any]:
    """Send one request, and return its answer. Raises Failure."""
    try:
        return admin().call(method, path, **arguments)
    except AdminError as error:
        raise failure(error) from error


def watched(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST, and show progress until the answer is there. Raises Failure."""
    with bar() as on_progress:
        try:
            return admin().watch(path, body, on_progress)
        except AdminError as error:
            raise failure(error) from error


@contextmanager
def bar() -> Iterator[OnProgress]:
    """A bar of progress, on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_ERR, transient=True, disable=not _ERR.is_terminal) as shown:
        task = shown.add_task("", total=None)
        yield lambda step: shown.update(
            task, description=line(step["stage"]), completed=step["done"], total=step["total"] or None
        )


def failure(error: AdminError) -> Failure:
    """The error as it is told: with the nearest name where there is no such window or session."""
    hint = _nearest(error) or WORDS.translate(error.code, error.hint)
    return Failure(f"{error.message} ({hint})" if hint else error.message)


def names(kind: str) -> list[str]:
    """The names of windows, or of sessions; none where the gateway cannot be asked."""
    try:
        nodes = admin(_SOON_S).call("GET", "/admin/tree", query={"limit": _NAMES})["nodes"]
        return [line(node["name"]) for node in nodes if node["kind"] == kind]
    except (AdminError, LookupError, TypeError):
        return []


def completing(kind: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """For the completion of a shell: the names that begin with what was typed."""
    return lambda _context, _parameter, typed: [name for name in names(kind) if name.startswith(typed)]


window = click.argument("name", shell_complete=completing("window"))


def _nearest(error: AdminError) -> str:
    detail, kind = _MISSING.get(error.code, ("", ""))
    wrong = error.details.get(detail)
    near = difflib.get_close_matches(wrong, names(kind), n=1) if isinstance(wrong, str) else []
    return f"did you mean {near[0]!r}?" if near else ""


def part(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")

"""How commands call a running gateway (--url or CWG_URL, CWG_API_KEY) and report a failure."""

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
from gateway.cli.hints import translate_hint
from gateway.cli.output import Result, line, say

DEFAULT_URL = "http://127.0.0.1:8700"
_URL = "gateway.cli.url"  # what --url says, in the context
_ERR = Console(stderr=True)
_MAX_NAMES = 1000  # windows, and sessions, with which a mistyped name is compared
_LOOKUP_TIMEOUT_S = 2.0  # for nearest names and completion
# Code of a 404: the detail with the missing name, and the kinds of its nodes in the tree.
_MISSING = {
    "window_not_found": ("window_name", ("window",)),
    "session_not_found": ("session_id", ("session",)),
    "nothing_of_that_name": ("name", ("window", "session")),
}
# A command's arguments: the fields of the admin API that they are sent as, if these have other names.
_FIELDS = {
    "name": ("window_name", "window name in the URL"),
    "source": ("window name in the URL",),
    "target": ("target_window",),
    "query": ("q",),
    "session": ("session_id", "session id in the URL"),
}


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


def _remember_url(context: click.Context, _parameter: click.Parameter, url: str | None) -> None:
    if url is not None:
        context.meta[_URL] = url


def url_option(*, hidden: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --url, of `cwg` and of each command."""
    about = f"Address of the gateway; default: CWG_URL, or {DEFAULT_URL}."
    return click.option("--url", expose_value=False, callback=_remember_url, hidden=hidden, help=about)


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
    return click.command(command.__name__.rstrip("_"))(option(url_option(hidden=True)(run)))


def gateway_url() -> str:
    """The address of the gateway: --url, else CWG_URL, else the default."""
    context = click.get_current_context(silent=True)
    given = context.meta.get(_URL) if context else None
    return str(given or os.environ.get("CWG_URL") or DEFAULT_URL).rstrip("/")


def base_url(session: str) -> str:
    """The base URL under which a client continues a session."""
    return f"{gateway_url()}/s/{session}/v1"


def admin(timeout_s: float = 600, session_id: str = "") -> Admin:
    """The gateway's admin API. Raises AdminError for an invalid address, key or session id.

    TRACEPARENT is how OpenTelemetry passes a trace to a command
    (https://opentelemetry.io/docs/specs/otel/context/env-carriers/).
    """
    traceparent = os.environ.get("TRACEPARENT", "")
    return Admin(gateway_url(), os.environ.get("CWG_API_KEY", ""), timeout_s, session_id, traceparent)


@contextmanager
def failures(**hints: str) -> Iterator[None]:
    """Turn AdminError into Failure, in the words of `cwg`, and suggest the nearest name for a missing one.

    `hints` are a command's own for some codes.
    """
    try:
        yield
    except AdminError as error:
        hint = hints.get(error.code) or _nearest(error) or translate_hint(error.code, error.hint)
        message = _with_own_names(error)
        raise Failure(f"{message} ({hint})" if hint else message) from error


def _with_own_names(error: AdminError) -> str:
    """The message, with the name of the command's own option or argument for the field of the admin API."""
    field, context = str(error.details.get("field")), click.get_current_context(silent=True)
    for parameter in context.command.params if context else ():
        is_this = field in (parameter.name, *_FIELDS.get(str(parameter.name), ()))
        if is_this and error.message.startswith(f"{field} "):
            name = parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name
            return name + error.message.removeprefix(field)
    return error.message


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


def names(*kinds: str) -> list[str]:
    """The names of windows, of sessions, or of both; none if the gateway does not answer."""
    try:
        nodes = admin(_LOOKUP_TIMEOUT_S).call("GET", "/admin/tree", query={"limit": _MAX_NAMES})["nodes"]
        return [line(node["name"]) for node in nodes if node["kind"] in kinds]
    except (AdminError, LookupError, TypeError):
        return []


def completing(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Shell completion: the names that start with what was typed."""

    def complete(context: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
        with context.scope(cleanup=False):
            return [name for name in names(*kinds) if name.startswith(typed)]

    return complete


window = click.argument("name", shell_complete=completing("window"))


def _nearest(error: AdminError) -> str:
    detail, kinds = _MISSING.get(error.code, ("", ()))
    wrong = error.details.get(detail)
    near = difflib.get_close_matches(wrong, names(*kinds), n=1) if isinstance(wrong, str) else []
    return f"did you mean {near[0]!r}?" if near else ""


def window_path(name: str, operation: str = "") -> str:
    """The path of a window, or of an operation on it."""
    return f"/admin/windows/{quote(name, safe='')}" + (f"/{operation}" if operation else "")


def session_path(name: str, operation: str = "") -> str:
    """The path of a session, or of an operation on it."""
    return f"/admin/sessions/{quote(name, safe='')}" + (f"/{operation}" if operation else "")

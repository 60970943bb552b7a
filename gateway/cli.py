"""`cwg`: the local stack, the gateway, and the verbs as a client of the admin API.

Exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""

import asyncio
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from gateway import __version__, drawing
from gateway.client import Admin, AdminError, OnProgress
from gateway.errors import StartError
from gateway.settings import Settings, SettingsError, load

# A pipe has no width: a name that is cut is of no use to the next program.
_OUT = Console() if sys.stdout.isatty() else Console(width=10_000)
_ERR = Console(stderr=True)


class Failure(click.ClickException):
    """A failure in one line; exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print it."""
        click.echo(f"error: {self.message}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cwg")
def main() -> None:
    """Context Window Gateway: durable, nameable, lossless KV caches for conversations on vLLM."""


# --- servers


@main.command()
@click.option("--model", help="model directory or id; without it, a small built-in model that talks nonsense")
@click.option("--served-model-name", help="the name that clients use")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), default=Path("data"), show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(1, 65535), default=8700, show_default=True, help="the gateway's port")
@click.option("--engine-port", type=click.IntRange(1, 65535), help="vLLM's port; a free one if not given")
@click.option("--max-model-len", type=click.IntRange(min=1), help="context limit; the model's own if not given")
@click.option("--chunk-size", type=click.IntRange(min=1), help="tokens per chunk; 256, or 64 for the built-in model")
@click.option("--redis-url", help="add a Redis tier: redis://[user:password@]host[:port]")
@click.option("--cpu-cache-gb", type=float, default=2.0, show_default=True, help="LMCache's memory tier")
def up(**options: Any) -> None:
    """Start the whole local stack: LMCache, vLLM and the gateway, under one supervisor."""
    from gateway.stack.errors import StackError  # noqa: PLC0415 - see `serve`
    from gateway.stack.local import LocalStack  # noqa: PLC0415
    from gateway.stack.up import up as run  # noqa: PLC0415

    try:
        raise SystemExit(run(LocalStack(**options)))
    except StackError as error:
        raise Failure(str(error)) from error


@main.command()
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="settings file (TOML)")
@click.option("--host", help="address to listen on")
@click.option("--port", type=int, help="port to listen on")
@click.option("--workers", type=int, help="processes that serve the port")
def serve(config: Path | None, **options: Any) -> None:
    """Run the gateway alone, before an engine and a cache that run elsewhere."""
    from gateway import app  # noqa: PLC0415 - a verb of the CLI should not pay for the server's imports

    try:
        settings = load(file=config, environment=os.environ, overrides=options)
        _log_to_stderr(settings)
        app.main(settings)
    except (SettingsError, StartError) as error:
        raise Failure(str(error)) from error


@main.command()
def mcp() -> None:
    """Serve MCP over stdin and stdout, before a running gateway (CWG_URL, CWG_API_KEY)."""
    from gateway.edge.mcp_server import over_stdio  # noqa: PLC0415 - see `serve`

    try:
        admin = _admin()
    except AdminError as error:
        raise _failure(error) from error
    asyncio.run(over_stdio(admin.ask))


def _log_to_stderr(settings: Settings) -> None:
    who = "%(process)d " if settings.workers > 1 else ""
    line = f"%(asctime)s {who}%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr, format=line)
    for library in ("httpx", "mcp"):
        logging.getLogger(library).setLevel(logging.WARNING)


# --- verbs


def _verb(command: Callable[..., None]) -> click.Command:
    """A verb: a command of `cwg`, named after its function, with the option that every verb has."""
    option = click.option("--json", "as_json", is_flag=True, help="print the answer as JSON")

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (LookupError, TypeError) as error:
            what = f"the answer is not a gateway's of this version ({type(error).__name__}: {error})"
            raise Failure(f"{what}; is CWG_URL right?") from error

    return main.command(command.__name__.rstrip("_"))(option(run))


def _admin() -> Admin:
    url = os.environ.get("CWG_URL", "http://127.0.0.1:8700").rstrip("/")
    return Admin(url, os.environ.get("CWG_API_KEY", ""))


@_verb
@click.argument("session")
@click.argument("name")
@click.option("--description", help="what the window is")
@click.option("--tag", "tags", multiple=True, help="a tag; may be given more than once")
@click.option("--ttl", "ttl_seconds", type=float, help="seconds until the window expires")
def freeze(
    session: str, name: str, description: str | None, tags: tuple[str, ...], ttl_seconds: float | None, as_json: bool
) -> None:
    """Freeze SESSION into the window NAME."""
    body = {
        "session_id": session,
        "window_name": name,
        "description": description,
        "tags": list(tags) or None,
        "ttl_seconds": ttl_seconds,
    }
    answer = _watched("/admin/windows", body)
    receipt = answer["receipt"]
    _show(answer, as_json, {"window": answer["name"], "kv": answer["kv"], **_flat(receipt)})


@_verb
@click.argument("name")
@click.option("--session", "new_session_id", help="id of the new session")
@click.option(
    "--warm", type=click.Choice(["none", "cpu", "gpu"]), default="gpu", show_default=True, help="how far up to load"
)
def thaw(name: str, new_session_id: str | None, warm: str, as_json: bool) -> None:
    """Thaw the window NAME into a new session."""
    answer = _watched(f"/admin/windows/{_part(name)}/thaw", {"new_session_id": new_session_id, "warm": warm})
    _show(answer, as_json, {"session": answer["session_id"], "model": answer["model"], **_flat(answer["receipt"])})


@_verb
@click.argument("source")
@click.argument("target")
@click.option("--description", help="what the clone is for")
@click.option("--tag", "tags", multiple=True, help="a tag; may be given more than once")
@click.option("--isolate", is_flag=True, help="under a salt of its own: neither finds the other's KV")
def clone(
    source: str, target: str, description: str | None, tags: tuple[str, ...], isolate: bool, as_json: bool
) -> None:
    """Give the window SOURCE a second name, TARGET; no KV byte is copied."""
    body = {"target_window": target, "description": description, "tags": list(tags) or None, "isolate": isolate or None}
    answer = _call("POST", f"/admin/windows/{_part(source)}/clone", body=body)
    shown = ("source_window", "target_window", "shared_blocks", "isolated", "kv")
    _show(answer, as_json, {k: answer[k] for k in shown})


@_verb
@click.argument("name")
@click.option("--description", help="what the window is; empty clears it")
@click.option("--tag", "tags", multiple=True, help="the tags it has from now on; may be given more than once")
@click.option("--no-tags", is_flag=True, help="take all tags away")
@click.option("--ttl", "ttl_seconds", type=float, help="seconds from now until the window expires")
@click.option("--no-ttl", is_flag=True, help="keep it for good")
def describe(
    name: str,
    description: str | None,
    tags: tuple[str, ...],
    no_tags: bool,
    ttl_seconds: float | None,
    no_ttl: bool,
    as_json: bool,
) -> None:
    """Change what is said of the window NAME: description, tags, time to live."""
    if (tags and no_tags) or (ttl_seconds is not None and no_ttl):
        raise click.UsageError("--tag and --no-tags, --ttl and --no-ttl exclude each other")
    given = {"description": description, "tags": list(tags) or None, "ttl_seconds": ttl_seconds}
    cleared = {"tags": no_tags, "ttl_seconds": no_ttl}
    body = {field: value for field, value in given.items() if value is not None or cleared.get(field)}
    answer = _call("PATCH", f"/admin/windows/{_part(name)}", body=body, nulls=True)
    _show(answer, as_json, {k: answer[k] for k in ("name", "description", "tags", "expires_at")})


@_verb
@click.argument("name")
@click.argument("question")
@click.option("--max-tokens", type=int, help="length of the answer, at most")
def ask(name: str, question: str, max_tokens: int | None, as_json: bool) -> None:
    """Ask the window NAME a QUESTION; the window does not change, and nothing is kept of it."""
    answer = _watched(f"/admin/windows/{_part(name)}/ask", {"question": question, "max_tokens": max_tokens})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(answer["answer"])
    receipt = answer["receipt"]
    cached = "?" if receipt["cached_tokens"] is None else receipt["cached_tokens"]
    click.echo(
        f"{receipt['prompt_tokens']} tokens, {cached} from the cache; {receipt['completion_tokens']} of answer "
        f"({answer['finish_reason']}); {receipt['duration_ms']:.0f} ms",
        err=True,
    )
    for warning in answer["warnings"]:
        click.echo(f"warning: {warning}", err=True)


@_verb
@click.argument("name")
@click.argument("count", type=int)
@click.option("--prefix", help="what the new sessions are named after: PREFIX-1, PREFIX-2 and so on")
def fanout(name: str, count: int, prefix: str | None, as_json: bool) -> None:
    """Thaw the window NAME into COUNT sessions at once; they share its KV, no byte is copied."""
    answer = _watched(f"/admin/windows/{_part(name)}/fanout", {"count": count, "prefix": prefix})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for session in answer["sessions"]:
        click.echo(session)
    for warning in answer["warnings"]:
        click.echo(f"warning: {warning}", err=True)


@_verb
@click.argument("name")
def prefetch(name: str, as_json: bool) -> None:
    """Load the KV of the window NAME into the cache's memory, before anybody asks for it."""
    answer = _watched(f"/admin/windows/{_part(name)}/prefetch", {})
    _show(answer, as_json, {"window": answer["window_name"], **_flat(answer["receipt"])})


@_verb
@click.argument("name")
def verify(name: str, as_json: bool) -> None:
    """Check every KV object of the window NAME, byte for byte; exit code 1 where one is missing or damaged."""
    answer = _watched(f"/admin/windows/{_part(name)}/verify", {})
    tiers = {
        tier: f"{t['intact']} of {t['objects']} intact, {t['damaged']} damaged, {t['missing']} missing"
        if t["checked"]
        else "could not be checked"
        for tier, t in answer["tiers"].items()
    }
    chunks = {k: answer[k] for k in ("chunks_expected", "chunks_pinned", "chunks_usable")}
    _show(answer, as_json, {"window": answer["window_name"], "ok": answer["ok"], "kv": answer["kv"], **chunks, **tiers})
    if not as_json:
        for one in answer["damaged"]:
            click.echo(f"chunk {one['chunk']} {one['hash']}: {one['state']} in {one['tier'] or 'every tier'}", err=True)
    if not answer["ok"]:
        raise SystemExit(1)


@_verb
@click.argument("name")
def delete(name: str, as_json: bool) -> None:
    """Delete the window NAME, and every KV object that nobody else holds."""
    answer = _call("DELETE", f"/admin/windows/{_part(name)}")
    _show(answer, as_json, {k: v for k, v in answer.items() if k != "warnings"})


@_verb
@click.argument("name")
@click.option("--blocks", is_flag=True, help="list every KV object")
def status(name: str, blocks: bool, as_json: bool) -> None:
    """Tell what the window NAME is and where its bytes are now."""
    query = {"include_lineage": "true", "include_blocks": "true" if blocks else None}
    answer = _call("GET", f"/admin/windows/{_part(name)}", query=query)
    cache = answer["kv_cache"]
    shown = {
        k: answer[k] for k in ("name", "session_id", "model", "token_count", "kv", "description", "tags", "created_at")
    }
    _show(
        answer,
        as_json,
        shown | {"parent": answer["lineage"]["parent"], "chunks": cache["block_count"], **_tiers(cache)},
    )


@_verb
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as-text", is_flag=True, help="leave the KV out")
def export(name: str, file: Path, as_text: bool, as_json: bool) -> None:
    """Write the window NAME into FILE, whole; FILE is there only when all of it is."""
    part = file.with_name(f"{file.name}.part")
    query = {"as_text": "true" if as_text else None}
    try:
        with part.open("wb") as out, _bar() as on_progress:
            _admin().download(f"/admin/windows/{_part(name)}/export", out, query, on_progress)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except AdminError as error:
        part.unlink(missing_ok=True)
        raise _failure(error) from error
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Failure(f"cannot write {file}: {error.strerror}") from error
    answer = {"window": name, "file": str(file), "bytes": file.stat().st_size}
    _show(answer, as_json, answer)


@_verb
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", help="the window's name here; without it, the one that it was exported under")
@click.option(
    "--as-text", is_flag=True, help="take text and ids and leave the KV: for a model that is served otherwise"
)
def import_(file: Path, name: str | None, as_text: bool, as_json: bool) -> None:
    """Make the window in FILE a window of this gateway."""
    query = {"window_name": name, "as_text": "true" if as_text else None}
    try:
        with file.open("rb") as content, _bar() as on_progress:
            size = file.stat().st_size
            answer = _admin().upload("/admin/windows/import", content, size, query, on_progress)
    except AdminError as error:
        raise _failure(error) from error
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from error
    receipt = {k: v for k, v in answer["receipt"].items() if k != "imported"}
    _show(answer, as_json, {"window": answer["name"], "kv": answer["kv"], **_flat(receipt)})


@_verb
@click.option("--tag", "tags", multiple=True, help="only with this tag; all of them if given more than once")
@click.option("--search", help="only with this text in name or description")
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--offset", type=int, default=0)
def list_(tags: tuple[str, ...], search: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List windows, newest first."""
    query = {"tags": ",".join(tags) or None, "search": search, "limit": limit, "offset": offset}
    answer = _call("GET", "/admin/windows", query=query)
    _table(
        answer,
        as_json,
        answer["windows"],
        ("name", "session_id", "model", "token_count", "size_bytes", "kv", "created_at"),
    )


@_verb
@click.option("--limit", type=int, default=1000, show_default=True, help="windows, and sessions, at most")
def tree(limit: int, as_json: bool) -> None:
    """Draw which window and which session came from which."""
    answer = _call("GET", "/admin/tree", query={"limit": limit})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for root in drawing.trees(answer["nodes"]):
        _OUT.print(root, highlight=False)
    if answer["truncated"]:
        click.echo(f"more than {limit}: {answer['windows']} windows, {answer['sessions']} sessions; --limit", err=True)


@_verb
@click.option("--state", type=click.Choice(["active", "frozen", "thawed", "expired"]))
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--offset", type=int, default=0)
def sessions(state: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List sessions, last active first."""
    answer = _call("GET", "/admin/sessions", query={"state": state, "limit": limit, "offset": offset})
    columns = ("id", "state", "model", "token_count", "turn_count", "window", "last_active_at")
    _table(answer, as_json, answer["sessions"], columns)


@_verb
def doctor(as_json: bool) -> None:
    """Prove on the running stack that sessions are isolated and that freezing can hold its word."""
    answer = _call("POST", "/admin/doctor", body={})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        for check in answer["checks"]:
            mark = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[red]failed[/]"}[check["status"]]
            _OUT.print(f"{mark:<20} {check['name']}: {check['message']}", highlight=False)
            if check["status"] != "ok" and check["remedy"]:
                _OUT.print(f"{'':<8} {check['remedy']}", highlight=False)
    if not answer["ok"]:
        raise SystemExit(1)


def _call(method: str, path: str, **arguments: Any) -> dict[str, Any]:
    try:
        return _admin().call(method, path, **arguments)
    except AdminError as error:
        raise _failure(error) from error


def _watched(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    with _bar() as on_progress:
        try:
            return _admin().watch(path, body, on_progress)
        except AdminError as error:
            raise _failure(error) from error


@contextmanager
def _bar() -> Iterator[OnProgress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_ERR, transient=True, disable=not _ERR.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(
            task, description=step["stage"], completed=step["done"], total=step["total"] or None
        )


def _failure(error: AdminError) -> Failure:
    return Failure(f"{error.message} ({error.hint})" if error.hint else error.message)


def _show(answer: Mapping[str, Any], as_json: bool, shown: Mapping[str, Any]) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")
    for warning in answer.get("warnings", ()):
        click.echo(f"warning: {warning}", err=True)


def _table(answer: Mapping[str, Any], as_json: bool, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    table = Table(*(column.replace("_", " ") for column in columns), box=None)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    _OUT.print(table)
    if answer["has_more"]:
        click.echo(f"{len(rows)} of {answer['total']}; --offset {answer['offset'] + len(rows)} shows more", err=True)


def _flat(receipt: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in receipt.items() if not isinstance(v, dict) and k != "kv"}
    return plain | {tier: f"{t['objects']} objects, {t['bytes']} bytes" for tier, t in receipt.get("tiers", {}).items()}


def _tiers(cache: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{tier['pinned']} pinned ({tier['pinned_bytes']} bytes), {tier['present']} present"
        for name, tier in cache["tiers"].items()
    }


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _part(name: str) -> str:
    return quote(name, safe="")

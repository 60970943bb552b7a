"""Commands that list windows, sessions and the cache."""

from typing import Any

import click
from rich.text import Text

from gateway.cli import connection, drawing
from gateway.cli.connection import Word, verb
from gateway.cli.output import OUT, line, print_json, say, show, table


@verb
@click.option("--tag", "tags", multiple=True, help="only windows with this tag; with all of them if repeated")
@click.option("--search", help="only windows with this text in name or description")
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--offset", type=int, default=0)
def list_(tags: tuple[str, ...], search: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List windows, newest first."""
    query = {"tags": ",".join(tags) or None, "search": search, "limit": limit, "offset": offset}
    answer = connection.call("GET", "/admin/windows", query=query)
    table(
        answer,
        as_json,
        answer["windows"],
        ("name", "session_id", "model", "token_count", "size_bytes", "kv", "created_at"),
    )


@verb
@click.option("--limit", type=int, default=1000, show_default=True, help="maximum number of windows, and of sessions")
def tree(limit: int, as_json: bool) -> None:
    """Draw the lineage of windows and sessions."""
    answer = connection.call("GET", "/admin/tree", query={"limit": limit})
    if as_json:
        print_json(answer)
        return
    for root in drawing.trees([_printable(node) for node in answer["nodes"]]):
        OUT.print(root, highlight=False)
    if answer["truncated"]:
        say(f"more than {limit}: {answer['windows']} windows, {answer['sessions']} sessions; --limit", err=True)


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _printable(part) for name, part in value.items()}
    return line(value) if isinstance(value, str) else value


@verb
@click.option("--state", type=Word(["active", "frozen", "thawed", "expired"]))
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--offset", type=int, default=0)
def sessions(state: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List sessions, last active first."""
    answer = connection.call("GET", "/admin/sessions", query={"state": state, "limit": limit, "offset": offset})
    columns = ("id", "state", "model", "token_count", "turn_count", "window", "last_active_at")
    table(answer, as_json, answer["sessions"], columns)


@verb
def doctor(as_json: bool) -> None:
    """Check that sessions are isolated and freezing works."""
    answer = connection.call("POST", "/admin/doctor", body={})
    if as_json:
        print_json(answer)
    else:
        for check in answer["checks"]:
            OUT.print(_verdict(check["status"]), Text(line(f"{check['name']}: {check['message']}")))
            if check["status"] != "ok" and check["remedy"]:
                OUT.print(Text(line(f"{'':<8} {check['remedy']}")))
    if not answer["ok"]:
        raise SystemExit(1)


def _verdict(status: str) -> Text:
    return Text(f"{status:<8}", {"ok": "green", "warning": "yellow", "failed": "red"}[status])


@verb
def cache(as_json: bool) -> None:
    """Show the content of each tier, and the cache hit rate."""
    answer = connection.call("GET", "/admin/cache")
    tiers = {
        name: f"{tier['objects']} objects, {tier['bytes']} bytes; {tier['windows']['bytes']} of windows, "
        f"{tier['sessions']['bytes']} of sessions"
        for name, tier in answer["tiers"].items()
    }
    shown = {k: answer[k] for k in ("windows", "chunk_size", "prompt_tokens", "cached_tokens", "hit_rate")}
    show(answer, as_json, {"lmcache": answer["lmcache"]["status"], **shown, **tiers})


COMMANDS = (list_, tree, sessions, cache, doctor)

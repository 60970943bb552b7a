"""Commands that list windows, sessions and the cache."""

from collections.abc import Callable, Mapping
from typing import Any

import click
from rich.text import Text
from rich.tree import Tree

from gateway.cli.connection import Word, call, operation
from gateway.cli.output import OUT, Result, line, page, say

_STYLE = {"ok": "green", "warning": "yellow", "failed": "red", "window": "bold cyan", "session": "green"}


def _paged(command: Callable[..., Result]) -> Callable[..., Result]:
    limit = click.option("--limit", type=int, default=20, show_default=True, help="maximum number of rows")
    offset = click.option("--offset", type=int, default=0, help="number of rows to skip")
    return limit(offset(command))


@operation
@click.option("--tag", "tags", multiple=True, help="only windows with this tag; with all of them if repeated")
@click.option("--search", help="only windows with this text in name or description")
@_paged
def list_(tags: tuple[str, ...], search: str | None, limit: int, offset: int) -> Result:
    """List windows, newest first."""
    query = {"tags": ",".join(tags) or None, "search": search, "limit": limit, "offset": offset}
    answer = call("GET", "/admin/windows", query=query)
    columns = ("name", "session_id", "model", "token_count", "size_bytes", "kv", "created_at")
    return page(answer, answer["windows"], *columns)


@operation
@click.option("--limit", type=int, default=1000, show_default=True, help="maximum number of windows, and of sessions")
def tree(limit: int) -> Result:
    """Draw the lineage of windows and sessions."""
    answer = call("GET", "/admin/tree", query={"limit": limit})

    def draw() -> None:
        root = Tree("", guide_style="dim", hide_root=True)
        drawn: dict[tuple[str, str], Tree] = {}
        for node in map(_printable, answer["nodes"]):  # a parent comes before its children
            parent = node["parent"]
            branch = drawn[parent["kind"], parent["name"]] if parent else root
            drawn[node["kind"], node["name"]] = branch.add(_label(node))
        OUT.print(root, highlight=False)
        if answer["truncated"]:
            say(f"more than {limit}: {answer['windows']} windows, {answer['sessions']} sessions; --limit", err=True)

    return Result(answer, then=draw)


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _printable(part) for name, part in value.items()}
    return line(value) if isinstance(value, str) else value


def _label(node: Mapping[str, Any]) -> Text:
    kind = node["kind"]
    state = f"kv {node['state']}" if kind == "window" else node["state"]
    relation = f", {node['relation']} it" if node["relation"] else ""
    text = f"  {kind}, {state}, {node['token_count']} tokens{relation}"
    return Text.assemble((node["name"], _STYLE[kind]), (text, "dim"))


@operation
@click.option("--state", type=Word(["active", "frozen", "thawed", "expired"]), help="only sessions in this state")
@_paged
def sessions(state: str | None, limit: int, offset: int) -> Result:
    """List sessions, last active first."""
    answer = call("GET", "/admin/sessions", query={"state": state, "limit": limit, "offset": offset})
    columns = ("id", "state", "model", "token_count", "turn_count", "window", "last_active_at")
    return page(answer, answer["sessions"], *columns)


@operation
def doctor() -> Result:
    """Check that sessions are isolated and freezing works."""
    answer = call("POST", "/admin/doctor", body={})

    def show() -> None:
        for check in answer["checks"]:
            status = check["status"]
            OUT.print(Text(f"{status:<8}", _STYLE[status]), Text(line(f"{check['name']}: {check['message']}")))
            if status != "ok" and check["remedy"]:
                OUT.print(Text(line(f"{'':<8} {check['remedy']}")))

    return Result(answer, then=show, ok=answer["ok"])


@operation
def cache() -> Result:
    """Show the content of each tier, and the cache hit rate."""
    answer = call("GET", "/admin/cache")
    totals = {k: answer[k] for k in ("windows", "chunk_size", "prompt_tokens", "cached_tokens", "hit_rate")}
    tiers = {
        name: f"{tier['objects']} objects, {tier['bytes']} bytes; {tier['windows']['bytes']} of windows, "
        f"{tier['sessions']['bytes']} of sessions"
        for name, tier in answer["tiers"].items()
    }
    return Result(answer, {"lmcache": answer["lmcache"]["status"], **totals, **tiers})


COMMANDS = (list_, tree, sessions, cache, doctor)

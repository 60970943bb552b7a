"""Commands that list windows and sessions, and draw where they came from."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import click
from rich.text import Text
from rich.tree import Tree

from gateway.cli.connection import Word, call, completing, operation
from gateway.cli.output import OUT, Result, Row, line, page, say, shortened, table, terminal_width
from gateway.cli.units import ago, size, until

_STYLE = {"window": "bold cyan", "session": "green"}
_SORT = {"name": "name", "created": "created_at", "tokens": "token_count", "size": "size"}
_TITLE_CELLS = 60  # in the tree, whose branches take some of the width
_MAX_NODES = 1000  # windows among which to look for those that a session was frozen into


def _paged(command: Callable[..., Result]) -> Callable[..., Result]:
    limit = click.option("--limit", type=int, default=20, show_default=True, help="maximum number of rows, up to 100")
    offset = click.option("--offset", type=int, default=0, help="number of rows to skip")
    return limit(offset(command))


@operation
@click.option("--tag", "tags", multiple=True, help="only windows with this tag; with all of them if repeated")
@click.option("--no-auto", is_flag=True, help="no windows that were frozen automatically (tag auto)")
@click.option("--search", help="only windows with this text in name, description, tags or messages")
@click.option(
    "--session", "session_id", shell_complete=completing("session"), help="only windows frozen from this session"
)
@click.option("--model", help="only windows of this model")
@click.option("--created-before", metavar="TIME", help="only older ones; a date or a time, such as 2026-11-30T18:00")
@click.option("--created-after", metavar="TIME", help="only newer ones; a date or a time")
@click.option("--sort", "sort_by", type=Word([*_SORT]), default="created", show_default=True, help="what to sort by")
@click.option("--order", "sort_order", type=Word(["asc", "desc"]), default="desc", show_default=True, help="direction")
@_paged
def list_(tags: tuple[str, ...], no_auto: bool, sort_by: str, **filters: Any) -> Result:
    """List windows, newest first."""
    excluded = "auto" if no_auto else None
    query = {"tags": ",".join(tags) or None, "without_tags": excluded, "sort_by": _SORT[sort_by], **filters}
    answer = call("GET", "/admin/windows", query=query)
    return page(answer, lambda: list(map(_window, answer["windows"])), "window", varying=("model",), note="title")


def _window(window: Mapping[str, Any]) -> Row:
    now, expires = time.time(), window["expires_at"]
    return {
        "name": window["name"],
        "session": window["session_id"],
        "model": window["model"],
        "tokens": f"{window['token_count']:,}",
        "kv": window["kv"],
        "size": size(window["size_bytes"]) if window["size_bytes"] else "",
        "created": ago(window["created_at"], now),
        "expires": "expired" if window["state"] == "expired" else until(expires, now),
        "tags": window["tags"],
        "found in": _place(window["match"]) if "match" in window else "",
        "title": _title(window),
    }


@operation
@click.option("--state", type=Word(["active", "frozen", "thawed", "expired"]), help="only sessions in this state")
@click.option("--model", help="only sessions of this model")
@_paged
def sessions(**query: Any) -> Result:
    """List sessions, last active first."""
    answer = call("GET", "/admin/sessions", query=query)
    return page(answer, lambda: _sessions(answer["sessions"]), "session", varying=("model",), note="title")


def _sessions(found: list[Mapping[str, Any]]) -> list[Row]:
    now, frozen = time.time(), _frozen_into() if found else {}
    return [
        {
            "session": one["id"],
            "state": one["state"],
            "model": one["model"],
            "tokens": f"{one['token_count']:,}",
            "turns": one["turn_count"],
            "last active": ago(one["last_active_at"], now),
            "thawed from": one["window"],
            "forked from": one["forked_from"],
            "frozen into": frozen.get(one["id"]),
            "title": _title(one),
        }
        for one in found
    ]


@operation
@click.argument("query")
@click.option("--limit", type=int, default=20, show_default=True, help="maximum number of results, up to 100")
def search(query: str, limit: int) -> Result:
    """Find windows and sessions by what was said in them."""
    answer = call("GET", "/admin/search", query={"q": query, "limit": limit})

    def show() -> None:
        if answer["results"] and not answer["all_words"]:
            say("nothing has all of these words; these have some", err=True)
        table(list(map(_result, answer["results"])), varying=("model",), note="found in")
        if not answer["results"]:
            say("nothing found", err=True)
        elif answer["truncated"]:
            say("there may be more; --limit", err=True)

    return Result(answer, then=show)


def _result(one: Mapping[str, Any]) -> Row:
    return {
        "name": one["name"],
        "kind": one["kind"],
        "state": one["state"],
        "model": one["model"],
        "tokens": f"{one['token_count']:,}",
        "created": ago(one["created_at"], time.time()),
        "title": shortened(one["title"], _TITLE_CELLS),
        "found in": _place(one["match"]),
    }


def _place(match: Mapping[str, Any]) -> str:
    """Where a text was found: `message 3, user: "... what we agreed ..."`."""
    place = match["field"] if match["message"] is None else f"message {match['message']}, {match['role']}"
    return f"{place}: {match['snippet']}"


def _title(one: Mapping[str, Any]) -> str:
    return shortened(one["title"], terminal_width() - 2)  # printed on a line of its own, after two blanks


def _frozen_into() -> dict[str, str]:
    """The newest window of each session, of the newest windows; a node comes before what was made of it later."""
    nodes = call("GET", "/admin/tree", query={"limit": _MAX_NODES})["nodes"]
    return {node["parent"]["name"]: node["name"] for node in nodes if node["relation"] == "frozen from"}


@operation
@click.option("--limit", type=int, default=1000, show_default=True, help="maximum number of windows, and of sessions")
def tree(limit: int) -> Result:
    """Draw the lineage of windows and sessions."""
    answer = call("GET", "/admin/tree", query={"limit": limit})

    def draw() -> None:
        root = Tree("", guide_style="dim", hide_root=True)
        drawn: dict[tuple[str, str], Tree] = {}
        titles: dict[tuple[str, str], str | None] = {}
        for node in map(_printable, answer["nodes"]):  # a parent comes before its children
            parent = node["parent"]
            branch = drawn[parent["kind"], parent["name"]] if parent else root
            titles[node["kind"], node["name"]] = node["title"]
            is_new = parent is None or titles[parent["kind"], parent["name"]] != node["title"]
            drawn[node["kind"], node["name"]] = branch.add(_label(node, node["title"] if is_new else None))
        OUT.print(root, highlight=False)
        if not drawn:
            say("no windows and no sessions", err=True)
        if answer["truncated"]:
            say(f"more than {limit}: {answer['windows']} windows, {answer['sessions']} sessions; --limit", err=True)

    return Result(answer, then=draw)


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _printable(part) for name, part in value.items()}
    return line(value) if isinstance(value, str) else value


def _label(node: Mapping[str, Any], title: str | None) -> Text:
    """A node, with its title below it unless that is its parent's too."""
    kind = node["kind"]
    state = f"kv {node['state']}" if kind == "window" else node["state"]
    text = f"  {kind}, {state}, {node['token_count']:,} tokens{_origin(node)}"
    below = f"\n  {shortened(title, _TITLE_CELLS)}" if title else ""
    return Text.assemble((node["name"], _STYLE[kind]), (text, "dim"), below)


def _origin(node: Mapping[str, Any]) -> str:
    if node["parent"]:
        return f", {node['relation']} it"
    missing = node.get("missing_parent")
    return f", from {missing['kind']} {missing['name']} (not shown)" if missing else ""


COMMANDS = (list_, search, sessions, tree)

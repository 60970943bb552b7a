"""Verbs that tell what is there."""

import click

from gateway import drawing
from gateway.cli import asking as gateway
from gateway.cli.asking import Word, verb
from gateway.cli.showing import OUT, print_json, show, table


@verb
@click.option("--tag", "tags", multiple=True, help="only with this tag; all of them if given more than once")
@click.option("--search", help="only with this text in name or description")
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--offset", type=int, default=0)
def list_(tags: tuple[str, ...], search: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List windows, newest first."""
    query = {"tags": ",".join(tags) or None, "search": search, "limit": limit, "offset": offset}
    answer = gateway.call("GET", "/admin/windows", query=query)
    table(
        answer,
        as_json,
        answer["windows"],
        ("name", "session_id", "model", "token_count", "size_bytes", "kv", "created_at"),
    )


@verb
@click.option("--limit", type=int, default=1000, show_default=True, help="windows, and sessions, at most")
def tree(limit: int, as_json: bool) -> None:
    """Draw which window and which session came from which."""
    answer = gateway.call("GET", "/admin/tree", query={"limit": limit})
    if as_json:
        print_json(answer)
        return
    for root in drawing.trees(answer["nodes"]):
        OUT.print(root, highlight=False)
    if answer["truncated"]:
        click.echo(f"more than {limit}: {answer['windows']} windows, {answer['sessions']} sessions; --limit", err=True)


@verb
@click.option("--state", type=Word(["active", "frozen", "thawed", "expired"]))
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--offset", type=int, default=0)
def sessions(state: str | None, limit: int, offset: int, as_json: bool) -> None:
    """List sessions, last active first."""
    answer = gateway.call("GET", "/admin/sessions", query={"state": state, "limit": limit, "offset": offset})
    columns = ("id", "state", "model", "token_count", "turn_count", "window", "last_active_at")
    table(answer, as_json, answer["sessions"], columns)


@verb
def doctor(as_json: bool) -> None:
    """Prove on the running stack that sessions are isolated and that freezing can hold its word."""
    answer = gateway.call("POST", "/admin/doctor", body={})
    if as_json:
        print_json(answer)
    else:
        for check in answer["checks"]:
            mark = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[red]failed[/]"}[check["status"]]
            OUT.print(f"{mark:<20} {check['name']}: {check['message']}", highlight=False)
            if check["status"] != "ok" and check["remedy"]:
                OUT.print(f"{'':<8} {check['remedy']}", highlight=False)
    if not answer["ok"]:
        raise SystemExit(1)


@verb
def cache(as_json: bool) -> None:
    """Tell what lies in each tier and for whom, and how much of the prompts was cached."""
    answer = gateway.call("GET", "/admin/cache")
    tiers = {
        name: f"{tier['objects']} objects, {tier['bytes']} bytes; {tier['windows']['bytes']} of windows, "
        f"{tier['sessions']['bytes']} of sessions"
        for name, tier in answer["tiers"].items()
    }
    shown = {k: answer[k] for k in ("windows", "chunk_size", "prompt_tokens", "cached_tokens", "hit_rate")}
    show(answer, as_json, {"lmcache": answer["lmcache"]["status"], **shown, **tiers})


COMMANDS = (list_, tree, sessions, cache, doctor)

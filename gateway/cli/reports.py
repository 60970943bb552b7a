"""Commands that report on the whole gateway: health, self-test, cache, metrics."""

import time
from collections.abc import Mapping
from typing import Any

import click
from rich.text import Text

from gateway.cli import receipts
from gateway.cli.connection import call, operation
from gateway.cli.hints import translate_hint
from gateway.cli.output import OUT, Result, Row, filled, line, say, table
from gateway.cli.units import about, at, counted, share, size

_STYLE = {
    "ok": "green", "warning": "yellow", "failed": "red", "healthy": "green", "degraded": "yellow", "unhealthy": "red"
}  # fmt: skip


@operation
def doctor() -> Result:
    """Check that sessions are isolated and freezing works.

    Exit code 1 if a check failed, or if it was not seen that windows keep KV.
    """
    answer = call("POST", "/admin/doctor", body={})

    def show() -> None:
        for check in answer["checks"]:
            _show_check(check["status"], check["name"], check["message"], check["remedy"])
        if answer["keeps_kv"] is None:
            _show_check("warning", "freezing", "whether windows keep KV here could not be tested")
        elif not answer["keeps_kv"]:
            _show_check("failed", "freezing", "windows cannot keep KV here, only text and token ids")

    return Result(answer, then=show, ok=answer["ok"])


@operation
def health() -> Result:
    """Show the state of each component; exit code 1 if unhealthy."""
    answer = call("GET", "/admin/health")

    def show() -> None:
        for name, component in answer["components"].items():
            _show_check(component["status"], name, component["message"])

    return Result(answer, then=show, ok=answer["status"] != "unhealthy")


def _show_check(status: str, name: str, message: str, remedy: str = "") -> None:
    OUT.print(Text(f"{status:<8}", _STYLE[status]), Text(line(f"{name}: {message}")))
    if status != "ok" and remedy:
        say(f"{'':<9}{line(translate_hint('', remedy))}")


@operation
def cache() -> Result:
    """Show the content of each tier, and the cache hit rate."""
    answer = call("GET", "/admin/cache")
    cached = share(answer["cached_tokens"], answer["prompt_tokens"], "prompt token")
    lines = {
        "lmcache": answer["lmcache"]["status"],
        "chunk size": f"{answer['chunk_size']} tokens" if answer["chunk_size"] else "",
        "windows": f"{answer['windows']:,}",
        "cached": f"{cached} since the gateway started",
    }

    def show() -> None:
        if answer["tiers"]:
            say("")
            table([_tier(name, tier) for name, tier in answer["tiers"].items()])
        if len(answer["nodes"]) > 1:
            say("")
            table([_node(node) for node in answer["nodes"]])

    return Result(answer, filled(lines), then=show)


def _tier(name: str, tier: Mapping[str, Any]) -> Row:
    """One tier: a durable one says whose its bytes are, LMCache's memory how many it can hold, an engine its tokens."""
    if "usage" in tier:
        held = f"{tier['usage']:.0%} of {tier['capacity_tokens']:,} tokens in use"
    else:
        held = size(tier["bytes"]) + (f" of {size(tier['capacity_bytes'])}" if "capacity_bytes" in tier else "")
    owners = ("windows", "sessions", "forgotten", "unknown")
    bytes_of = {owner: tier[owner]["bytes"] for owner in owners if owner in tier}
    shares = {f"of {owner}": size(bytes_of[owner]) if bytes_of.get(owner) else "" for owner in owners}
    counted = name if tier.get("listed", True) else f"{name} (pins)"
    return {"tier": counted, "size": held, "objects": f"{tier['objects']:,}" if "objects" in tier else "", **shares}


def _node(node: Mapping[str, Any]) -> Row:
    """One cache of several: its engines, and what is in its memory."""
    memory = node["memory"]
    return {
        "cache": node["url"],
        "status": node["status"],
        "memory": f"{size(memory['bytes'])} of {size(memory['capacity_bytes'])}" if memory else "",
        "objects": f"{memory['objects']:,}" if memory else "",
        "engines": node["engines"],
    }


@operation
@click.option("--limit", type=int, default=10, show_default=True, help="how many windows, and how many sessions")
def saved(limit: int) -> Result:
    """Show what the cache has saved, and what windows hold.

    Tokens are counted, times are estimated from what the engine takes for prompts that it computes.
    """
    answer = call("GET", "/admin/ledger", query={"limit": limit})
    held = answer["held"]
    hours = f"{size(held['bytes'])} now, {size(int(held['byte_hours']))} x hours since" if held["since"] else ""
    lines = {
        "saved": receipts.saved(answer["total"])
        or f"nothing yet ({answer['total']['reason'] or 'no token was found'})",
        "turns": receipts.saved(answer["turns"]),
        "thaws": receipts.saved(answer["thaws"]),
        "asks": receipts.saved(answer["asks"]),
        "since": at(answer["since"], time.time()),
        "windows hold": f"{hours} {at(held['since'], time.time())}" if hours else "",
    }

    def show() -> None:
        for kind, name in (("windows", "name"), ("sessions", "id")):
            if rows := [{kind[:-1]: one[name], **_saved(one["saved"])} for one in answer[kind]]:
                say("")
                table(rows)

    return Result(answer, filled(lines), then=show)


def _saved(saved: Mapping[str, Any]) -> Row:
    seconds = saved["seconds_estimated"]
    return {
        "requests": f"{saved['requests']:,}",
        "from the cache": counted(saved["tokens"], "token"),
        "to compute them": "not known yet" if seconds is None else about(seconds),
    }


@operation
def metrics() -> Result:
    """Print the gateway's metrics, which Prometheus scrapes."""
    answer = call("GET", "/admin/metrics")
    rows = [
        {"metric": one["name"], "labels": [f"{k}={v}" for k, v in one["labels"].items()], "value": f"{one['value']:,g}"}
        for one in answer["metrics"]
    ]
    return Result(answer, then=lambda: table(rows))


COMMANDS = (doctor, health, cache, saved, metrics)

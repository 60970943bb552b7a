"""How answers are shown: as lines and tables, or with `--json` as they came."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table

# A pipe has no width: a name that is cut is of no use to the next program.
OUT = Console() if sys.stdout.isatty() else Console(width=10_000)


def print_json(answer: Mapping[str, Any]) -> None:
    """The answer as it came."""
    click.echo(json.dumps(answer, indent=2))


def warn(answer: Mapping[str, Any]) -> None:
    """What did not go as it should, on stderr."""
    for warning in answer.get("warnings", ()):
        click.echo(f"warning: {warning}", err=True)


def show(answer: Mapping[str, Any], as_json: bool, shown: Mapping[str, Any]) -> None:
    """A line for each value of `shown`, and the warnings."""
    if as_json:
        print_json(answer)
        return
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")
    warn(answer)


def table(answer: Mapping[str, Any], as_json: bool, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """A table of `rows`, which are a page of the answer."""
    if as_json:
        print_json(answer)
        return
    drawn = Table(*(column.replace("_", " ") for column in columns), box=None)
    for row in rows:
        drawn.add_row(*(_cell(row[column]) for column in columns))
    OUT.print(drawn)
    if answer["has_more"]:
        click.echo(f"{len(rows)} of {answer['total']}; --offset {answer['offset'] + len(rows)} shows more", err=True)


def flat(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt without what is nested in it but the tiers."""
    plain = {k: v for k, v in receipt.items() if not isinstance(v, dict) and k != "kv"}
    return plain | {tier: f"{t['objects']} objects, {t['bytes']} bytes" for tier, t in receipt.get("tiers", {}).items()}


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

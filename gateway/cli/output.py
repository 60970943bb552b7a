"""Print answers as lines and tables, or unchanged with `--json`."""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A pipe has no width: a name that is cut is of no use to the next program.
OUT = Console() if sys.stdout.isatty() else Console(width=10_000)


def printable(text: str) -> str:
    """The text with its control characters spelled out, but for tabs and ends of lines.

    What is shown was said by models and clients, and a terminal obeys such characters: they clear it, rename it, fill
    the clipboard.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


def line(value: object) -> str:
    """The text of a value, printable and on one line."""
    return printable(" ".join(str(value).splitlines()))


def say(text: object, *, err: bool = False) -> None:
    """Print a text, on stderr if `err`."""
    click.echo(printable(str(text)), err=err)


def print_json(answer: Mapping[str, Any]) -> None:
    """The answer as it came. JSON in ASCII spells control characters out, all but one."""
    click.echo(json.dumps(answer, indent=2).replace("\x7f", "\\u007f"))


def warn(answer: Mapping[str, Any]) -> None:
    """What did not go as it should, on stderr."""
    for warning in answer.get("warnings", ()):
        say(f"warning: {warning}", err=True)


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
        drawn.add_row(*(Text(_cell(row[column])) for column in columns))  # a string would be read as markup
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
    return ", ".join(map(line, value)) if isinstance(value, list) else line(value)

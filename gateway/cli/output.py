"""Print results as lines and tables, or as JSON."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A pipe has no width: a truncated name is of no use to the next program.
OUT = Console() if sys.stdout.isatty() else Console(width=10_000)


@dataclass(frozen=True, slots=True)
class Result:
    """A command's result: the admin API's answer, and what is printed of it unless `--json` is given.

    `lines` are names and values, `then` prints what follows them. The exit code is 1 unless `ok`, or with an `error`.
    """

    answer: Mapping[str, Any]
    lines: Mapping[str, Any] = field(default_factory=dict)
    then: Callable[[], None] | None = None
    ok: bool = True
    error: str = ""

    def show(self, *, as_json: bool) -> None:
        """Print it. Raises SystemExit if it is an error."""
        if as_json:  # JSON in ASCII escapes all control characters but one
            click.echo(json.dumps(self.answer, indent=2).replace("\x7f", "\\u007f"))
        else:
            self._show_text()
        if self.error:
            say(f"error: {self.error}", err=True)
        if self.error or not self.ok:
            raise SystemExit(1)

    def _show_text(self) -> None:
        width = max(map(len, self.lines), default=0)
        for name, value in self.lines.items():
            click.echo(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")
        if self.then:
            self.then()
        for warning in self.answer.get("warnings", ()):
            say(f"warning: {warning}", err=True)


def printable(text: str) -> str:
    """The text with its control characters escaped, except tabs and line feeds.

    Models and clients write what is printed, and a terminal obeys such characters: they clear it, rename it, fill the
    clipboard.
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n"))


def line(value: object) -> str:
    """The text of a value, printable and on one line."""
    return printable(" ".join(str(value).splitlines()))


def say(text: object, *, err: bool = False) -> None:
    """Print a text, on stderr if `err`."""
    click.echo(printable(str(text)), err=err)


def page(answer: Mapping[str, Any], rows: list[dict[str, Any]], *columns: str) -> Result:
    """A table of `rows`, which are a page of the answer."""

    def show() -> None:
        table = Table(*(column.replace("_", " ") for column in columns), box=None)
        for row in rows:
            table.add_row(*(Text(_cell(row[column])) for column in columns))  # a string would be read as markup
        OUT.print(table)
        if answer["has_more"]:
            say(f"{len(rows)} of {answer['total']}; --offset {answer['offset'] + len(rows)} shows more", err=True)

    return Result(answer, then=show)


def flat(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt's plain values, and a summary of each tier."""
    plain = {k: v for k, v in receipt.items() if not isinstance(v, dict) and k != "kv"}
    return plain | {tier: f"{t['objects']} objects, {t['bytes']} bytes" for tier, t in receipt.get("tiers", {}).items()}


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return ", ".join(map(line, value)) if isinstance(value, list) else line(value)

"""Print results as lines and tables, or as JSON."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from gateway.cli.units import counted

Row = Mapping[str, Any]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What is printed is never cut or folded to the terminal's width: a name that is cut cannot be copied.
OUT = Console(width=10_000, height=100)  # without a height it would ask the terminal for both


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
            click.echo(f"{name:<{width}}  {cell(value)}")
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


def say_messages(answer: Mapping[str, Any]) -> None:
    """Print a transcript, each turn under its number."""
    turn = None
    for message in answer["messages"]:
        if message["turn"] != turn:
            turn = message["turn"]
            say(f"--- turn {turn}{'' if turn <= answer['turns'] else ', not finished'}")
        say(f"{message.get('role', '?')}: {message.get('content')}")


def cell(value: Any) -> str:
    """A value in a line or a table."""
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(line, value)) if isinstance(value, list) else line(value)


def filled(lines: Row) -> dict[str, Any]:
    """The lines that have a value."""
    return {name: value for name, value in lines.items() if cell(value) != "-"}


def page(
    answer: Mapping[str, Any], rows: Callable[[], Sequence[Row]], noun: str, *, varying: Collection[str] = (),
    note: str = "",
) -> Result:  # fmt: skip
    """A table of the rows that `rows` returns, which are a page of the answer's `noun`s; see `table`.

    In a pipe `note` is a column as any other: a row is one line there.
    """

    def show() -> None:
        shown = rows()
        table(shown, varying=varying, note=note if sys.stdout.isatty() else "")
        total, end = answer["total"], answer["offset"] + len(shown)
        if not shown:
            say(f"--offset skips all of {counted(total, noun)}" if total else f"no {noun}s", err=True)
        elif answer["has_more"]:
            say(f"{len(shown)} of {total}; --offset {end} shows more", err=True)

    return Result(answer, then=show)


def table(rows: Sequence[Row], *, varying: Collection[str] = (), note: str = "") -> None:
    """Print rows under the names of their columns, or each row in several lines where the terminal is too narrow.

    Columns without any value are left out, and those in `varying` where all rows have the same. The value of the column
    `note` is printed below its row.
    """
    columns = [name for name in rows[0] if name != note and _is_shown(name, rows, varying)] if rows else []
    cells = [[cell(row[name]) for name in columns] for row in rows]
    widths = [max(map(cell_len, values)) for values in zip(columns, *cells, strict=True)]
    is_narrow = sum(widths) + 2 * len(widths) - 2 > terminal_width()
    if rows and not is_narrow:
        OUT.print(Text(_aligned(columns, widths), "bold"))
    for row, values in zip(rows, cells, strict=True):
        say(_stacked(columns, values) if is_narrow else _aligned(values, widths))
        if note and row[note]:
            say(f"  {line(row[note])}")


def shortened(text: str | None, width: int) -> str:
    """A text that need not be whole, in at most so many columns of a terminal; nothing for None."""
    shown = line(text or "")
    return shown if cell_len(shown) <= width else set_cell_size(shown, width - 1).rstrip() + "…"


def _is_shown(name: str, rows: Sequence[Row], varying: Collection[str]) -> bool:
    values = {cell(row[name]) for row in rows}
    return len(values) > 1 if name in varying else values != {"-"}


def _aligned(values: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(map(set_cell_size, values, widths)).rstrip()


def _stacked(columns: Sequence[str], values: Sequence[str]) -> str:
    """The first value, and below it the others with their names; lines are broken only between two of them."""
    lines = [values[0], ""]
    for name, value in zip(columns[1:], values[1:], strict=True):
        if value == "-":
            continue
        longer = f"{lines[-1]} · {name} {value}" if lines[-1] else f"  {name} {value}"
        if cell_len(longer) > terminal_width() and lines[-1]:
            lines.append(f"  {name} {value}")
        else:
            lines[-1] = longer
    return "\n".join(lines).rstrip()


def terminal_width() -> int:
    """Columns of the terminal. A pipe has no width: what is wrapped is of no use to the next program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize

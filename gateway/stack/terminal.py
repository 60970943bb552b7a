"""Progress output of `cwg up`: a spinner on a terminal, plain lines in a file. All on stderr."""

from rich.console import Console
from rich.status import Status
from rich.text import Text


class Terminal:
    """Prints permanent lines, and at most one that is updated in place."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._moving: Status | None = None
        self._last = ""

    def waiting(self, what: str) -> None:
        """Show what is in progress."""
        if what == self._last:
            return
        self._last = what
        if not self._console.is_terminal:
            self.say(what)
        elif self._moving:
            self._moving.update(Text(what))
        else:
            self._moving = self._console.status(Text(what))
            self._moving.start()

    def settled(self) -> None:
        """Stop showing progress."""
        self._last = ""
        if self._moving:
            self._moving.stop()
            self._moving = None

    def say(self, line: str, style: str = "") -> None:
        """Print a permanent line."""
        self._console.print(Text(line), style=style, soft_wrap=True)

    def quote(self, lines: str) -> None:
        """Print the output of a process, indented."""
        for line in lines.splitlines():
            self._console.print(Text(f"    | {line}"), style="dim", soft_wrap=True)

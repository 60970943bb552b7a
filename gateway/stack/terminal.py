"""Progress output of `cwg up`: a spinner on a terminal, plain lines in a file. All on stderr."""

from rich.console import Console
from rich.status import Status
from rich.text import Text


class Terminal:
    """Lines that stay, and at most one that moves."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._moving: Status | None = None
        self._last = ""

    def waiting(self, what: str) -> None:
        """What is going on now."""
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
        """Nothing is going on that one would wait for."""
        self._last = ""
        if self._moving:
            self._moving.stop()
            self._moving = None

    def say(self, line: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(Text(line), style=style, soft_wrap=True)

    def quote(self, lines: str) -> None:
        """The words of a part, set off from ours."""
        for line in lines.splitlines():
            self._console.print(Text(f"    | {line}"), style="dim", soft_wrap=True)

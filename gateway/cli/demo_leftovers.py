"""Remove what `cwg demo` has made, however it ends, or say what may be left."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gateway.cli.admin_client import Admin, AdminError
from gateway.cli.connection import window_path
from gateway.cli.output import say
from gateway.records import AUTO_TAG

_BUSY_TRIES = 6  # of a deletion, each of which waits for a turn in progress for `busy_wait_s`
_GONE = ("session_not_found", "window_not_found")


class Leftovers:
    """The sessions and windows of one demo. `is_back` waits for a gateway that does not answer, if it comes back."""

    def __init__(self, admin: Admin, show: Callable[[str], None], is_back: Callable[[], bool]) -> None:
        self._admin = admin
        self._show = show
        self._is_back = is_back
        self._sessions: list[str] = []
        self._windows: list[str] = []
        self._commands: dict[str, str] = {}  # that remove what is left, by path

    def session(self, name: str) -> str:
        """Note a session before it exists, so that it is removed whenever the user interrupts."""
        self._sessions.append(name)
        self._commands[f"/admin/sessions/{name}"] = f"cwg session delete {name}"
        return name

    def window(self, name: str) -> str:
        """Note a window before it exists."""
        self._windows.append(name)
        self._commands[window_path(name)] = f"cwg delete {name}"
        return name

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Remove everything when the block ends, and warn of what could not be."""
        try:
            yield
        finally:
            self._show("removing what the demo has made")
            why = "interrupted"
            try:
                why = self._remove()
            finally:
                if self._commands:
                    commands = ", ".join(f"`{command}`" for command in self._commands.values())
                    removes = "removes it" if len(self._commands) == 1 else "remove it"
                    say(f"warning: {why}: some of what the demo has made may be left; {commands} {removes}", err=True)

    def _remove(self) -> str:
        """Remove what can be removed; return why the rest cannot."""
        why = ""
        try:
            for name in self._sessions:
                why = self._delete(f"/admin/sessions/{name}") or why
            for name in [*self._windows, *self._automatic_windows()]:
                why = self._delete(window_path(name)) or why
        except AdminError as error:
            return error.message
        return why

    def _automatic_windows(self) -> list[str]:
        names: list[str] = []
        for session in self._sessions:
            query = {"session_id": session, "tags": AUTO_TAG}  # what others froze from it is theirs
            page = self._admin.call("GET", "/admin/windows", query=query)
            names += [window["name"] for window in page["windows"] if window["name"] not in self._windows]
        return names

    def _delete(self, path: str) -> str:
        """Delete one; return why it cannot be. Raises AdminError if nothing can be deleted."""
        for _ in range(_BUSY_TRIES):
            try:
                self._admin.call("DELETE", path)
            except AdminError as error:
                if error.code == "session_busy":
                    continue
                if error.code == "gateway_unreachable":
                    if not self._is_back():
                        raise
                    continue
                if error.code not in _GONE:
                    return error.message
            self._commands.pop(path, None)
            return ""
        return f"{path} is still busy"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A first Ctrl-C or SIGTERM takes effect when the block ends, a second at once.

    The gateway goes on with what it was asked for, also when nobody waits for the answer: what it makes then could not
    be removed.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt

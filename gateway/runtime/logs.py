"""Log formatting: text from outside stays on its line and cannot control a terminal."""

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}
_INDENT = "  "

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class SafeFormatter(logging.Formatter):
    """Escapes control characters and indents tracebacks, so that no text can pass for a log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format all but the traceback."""
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:
        """Format a traceback, whose last lines may quote what a client sent."""
        return "\n".join(_INDENT + escaped(line) for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """One JSON object in each line. `about` gives the fields that say what the line is about, such as `request_id`."""

    def __init__(self, about: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """Format all of it."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **self._about(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line).replace("\x7f", "\\u007f")  # all other control characters are escaped


def escaped(text: str) -> str:
    """The text with every control character written out."""
    return text if text.isprintable() else text.translate(_CONTROL)

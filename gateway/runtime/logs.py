"""Log formatting: text from outside stays on its line and cannot control a terminal."""

import logging
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


def escaped(text: str) -> str:
    """The text with every control character written out."""
    return text if text.isprintable() else text.translate(_CONTROL)

"""Lines of the log: one for each event, whatever a client sends."""

import logging
import sys

from gateway.runtime.logs import SafeFormatter

FORGED = "x\n2026-11-30 12:00:00 CRITICAL gateway.app: forged\r\x1b[2J\x9b31m\u2028"


def test_message_stays_on_its_line_and_is_escaped() -> None:
    record = logging.LogRecord("gateway", logging.INFO, "", 0, "asked for %s", (FORGED,), None)
    line = SafeFormatter("%(levelname)s %(message)s").format(record)
    assert line.isprintable()
    assert line.startswith("INFO asked for x\\x0a2026")


def test_traceback_is_indented_and_keeps_its_lines() -> None:
    try:
        int(FORGED)
    except ValueError:
        record = logging.LogRecord("gateway", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    first, *rest = SafeFormatter("%(message)s").format(record).split("\n")
    assert first == "failed"
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def test_ordinary_text_is_not_escaped() -> None:
    record = logging.LogRecord("gateway", logging.INFO, "", 0, "Grüße 日本 🎉", (), None)
    assert SafeFormatter("%(message)s").format(record) == "Grüße 日本 🎉"

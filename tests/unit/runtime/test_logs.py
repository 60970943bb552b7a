"""Lines of the log: one for each event, whatever a client sends."""

import json
import logging
import sys
from datetime import UTC, datetime

from gateway.runtime.logs import JsonFormatter, SafeFormatter

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


def test_json_has_one_object_a_line_and_what_it_is_about() -> None:
    try:
        int(FORGED)
    except ValueError:
        record = logging.LogRecord("gateway.x", logging.ERROR, "", 0, "of %s\ud800\x7f", (FORGED,), sys.exc_info())
    line = JsonFormatter(lambda: {"request_id": "r\x9b", "trace_id": "t"}).format(record)
    assert line.isascii()
    assert line.isprintable()
    told = json.loads(line)
    assert (told["level"], told["logger"]) == ("error", "gateway.x")
    assert told["message"].startswith("of x\n2026")
    assert (told["request_id"], told["trace_id"]) == ("r\x9b", "t")
    assert told["exception"].startswith("Traceback")
    assert datetime.fromisoformat(told["time"]).tzinfo is UTC

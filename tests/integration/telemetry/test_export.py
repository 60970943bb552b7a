"""A collector that is down, slow or refuses harms no request, is logged once, and what is lost is counted."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.integration.telemetry.conftest import Parent, StartTraced
from tests.support.collector import Collector, collector
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import ROOT, Gateway, eventually, free_port


def spans_of(gateway: Gateway) -> dict[str, float]:
    """How many spans were exported, failed and were dropped."""
    rows = gateway.http.get("/admin/metrics").json()["metrics"]
    return {row["labels"]["result"]: row["value"] for row in rows if row["name"] == "cwg_spans_total"}


@pytest.fixture
def spans() -> Iterator[Collector]:
    """A collector of the test's own."""
    with collector() as listening:
        yield listening


@pytest.mark.parametrize("status", [400, 403, 413])
def test_refusals_are_logged_once_and_counted(
    spans: Collector, start_traced: StartTraced, parent: Parent, session: str, status: int
) -> None:
    spans.answer = lambda: status
    gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": f"http://user:secret@{spans.url[7:]}"})
    for number in range(3):
        assert gateway.chat(f"{session}-{number}").status_code == 200
        count = 2 * (number + 1)
        eventually(lambda count=count: spans_of(gateway).get("failed", 0) >= count, "they have failed")  # type: ignore[misc]
    lines = [line for line in gateway.log.splitlines() if "spans are lost" in line]
    assert len(lines) == 1
    assert str(status) in lines[0]
    assert "secret" not in gateway.log
    assert "opentelemetry" not in gateway.log
    spans.answer = lambda: 200
    gateway.chat(session, headers=parent.header())
    spans.wait(parent.trace, f"chat {MODEL}", "POST /v1/chat/completions")
    eventually(lambda: "traces are exported again" in gateway.log, "it is said that it is over")
    assert f"{spans_of(gateway)['failed']:g} spans were lost" in gateway.log


def test_collector_that_is_down_delays_no_request(start_traced: StartTraced, session: str) -> None:
    variables = {"EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}", "EXPORTER_OTLP_TIMEOUT": "1"}
    small = {"BSP_MAX_QUEUE_SIZE": "4", "BSP_MAX_EXPORT_BATCH_SIZE": "2"}
    gateway = start_traced({**variables, **small})
    for number in range(20):
        assert gateway.chat(f"{session}-{number}").status_code == 200
    eventually(lambda: sum(spans_of(gateway).values()) >= 40, "each span is accounted for", more=lambda: gateway.log)
    assert spans_of(gateway).keys() == {"failed", "dropped"}
    assert gateway.log.count("spans are lost") == 1
    assert gateway.stop() == 0


def test_collector_that_never_answers_holds_up_neither_requests_nor_the_end(
    spans: Collector, start_traced: StartTraced, session: str
) -> None:
    release = threading.Event()
    spans.answer = lambda: 200 if release.wait(100) else 500
    small = {"BSP_MAX_QUEUE_SIZE": "4", "BSP_MAX_EXPORT_BATCH_SIZE": "2", "EXPORTER_OTLP_TIMEOUT": "60"}
    gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": spans.url, **small})
    for number in range(10):
        assert gateway.chat(f"{session}-{number}").status_code == 200
    eventually(lambda: spans_of(gateway).get("dropped", 0) >= 10, "what does not fit is dropped")
    assert gateway.stop() == 0
    assert "not every span was exported" in gateway.log
    release.set()


def test_last_spans_are_exported_at_the_end(
    spans: Collector, start_traced: StartTraced, parent: Parent, session: str
) -> None:
    gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": spans.url, "BSP_SCHEDULE_DELAY": "600000"})
    gateway.chat(session, headers=parent.header())
    assert gateway.stop() == 0
    assert {span.name for span in spans.of(parent.trace)} >= {"POST /v1/chat/completions", f"chat {MODEL}"}


def test_something_else_that_listens_there_is_reported(start_traced: StartTraced, session: str) -> None:
    """It closes every connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Thread(target=_close_all, args=[listener], daemon=True)
        closing.start()
        port = listener.getsockname()[1]
        gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "EXPORTER_OTLP_TIMEOUT": "1"})
        assert gateway.chat(session).status_code == 200
        eventually(lambda: spans_of(gateway).get("failed", 0) >= 2, "they have failed", more=lambda: gateway.log)
        assert gateway.log.count("spans are lost") == 1
        assert gateway.stop() == 0


def _close_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.close()


def test_wrong_variable_stops_the_start(start_traced: StartTraced) -> None:
    with pytest.raises(AssertionError, match="error: OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        start_traced({"EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_sdk_is_not_imported_when_tracing_is_off() -> None:
    code = "import sys, gateway.app, gateway.cli; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- the log as JSON


def test_every_line_is_json_uvicorns_too(start_traced: StartTraced, spans: Collector, session: str) -> None:
    gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": spans.url}, log_format="json", log_level="debug")
    gateway.chat(session)
    assert gateway.stop() == 0
    lines = [json.loads(line) for line in gateway.log.splitlines()]
    assert {"time", "level", "logger", "message", "pid"} <= set.intersection(*map(set, lines))
    assert {"uvicorn.error", "gateway.app"} <= {line["logger"] for line in lines}


def test_lines_of_a_request_have_its_ids(
    engine: FakeEngine, start_traced: StartTraced, parent: Parent, session: str
) -> None:
    """Without tracing they have the trace that the client has begun."""
    full = {"error": {"message": "This model's maximum context length is 10 tokens."}}
    engine.on_chat = lambda exchange: exchange.json(full, 400)
    gateway = start_traced({}, log_format="json", on_full="successor")
    assert gateway.chat(session, headers={"x-request-id": "r-7", **parent.header("00")}).status_code == 400
    assert gateway.chat(session).status_code == 400
    lines = [json.loads(line) for line in gateway.log.splitlines()]
    first, second = (line for line in lines if "is full and cannot continue" in line["message"])
    assert (first["request_id"], first["trace_id"], "span_id" in first) == ("r-7", parent.trace, False)
    assert len(second["request_id"]) == 16
    assert "trace_id" not in second
    assert "request_id" not in lines[0]

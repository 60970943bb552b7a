"""Spans without a collector: whose child they are, what samples them, and what they may say."""

import asyncio

import pytest

from gateway.errors import GatewayError
from gateway.telemetry.trace_context import Span, TraceParent, current, log_fields, parse
from gateway.telemetry.trace_options import Sampler
from gateway.telemetry.traces import Traces, clean

PARENT = TraceParent(2**100, 7, sampled=True)


class Kept:
    """A sink that keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def write(self, span: Span, ended_ns: int) -> None:
        """See `SpanSink.write`."""
        assert ended_ns >= span.started_ns
        self.spans.append(span)


def traces(share: float = 1.0, *, follows_parent: bool = True) -> tuple[Traces, list[Span]]:
    kept = Kept()
    return Traces(kept, Sampler(share, follows_parent)), kept.spans


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_parent_decides_whatever_the_share(share: float) -> None:
    made, _ = traces(share)
    span = made.begin_request("POST", PARENT)
    assert span is not None
    assert (span.trace_id, span.parent_id, span.is_remote) == (2**100, 7, True)
    assert made.begin_request("GET", PARENT) is not None
    assert made.begin_request("POST", TraceParent(2**100, 7, sampled=False)) is None


def test_without_a_parent_the_share_decides_and_reading_is_not_traced() -> None:
    made, _ = traces(1.0)
    assert made.begin_request("POST", None) is not None
    assert made.begin_request("GET", None) is None
    assert traces(0.0)[0].begin_request("POST", None) is None
    assert traces(0.0, follows_parent=False)[0].begin_request("POST", PARENT) is None


def test_steps_are_children_and_end_with_the_error_that_they_raise() -> None:
    made, spans = traces()
    whole = made.begin_request("POST", None)
    assert whole is not None

    def fail(whole: Span) -> None:
        with made.opened(whole), made.step("outer") as seen, made.step("inner"):
            seen["n"] = 1
            assert log_fields()["span_id"] != f"{whole.span_id:016x}"
            raise GatewayError("not_found", "the text of a client")

    with pytest.raises(GatewayError):
        fail(whole)
    _, outer, first = spans
    assert [span.parent_id for span in spans] == [outer.span_id, first.span_id, 0]
    assert {span.error for span in spans} == {"not_found"}
    assert outer.attributes == {"n": 1}
    assert current() is None


@pytest.mark.anyio
async def test_a_cancelled_step_is_over() -> None:
    made, spans = traces()

    async def wait() -> None:
        span = made.begin_request("POST", None)
        assert span is not None
        with made.opened(span):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [span.error for span in spans] == ["cancelled"]


def test_automatic_work_is_a_trace_of_its_own_with_a_link() -> None:
    made, spans = traces(0.0)
    cause = made.begin_request("POST", PARENT)
    with made.automatic("expiry", None, {}), made.step("delete"):
        assert parse(made.engine_headers()["traceparent"].encode()) is not None
        assert made.engine_headers()["traceparent"].endswith("-00")
    assert spans == []
    with made.automatic("freeze", cause, {"why": "idle"}), made.step("pin"):
        assert made.engine_headers()["traceparent"].endswith("-01")
    assert [(span.name, span.link) for span in spans] == [("pin", None), ("freeze", cause)]
    assert cause is not None
    assert spans[0].trace_id == spans[1].trace_id != cause.trace_id


def test_tracing_that_is_off_makes_nothing() -> None:
    off = Traces()
    with off.automatic("freeze", None, {}), off.step("pin") as seen:
        seen["n"] = 1
        assert current() is None
        assert off.child("x") is None
    assert off.engine_headers() == {}
    assert not off.on


def test_a_sink_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def write(self, span: Span, ended_ns: int) -> None:
            raise OSError(span.name)

    made = Traces(Broken())
    span = made.begin_request("POST", None)
    assert span is not None
    with made.opened(span):
        pass
    assert "a span could not be recorded" in caplog.text


def test_names_are_cleaned() -> None:
    assert clean("a\nb\x1b[2J\u2028c\ud800") == "a\\x0ab\\x1b[2J\\u2028c?"
    assert len(clean("x" * 5000)) == 200
    assert clean("Grüße 日本") == "Grüße 日本"

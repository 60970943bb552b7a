"""One trace from the client through the gateway to the engine, for turns and what passes through."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.telemetry.conftest import Parent, StartTraced, Traced
from tests.support.collector import CollectedSpan, collector
from tests.support.fakes import responses
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, delta
from tests.support.gateway_process import eventually
from tests.support.messages_api import end, start, words
from tests.support.raw_http import RawHttpClient

TEXT = "the secret word is marmalade"
SAID = [{"role": "user", "content": TEXT}]
GENAI = {
    "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.request.stream",
    "gen_ai.conversation.id", "gen_ai.response.id", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens",
    "gen_ai.usage.cache_read.input_tokens", "server.address", "server.port", "http.response.status_code",
    "cwg.outcome", "cwg.tenant", "cwg.session.source", "cwg.miss", "cwg.expected_tokens",
}  # fmt: skip


def plain(engine: FakeEngine) -> None:
    """Leave the engine as it is."""


def messages(engine: FakeEngine) -> None:
    """Let the engine stream the Messages API."""

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for one in (start(), words(0, "Hel", "lo"), end()):
            exchange.chunk(one)
        exchange.end()

    engine.on_other = answer


TURNS: dict[str, tuple[str, dict[str, Any], Callable[[FakeEngine], None], str]] = {
    "chat": ("/v1/chat/completions", {"messages": SAID}, plain, "chat"),
    "stream": ("/v1/chat/completions", {"messages": SAID, "stream": True}, plain, "chat"),
    "completions": ("/v1/completions", {"prompt": TEXT}, plain, "text_completion"),
    "completions stream": ("/v1/completions", {"prompt": TEXT, "stream": True}, plain, "text_completion"),
    "responses": ("/v1/responses", {"input": TEXT}, responses.serve, "chat"),
    "responses stream": ("/v1/responses", {"input": TEXT, "stream": True}, responses.serve, "chat"),
    "messages stream": ("/v1/messages", {"messages": SAID, "max_tokens": 9, "stream": True}, messages, "chat"),
}


def headers_of(engine: FakeEngine, path: str) -> list[str]:
    """The trace contexts that the engine was sent with the last request for a path."""
    return engine.seen(path)[-1].header("traceparent")


def turn_of(spans: list[CollectedSpan], operation: str = "chat") -> tuple[CollectedSpan, CollectedSpan]:
    """The request's span, and that of the engine's part."""
    (server,) = [span for span in spans if span.kind == "server"]
    (client,) = [span for span in spans if span.kind == "client"]
    assert client.name == f"{operation} {MODEL}"
    assert client.is_within(server)
    return server, client


@pytest.mark.parametrize("kind", TURNS)
def test_turn_is_one_trace(engine: FakeEngine, traced: Traced, parent: Parent, session: str, kind: str) -> None:
    path, body, prepare, operation = TURNS[kind]
    prepare(engine)
    headers = {"x-session-id": session, **parent.header(), "tracestate": "vendor=1", "x-request-id": "r-1"}
    answer = traced.gateway.http.post(path, json={"model": MODEL, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    spans = traced.collector.wait(parent.trace, f"POST {path}", f"{operation} {MODEL}")
    server, client = turn_of(spans, operation)
    before = {span.name for span in spans} - {server.name, client.name}
    assert before <= {"admit", "identify"}, "where they took a millisecond"
    assert server.parent == parent.span
    assert headers_of(engine, path) == [f"00-{parent.trace}-{client.id}-01"]
    assert engine.seen(path)[-1].header("tracestate") == ["vendor=1"]
    assert client.attributes.keys() == GENAI | ({"gen_ai.response.time_to_first_chunk"} if "stream" in kind else set())
    assert client.attributes["gen_ai.conversation.id"] == session
    assert client.attributes["server.port"] == int(engine.url.rpartition(":")[2])
    assert client.attributes["gen_ai.response.id"] in answer.text
    assert client.attributes["gen_ai.request.stream"] == ("stream" in kind)
    assert server.attributes == {
        "http.request.method": "POST", "http.route": path, "url.path": path, "http.response.status_code": 200,
        "cwg.request.id": "r-1",
    }  # fmt: skip
    assert server.resource["service.name"] == "context-window-gateway"
    assert server.resource["deployment.environment.name"] == "test"
    assert (server.error, client.error) == (False, False)
    assert "marmalade" not in repr(spans)


def test_base_url_has_placeholders_in_the_name(traced: Traced, parent: Parent, session: str) -> None:
    path = f"/s/{session}/v1/chat/completions"
    traced.gateway.http.post(path, json={"model": MODEL, "messages": SAID}, headers=parent.header())
    (server, _) = turn_of(traced.collector.wait(parent.trace, f"chat {MODEL}"))
    assert server.name == "POST /s/{session_id}/v1/chat/completions"
    assert server.attributes["url.path"] == path


def test_unsampled_header_goes_on_and_leaves_no_span(
    engine: FakeEngine, traced: Traced, parent: Parent, session: str
) -> None:
    traced.gateway.chat(session, headers=parent.header("00"))
    assert headers_of(engine, "/v1/chat/completions") == [parent.header("00")["traceparent"]]
    assert_nothing_else_comes(traced, parent.trace, session)


def assert_nothing_else_comes(traced: Traced, trace: str, session: str) -> None:
    """Nothing comes of a trace before a later request's spans do."""
    traced.gateway.turns(session)  # the turn is recorded
    traced.gateway.chat(f"{session}-later")
    eventually(
        lambda: any(
            s.attributes.get("gen_ai.conversation.id") == f"{session}-later" for s in [*traced.collector.spans]
        ),
        "a later trace",
    )
    assert traced.collector.of(trace) == []


@pytest.mark.parametrize("value", ["", "00-x", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'a' * 32}-{'1' * 16}-01, x"])
def test_malformed_header_is_as_none(engine: FakeEngine, traced: Traced, session: str, value: str) -> None:
    traced.gateway.chat(session, headers={"traceparent": value, "tracestate": "vendor=1"})
    (sent,) = headers_of(engine, "/v1/chat/completions")
    trace = sent.split("-")[1]
    server, client = turn_of(traced.collector.wait(trace, "POST /v1/chat/completions", f"chat {MODEL}"))
    assert (server.parent, client.id) == ("", sent.split("-")[2])
    assert engine.seen("/v1/chat/completions")[-1].header("tracestate") == []


def test_two_headers_are_as_none(engine: FakeEngine, traced: Traced, parent: Parent, session: str) -> None:
    line = f"traceparent: {parent.header()['traceparent']}"
    with RawHttpClient(traced.gateway.url) as wire:
        wire.post("/v1/chat/completions", json.dumps({"model": MODEL, "messages": SAID}).encode(), line, line)
        assert wire.head() == 200
    (sent,) = headers_of(engine, "/v1/chat/completions")
    assert parent.trace not in sent


def test_pipelined_request_is_no_child_of_the_one_before(
    engine: FakeEngine, traced: Traced, parent: Parent, session: str
) -> None:
    """Uvicorn starts it in the task of the last one."""
    body = json.dumps({"model": MODEL, "messages": SAID}).encode()
    named = f"x-session-id: {session}"
    with RawHttpClient(traced.gateway.url) as wire:
        wire.post("/v1/chat/completions", body, named, f"traceparent: {parent.header()['traceparent']}")
        wire.post("/v1/chat/completions", body, named)
        wire.post("/mcp", b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"window_list"}}')
        for _ in range(2):
            assert wire.head() == 200
            wire.body()
        wire.head()
    first, second = (one.header("traceparent")[0] for one in engine.seen("/v1/chat/completions")[-2:])
    assert parent.trace in first
    assert parent.trace not in second
    traced.collector.wait(second.split("-")[1], f"chat {MODEL}")
    assert len([span for span in traced.collector.of(parent.trace) if span.kind == "server"]) == 1


# --- failures


def refused(exchange: Exchange) -> None:
    exchange.json({"error": {"message": f"you said {TEXT}"}}, 404)


def broken(exchange: Exchange) -> None:
    exchange.json({"error": {"message": "oh"}}, 500)


def cut(exchange: Exchange) -> None:
    exchange.begin()
    exchange.chunk(delta(content="half"))
    exchange.cut()


def vanished(exchange: Exchange) -> None:
    exchange.cut()


@pytest.mark.parametrize(
    ("answer", "status", "error", "outcome"),
    [
        (refused, 404, "404", "engine_error"),
        (broken, 500, "500", "engine_error"),
        (cut, 200, "engine_cut", "engine_cut"),
        (vanished, 502, "502", "engine_error"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_failure_is_on_the_spans_without_its_text(
    engine: FakeEngine, traced: Traced, parent: Parent, session: str, answer: Any, status: int, error: str, outcome: str
) -> None:
    engine.on_chat = answer
    got = traced.gateway.chat(session, TEXT, headers=parent.header(), stream=True)
    assert got.status_code == status
    spans = traced.collector.wait(parent.trace, "POST /v1/chat/completions", f"chat {MODEL}")
    server, client = turn_of(spans)
    assert client.error
    assert (client.attributes["error.type"], client.attributes["cwg.outcome"]) == (error, outcome)
    assert server.error == (status >= 500)
    assert server.attributes["http.response.status_code"] == status
    assert "marmalade" not in repr(spans)


def test_client_that_leaves_is_no_error(engine: FakeEngine, traced: Traced, parent: Parent, session: str) -> None:
    engine.on_chat = lambda exchange: exchange.gone() and None  # type: ignore[func-returns-value]
    with RawHttpClient(traced.gateway.url) as wire:
        body = json.dumps({"model": MODEL, "messages": SAID, "stream": True}).encode()
        wire.post("/v1/chat/completions", body, f"traceparent: {parent.header()['traceparent']}")
        engine.wait_seen("/v1/chat/completions")
    server, client = turn_of(traced.collector.wait(parent.trace, "POST /v1/chat/completions", f"chat {MODEL}"))
    assert client.attributes["cwg.outcome"] == "client_gone"
    assert not client.error
    assert "http.response.status_code" not in server.attributes


@pytest.mark.parametrize(
    ("path", "body", "status", "name"),
    [
        ("/v1/chat/completions", b"no json", 400, "POST /v1/chat/completions"),
        ("/v1/nothing/of/the/kind", b"{}", 404, "POST"),
        ("/v1/models", b"{}", 405, "POST"),
    ],
)
def test_refusal_is_one_span(traced: Traced, parent: Parent, path: str, body: bytes, status: int, name: str) -> None:
    headers = {"content-type": "application/json", **parent.header()}
    assert traced.gateway.http.post(path, content=body, headers=headers).status_code == status
    (server,) = traced.collector.wait(parent.trace, name)
    assert (server.kind, server.attributes["http.response.status_code"], server.error) == ("server", status, False)


def test_model_that_is_not_served_is_not_named(
    engine: FakeEngine, traced: Traced, parent: Parent, session: str
) -> None:
    engine.on_chat = refused
    traced.gateway.chat(session, headers=parent.header(), model="made\nup\x1b")
    (client,) = [s for s in traced.collector.wait(parent.trace, "chat") if s.kind == "client"]
    assert "gen_ai.request.model" not in client.attributes


def test_embeddings_pass_through_with_spans(engine: FakeEngine, traced: Traced, parent: Parent) -> None:
    engine.on_other = lambda exchange: exchange.json({"object": "list", "data": []})
    answer = traced.gateway.http.post("/v1/embeddings", json={"model": MODEL, "input": TEXT}, headers=parent.header())
    assert answer.status_code == 200
    spans = traced.collector.wait(parent.trace, f"embeddings {MODEL}", "POST /v1/embeddings")
    _, client = turn_of(spans, "embeddings")
    assert headers_of(engine, "/v1/embeddings") == [f"00-{parent.trace}-{client.id}-01"]
    assert client.attributes["gen_ai.operation.name"] == "embeddings"
    assert "marmalade" not in repr(spans)


# --- sampling and switching off


def test_reading_is_not_traced_by_itself(engine: FakeEngine, traced: Traced, parent: Parent) -> None:
    for path in ("/v1/models", "/admin/windows", "/healthz", "/metrics"):
        assert traced.gateway.http.get(path).status_code == 200
        assert traced.gateway.http.get(path, headers=parent.header()).status_code == 200
    traced.collector.wait(parent.trace, "GET /v1/models", "GET /admin/windows", "GET /healthz", "GET /metrics")
    assert {span.trace for span in traced.collector.spans if span.name.startswith("GET")} == {parent.trace}


def test_share_of_zero_tells_the_engine_not_to_trace(
    engine: FakeEngine, start_traced: StartTraced, parent: Parent, session: str
) -> None:
    with collector() as spans:
        variables = {"EXPORTER_OTLP_ENDPOINT": spans.url, "TRACES_SAMPLER": "parentbased_traceidratio"}
        gateway = start_traced({**variables, "TRACES_SAMPLER_ARG": "0"})
        for number in range(3):
            gateway.chat(f"{session}-{number}")
        sent = [one.header("traceparent")[0].split("-") for one in engine.seen("/v1/chat/completions")]
        assert {flags for *_, flags in sent} == {"00"}
        assert len({trace for _, trace, _, _ in sent}) == 3
        gateway.freeze(f"{session}-0", "w")
        gateway.chat(session, headers=parent.header())
        spans.wait(parent.trace, f"chat {MODEL}", "POST /v1/chat/completions")
        assert {span.trace for span in spans.spans} == {parent.trace}


def test_without_an_endpoint_the_header_passes_as_it_is(
    engine: FakeEngine, gateway: Any, parent: Parent, session: str
) -> None:
    gateway.chat(session, headers=parent.header())
    assert headers_of(engine, "/v1/chat/completions") == [parent.header()["traceparent"]]
    gateway.chat(session, "again")
    assert headers_of(engine, "/v1/chat/completions") == []


def test_several_workers_export_as_several_instances(start_traced: StartTraced, session: str) -> None:
    with collector() as spans:
        gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": spans.url, "SERVICE_NAME": "mine"}, workers=2)

        def instances() -> set[str]:
            with RawHttpClient(gateway.url) as wire:
                wire.chat(session)
                assert wire.head() == 200
            return {span.resource["service.instance.id"] for span in spans.spans}

        eventually(lambda: len(instances()) == 2, "both workers have exported")
        assert {span.resource["service.name"] for span in spans.spans} == {"mine"}


def test_each_span_id_is_used_once(traced: Traced) -> None:
    ids = [span.id for span in traced.collector.spans]
    assert len(ids) == len(set(ids))

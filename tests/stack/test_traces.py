"""One trace from the client through the gateway into vLLM's own span."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway
from tests.support.collector import CollectedSpan

pytestmark = pytest.mark.stack

LLM = "llm_request"
TEXT = "the secret word is marmalade. " * 20


@pytest.fixture(scope="module")
def traced(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that records what its clients record."""
    folder = tmp_path_factory.mktemp("traced")
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": stack.collector.url,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0",
    }
    gateway = Gateway(stack.settings(folder / "data", **variables), folder / "gateway.log").start()
    yield gateway
    gateway.close()


def send(gateway: Gateway, path: str, body: dict[str, Any], traceparent: str = "") -> str:
    """POST, and return the answer."""
    headers = {"traceparent": traceparent} if traceparent else {}
    answer = gateway.http.post(path, json=body, headers=headers)
    assert answer.status_code in (200, 201), answer.text
    return answer.text


def chain(spans: list[CollectedSpan]) -> list[CollectedSpan]:
    """The engine's last span, after all that it is a part of."""
    by_id = {span.id: span for span in spans}
    found = [next(span for span in reversed(spans) if span.name == LLM)]
    while found[0].parent in by_id:
        found.insert(0, by_id[found[0].parent])
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_trace_goes_from_the_client_into_the_engine(stack: Stack, traced: Gateway, path: str, stream: bool) -> None:
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    said = {"prompt": TEXT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": TEXT}]}
    send(traced, path, {"model": "demo", "max_tokens": 4, "stream": stream, **said}, f"00-{trace}-{span}-01")
    operation = "text_completion" if path == "/v1/completions" else "chat"
    spans = stack.collector.wait(trace, LLM, f"{operation} demo", f"POST {path}")
    server, client, engine = chain(spans)
    assert [one.name for one in (server, client)] == [f"POST {path}", f"{operation} demo"]
    assert {one.name for one in spans} - {"admit", "identify"} == {server.name, client.name, LLM}
    assert server.parent == span
    assert engine.is_within(client)
    assert engine.attributes["gen_ai.usage.prompt_tokens"] == client.attributes["gen_ai.usage.input_tokens"]
    assert client.attributes["gen_ai.response.id"] in engine.attributes["gen_ai.request.id"]


def test_trace_of_operations_has_the_engines_part(stack: Stack, traced: Gateway) -> None:
    trace = secrets.token_hex(16)
    parent = f"00-{trace}-{secrets.token_hex(8)}-01"
    body = {"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": TEXT}]}
    send(traced, "/s/frozen/v1/chat/completions", body)
    send(traced, "/admin/windows", {"session_id": "frozen", "window_name": "w"}, parent)
    send(traced, "/admin/windows/w/thaw", {"warm": "gpu"}, parent)
    spans = stack.collector.wait(trace, LLM, "freeze", "POST /admin/windows", "POST /admin/windows/{name}/thaw")
    names = [span.name for span in chain(spans)]
    assert names == ["POST /admin/windows/{name}/thaw", "thaw", "prefill", LLM]


def test_unsampled_requests_leave_no_span_anywhere(stack: Stack, traced: Gateway) -> None:
    """The engine's own sampler records every request that does not say otherwise."""
    body = {"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": TEXT}]}
    unsampled, sampled = secrets.token_hex(16), secrets.token_hex(16)
    path = "/s/quiet/v1/chat/completions"
    began = time.time_ns()
    send(traced, path, body, f"00-{unsampled}-{'1' * 16}-00")
    send(traced, path, body)
    send(traced, "/admin/windows", {"session_id": "quiet", "window_name": "quiet"})
    send(traced, "/admin/windows/quiet/thaw", {"warm": "gpu"})
    send(traced, path, body, f"00-{sampled}-{'1' * 16}-01")
    stack.collector.wait(sampled, LLM, "POST /s/{session_id}/v1/chat/completions")
    assert stack.collector.of(unsampled) == []
    assert [span.trace for span in stack.collector.named(LLM) if span.started >= began] == [sampled]

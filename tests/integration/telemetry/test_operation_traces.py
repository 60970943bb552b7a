"""Operations with their steps, whoever asked for them; and automatic work, with a link to what caused it."""

import time
from pathlib import Path

import pytest

from tests.integration.telemetry.conftest import Parent, StartTraced, Traced
from tests.support import mcp_clients
from tests.support.cli import cwg
from tests.support.collector import CollectedSpan, collector
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import eventually

TEXT = "the secret word is marmalade, and again: marmalade"


def steps(spans: list[CollectedSpan], operation: str) -> tuple[CollectedSpan, list[str]]:
    """The span of an operation, and the names of its steps in their order."""
    (whole,) = [span for span in spans if span.name == operation]
    children = [span for span in spans if span.parent == whole.id]
    assert all(child.is_within(whole) for child in children)
    return whole, [child.name for child in children]


def test_freeze_and_thaw_have_their_steps_and_receipts(
    engine: FakeEngine, traced: Traced, parent: Parent, session: str
) -> None:
    gateway, spans = traced.gateway, traced.collector
    gateway.chat(session, TEXT)
    body = {"session_id": session, "window_name": f"w-{session}"}
    receipt = gateway.http.post("/admin/windows", json=body, headers=parent.header()).json()["receipt"]
    found = spans.wait(parent.trace, "POST /admin/windows", "freeze")
    frozen, names = steps(found, "freeze")
    assert names == ["snapshot", "render", "prefill", "barrier", "pin", "commit"]
    assert frozen.attributes["gen_ai.conversation.id"] == session
    for name in ("tokens", "chunks", "bytes", "prompt_tokens", "duration_ms"):
        assert frozen.attributes[f"cwg.receipt.{name}"] == receipt[name]
    (server,) = [span for span in found if span.kind == "server"]
    assert (server.parent, frozen.parent) == (parent.span, server.id)
    by_name = {span.name: span for span in found}
    sent = engine.seen("/v1/completions")[-1].header("traceparent")
    assert sent == [f"00-{parent.trace}-{by_name['prefill'].id}-01"]
    assert engine.seen("/tokenize")[-1].header("traceparent") == [f"00-{parent.trace}-{by_name['render'].id}-01"]
    assert by_name["pin"].attributes == {"cwg.step.total": receipt["chunks"], "cwg.step.done": receipt["chunks"]}

    body = {"warm": "gpu"}
    thawed = gateway.http.post(f"/admin/windows/w-{session}/thaw", json=body, headers=parent.header()).json()
    found = spans.wait(parent.trace, "thaw", "POST /admin/windows/{name}/thaw")
    whole, names = steps(found, "thaw")
    assert names == ["restore", "prefetch", "prefill"]
    assert whole.attributes["cwg.window.name"] == f"w-{session}"
    assert whole.attributes["cwg.receipt.cached_tokens"] == thawed["receipt"]["cached_tokens"]

    # Another window of it, so that it was not loaded just now.
    gateway.http.post(f"/admin/windows/w-{session}/clone", json={"target_window": f"v-{session}", "isolate": True})
    thawed = gateway.http.post(f"/admin/windows/v-{session}/thaw", json={"warm": "none"}).json()
    gateway.chat(thawed["session_id"], "go on", headers=parent.header())
    found = spans.wait(parent.trace, "resume", f"chat {MODEL}")
    whole, names = steps(found, "resume")
    assert (names, whole.attributes) == (["prefetch"], {"cwg.window.name": f"v-{session}"})
    assert "marmalade" not in repr(found)


def test_every_operation_is_a_span(traced: Traced, parent: Parent, session: str) -> None:
    http, window = traced.gateway.http, f"o-{session}"
    traced.gateway.chat(session, TEXT)
    http.headers.update(parent.header())
    try:
        assert traced.gateway.freeze(session, window).status_code == 201
        assert http.post(f"/admin/windows/{window}/clone", json={"target_window": f"c-{window}"}).status_code == 201
        assert http.post(f"/admin/windows/{window}/ask", json={"question": "what marmalade?"}).status_code == 200
        assert http.post("/admin/ask", json={"question": "marmalade?", "max_windows": 2}).status_code == 200
        assert http.post(f"/admin/windows/{window}/verify").status_code == 200
        assert http.delete(f"/admin/windows/c-{window}").status_code == 200
        assert http.delete(f"/admin/windows/c-{window}").status_code == 404
    finally:
        del http.headers["traceparent"]
    found = traced.collector.wait(parent.trace, "clone", "ask", "ask_any", "verify", "delete", "delete")
    assert steps(found, "ask_any")[1].count("ask") >= 1
    (asked,) = [span for span in found if span.name == "ask" and span.attributes.get("cwg.window.name") == window][:1]
    assert asked.attributes["cwg.receipt.completion"] == 3
    failed = [span for span in found if span.name == "delete" and span.error]
    assert [span.attributes["error.type"] for span in failed] == ["window_not_found"]
    assert "marmalade" not in repr(found)


def test_continuation_after_a_thaw_is_in_its_trace(
    engine: FakeEngine, traced: Traced, parent: Parent, session: str
) -> None:
    traced.gateway.chat(session, TEXT)
    traced.gateway.freeze(session, f"k-{session}")
    path, body = f"/admin/windows/k-{session}/thaw", {"continuation_prompt": "And then?"}
    for flags in ("01", "00"):
        traced.gateway.http.post(path, json=body, headers=parent.header(flags)).raise_for_status()
    traced.collector.wait(parent.trace, "thaw", "POST /s/{session_id}/v1/chat/completions", f"chat {MODEL}")
    first, second = (one.header("traceparent")[0] for one in engine.seen("/v1/chat/completions")[-2:])
    assert (parent.trace in first, first[-2:], second[-2:]) == (True, "01", "00")


def test_cli_passes_the_span_of_its_environment(
    traced: Traced, parent: Parent, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced.gateway.chat(session, TEXT)
    monkeypatch.setenv("TRACEPARENT", parent.header()["traceparent"])
    assert cwg("freeze", session, f"cli-{session}", url=traced.gateway.url).returncode == 0
    found = traced.collector.wait(parent.trace, "freeze", "POST /admin/windows")
    assert parent.span in {span.parent for span in found}
    monkeypatch.setenv("TRACEPARENT", "nonsense\n")
    assert cwg("delete", f"cli-{session}", url=traced.gateway.url).returncode == 0


@pytest.mark.anyio
async def test_mcp_passes_the_span_of_a_call(traced: Traced, parent: Parent, session: str) -> None:
    traced.gateway.chat(session, TEXT)
    other = Parent(parent.trace, "f" * 16)
    async with mcp_clients.over_http(traced.gateway.url, **other.header()) as client:
        await client.call_tool("window_freeze", {"session_id": session, "window_name": f"h-{session}"})
        meta = parent.header()
        names = {"source_window": f"h-{session}", "target_window": f"n-{session}"}
        await client.call_tool("window_clone", names, meta=meta)
    async with mcp_clients.over_stdio(traced.gateway.url) as client:
        await client.call_tool("window_delete", {"window_name": f"n-{session}"}, meta=meta)
    found = traced.collector.wait(parent.trace, "freeze", "clone", "delete")
    parents = {span.name: span.parent for span in found if span.kind == "server"}
    assert parents == {
        "POST /admin/windows": "f" * 16,
        "POST /admin/windows/{name}/clone": parent.span,
        "DELETE /admin/windows/{name}": parent.span,
    }


def test_automatic_freeze_is_a_trace_with_a_link_to_the_turn(
    engine: FakeEngine, start_traced: StartTraced, parent: Parent, session: str
) -> None:
    with collector() as spans:
        variables = {"EXPORTER_OTLP_ENDPOINT": spans.url, "TRACES_SAMPLER": "parentbased_always_off"}
        rules = {"auto_freeze": True, "auto_freeze_tokens": 5, "auto_freeze_cooldown_s": 0.01, "log_format": "json"}
        gateway = start_traced(variables, **rules)
        gateway.chat(f"{session}-unsampled")
        gateway.chat(session, TEXT, headers=parent.header())
        turn = next(s for s in spans.wait(parent.trace, f"chat {MODEL}") if s.kind == "client")
        eventually(lambda: len(spans.named("automatic freeze")) == 1, "it was frozen", more=lambda: gateway.log)
        (root,) = spans.named("automatic freeze")
        found = spans.wait(root.trace, "freeze")
        assert (root.parent, root.links) == ("", ((turn.trace, turn.id),))
        assert root.trace != parent.trace
        assert "tokens" in root.attributes["cwg.reason"]
        frozen, names = steps(found, "freeze")
        assert frozen.parent == root.id
        assert names == ["snapshot", "render", "commit"]
        assert engine.seen("/tokenize")[-1].header("traceparent")[0][-2:] in ("00", "01")
        windows = gateway.http.get("/admin/windows").json()["windows"]
        eventually(lambda: len(gateway.http.get("/admin/windows").json()["windows"]) == 2, f"both are frozen {windows}")
        assert len(spans.named("automatic freeze")) == 1, "the turn of the other was not sampled"
        (line,) = [one for one in gateway.log.splitlines() if f"session {session} was frozen" in one]
        assert f'"trace_id": "{root.trace}", "span_id": "{root.id}"' in line


def test_expiry_is_a_trace_of_its_own(start_traced: StartTraced, session: str, tmp_path: Path) -> None:
    with collector() as spans:
        gateway = start_traced({"EXPORTER_OTLP_ENDPOINT": spans.url}, sweep_every_s=0.1, expiry_grace_s=0)
        gateway.chat(session)
        gateway.freeze(session, "w", ttl_seconds=1)
        expires = time.time() + 1
        eventually(lambda: len(spans.named("expiry")) == 1, f"it expires at {expires}")
        (root,) = spans.named("expiry")
        deleted, _ = steps(spans.wait(root.trace, "delete"), "delete")
        assert (root.parent, deleted.parent, deleted.attributes["cwg.window.name"]) == ("", root.id, "w")

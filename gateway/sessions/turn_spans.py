"""The spans of a turn, made when it is recorded, from the times that it has anyway."""

import re
from urllib.parse import urlsplit

from gateway.records import Turn
from gateway.sessions.turn_context import TurnContext
from gateway.telemetry import genai
from gateway.telemetry.trace_context import Span
from gateway.telemetry.traces import Attributes, Traces, clean

_WAITED_S = 0.001
"""A step before the engine is a span only if it took this long: almost always none did."""
_ID = re.compile(rb'"id":\s?"([\w-]{1,100})"')
_HEAD_BYTES = 500  # of a reply; the text comes after its id, in every dialect
_NO_ERROR = frozenset({"completed", "client_gone"})


def record(traces: Traces, turn: TurnContext, span: Span, recorded: Turn) -> None:
    """Record the request to the engine as `span`, and what came before it beside that."""
    parent = Span("", span.trace_id, span.parent_id, 0, 0, 0, {})
    arrived = recorded.started_at - turn.overhead_s
    for name, begun, over in (
        ("admit", turn.arrived, turn.admitted_at),
        ("identify", turn.admitted_at, turn.identified_at),
    ):
        if over - begun >= _WAITED_S:
            traces.record_child(parent, name, _ns(arrived + begun - turn.arrived), _ns(arrived + over - turn.arrived))
    operation = genai.OPERATIONS.get(turn.dialect.name, "chat")
    span.name = f"{operation} {clean(recorded.model)}" if recorded.model else operation
    span.started_ns = _ns(recorded.started_at)
    span.attributes = {genai.OPERATION: operation, **_attributes(turn, recorded)}
    if recorded.outcome not in _NO_ERROR:
        span.error = str(recorded.status) if recorded.status >= 400 else recorded.outcome
    traces.record(span, span.started_ns + _ns(recorded.duration_ms / 1000))


def _attributes(turn: TurnContext, recorded: Turn) -> Attributes:
    session, usage, engine = turn.match.session, recorded.usage, urlsplit(turn.engine)
    given: dict[str, str | int | float | bool | None] = {
        genai.PROVIDER_NAME: genai.PROVIDER,
        genai.MODEL: clean(recorded.model) or None,
        genai.STREAM: turn.result.streamed,
        genai.CONVERSATION: clean(session.id),
        genai.TENANT: clean(session.tenant),
        genai.SOURCE: clean(recorded.source),
        genai.SERVER: engine.hostname,
        genai.PORT: engine.port,
        genai.STATUS: recorded.status or None,
        genai.OUTCOME: recorded.outcome,
        genai.FIRST_CHUNK: _first_chunk_s(turn),
        genai.RESPONSE_ID: _response_id(turn),
        genai.MISS: recorded.miss.partition(":")[0] or None,
        genai.EXPECTED_TOKENS: recorded.expected_tokens,
    }
    if usage is not None:
        given |= {
            genai.INPUT_TOKENS: usage.prompt,
            genai.OUTPUT_TOKENS: usage.completion,
            genai.CACHED_TOKENS: usage.cached,
        }
    return {name: value for name, value in given.items() if value is not None}


def _response_id(turn: TurnContext) -> str | None:
    """The id that the engine gave its reply."""
    if not turn.result.chunks or turn.result.status >= 400:
        return None
    found = _ID.search(turn.result.chunks[0][:_HEAD_BYTES])
    return found[1].decode() if found else None


def _first_chunk_s(turn: TurnContext) -> float | None:
    """Seconds from the request to the engine until the first of a stream came."""
    if not turn.result.streamed or not turn.result.began_at:
        return None
    return turn.result.began_at - turn.arrived - turn.overhead_s


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

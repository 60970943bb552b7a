"""OpenAI chat completions: `/v1/chat/completions`."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from gateway.dialects import sse
from gateway.dialects.base import (
    RENDER_FIELDS,
    Call,
    Reply,
    is_clean,
    model_of,
    sanitise,
    usage_of,
    with_fields,
    write_json,
)
from gateway.dialects.events import json_object, objects
from gateway.dialects.openai import error_body
from gateway.errors import GatewayError
from gateway.records import Message, Usage

_DONE = b"[DONE]"
# Names under which vLLM has sent a model's reasoning; a template that wants it back reads the same name.
_REASONING = ("reasoning", "reasoning_content")
_BEFORE_TEXT = b'"choices":[{"index":0,"delta":{"content":"'
_RUN = 8  # events; fewer are not worth it
_TEXTS = frozenset({"content", *_REASONING})


class ChatDialect:
    """See `gateway.dialects.base.Dialect`."""

    name = "chat"
    last_event: tuple[bytes, ...] = (b"data: [DONE]",)

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """See `Dialect.read`. A body that the engine will refuse is left for the engine to refuse."""
        clean = is_clean(body)
        client_salt = sanitise(body)
        messages = body.get("messages")
        sound = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        options = body.get("stream_options")
        return Call(
            body=body,
            raw=raw if clean else b"",
            model=model_of(body),
            messages=messages if sound and messages else [],
            frame={name: body[name] for name in RENDER_FIELDS if body.get(name) is not None},
            hide_usage=body.get("stream") is True and not (isinstance(options, dict) and options.get("include_usage")),
            client_salt=client_salt,
        )

    def write(self, call: Call, salt: str) -> bytes:
        """See `Dialect.write`."""
        body, raw = dict(call.body), call.raw
        if call.front is not None:
            body, raw = {**body, **call.front.frame, "messages": call.whole}, b""
        if not call.hide_usage:
            return with_fields(raw, body, {"cache_salt": salt})
        # Without the client's include_usage, vLLM would not have sent continuous usage either.
        usage = {"include_usage": True, "continuous_usage_stats": False}
        options = body.get("stream_options")
        if "stream_options" not in body:
            return with_fields(raw, body, {"cache_salt": salt, "stream_options": usage})
        if isinstance(options, dict) or options is None:
            body["stream_options"] = {**(options or {}), **usage}
        return write_json({**body, "cache_salt": salt})

    def reply(self, chunks: Iterable[bytes], *, streamed: bool) -> Reply:
        """See `Dialect.reply`."""
        return _streamed(chunks) if streamed else _whole(chunks)

    def error(self, error: GatewayError) -> bytes:
        """See `Dialect.error`."""
        return error_body(error)

    def error_event(self, error: GatewayError, sent: Sequence[bytes] = ()) -> bytes:
        """See `Dialect.error_event`."""
        return b"data: " + self.error(error) + b"\n\ndata: [DONE]\n\n"


def _whole(chunks: Iterable[bytes]) -> Reply:
    answer = json_object(b"".join(chunks))
    if answer is None:
        return Reply(None, None, "the reply is not a JSON object")
    choices = answer.get("choices")
    first = choices[0].get("message") if isinstance(choices, list) and choices else None
    message = _clean(first) if isinstance(first, dict) else None
    return Reply(message, usage_of(answer.get("usage")), "" if message else "the reply holds no message")


def _streamed(chunks: Iterable[bytes]) -> Reply:
    message = _Assembled()
    usage: Usage | None = None
    error = ""
    events = list(sse.events(chunks))
    done = events[-1:] == [_DONE]
    for event in _read(events[:-1] if done else events):
        if event is None:
            error = "the stream holds an event that is not a JSON object"
        elif "error" in event:
            error = str(event["error"])
        else:
            if "usage" in event:
                usage = usage_of(event["usage"]) or usage
            for choice in event.get("choices") or ():
                if choice.get("index", 0) == 0:
                    message.add(choice.get("delta") or {})
    if not error and not done:
        error = "the stream ended before [DONE]"
    return Reply(None if error else message.whole(), usage, error)


class _Assembled:
    """A message put together from its deltas."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}
        self._tools: dict[int, dict[str, Any]] = {}

    def add(self, delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name in _TEXTS:
                if isinstance(value, str):
                    self._texts.setdefault(name, []).append(value)
            elif name == "tool_calls":
                for part in value or ():
                    self._add_tool(part)

    def _add_tool(self, part: dict[str, Any]) -> None:
        call = self._tools.setdefault(part.get("index", 0), {"function": {"name": "", "arguments": ""}})
        call |= {name: part[name] for name in ("id", "type") if part.get(name)}
        function = part.get("function") or {}
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""

    def whole(self) -> Message:
        message: Message = {name: "".join(parts) for name, parts in self._texts.items()}
        return _clean({**message, "tool_calls": [self._tools[i] for i in sorted(self._tools)]})


def _clean(message: dict[str, Any]) -> Message:
    """The message as a client sends it back: without the empty fields that only a reply has."""
    clean: Message = {"role": "assistant", "content": message.get("content")}
    clean |= {name: message[name] for name in (*_REASONING, "tool_calls") if message.get(name)}
    return clean


def _read(events: list[bytes]) -> list[dict[str, Any] | None]:
    """Read the data of all events; the long run of them that differ in nothing but their text becomes one event.

    That run is nearly all of a long reply, and what follows it is what counts: half of the time to read a reply.
    """
    texts = _texts(events[1:])
    if len(texts) < _RUN:
        return objects(events)
    merged = {"choices": [{"index": 0, "delta": {"content": "".join(texts)}}]}
    return [*objects(events[:1]), merged, *objects(events[1 + len(texts) :])]


def _texts(events: list[bytes]) -> list[str]:
    """The texts of the events that differ from the first in nothing else; none where that cannot be told for sure."""
    start = events[0].find(_BEFORE_TEXT) + len(_BEFORE_TEXT) if events else 0
    end = events[0].find(b'"', start) if start >= len(_BEFORE_TEXT) else -1
    if end < 0 or events[0][end - 1 : end] == b"\\":
        return []
    before, after = events[0][:start], events[0][end:]
    literals: list[bytes] = []
    for event in events:
        if not (event.startswith(before) and event.endswith(after)):
            break
        literals.append(event[start : -len(after)])
    try:
        # A literal that held more than a text (`a","name":"b`) would make the array invalid, or longer.
        texts: list[str] = orjson.loads(b'["' + b'","'.join(literals) + b'"]')
    except orjson.JSONDecodeError:
        return []
    return texts if len(texts) == len(literals) else []

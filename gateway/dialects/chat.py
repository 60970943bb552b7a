"""OpenAI chat completions: `/v1/chat/completions`."""

from collections.abc import Iterable
from typing import Any

import orjson

from gateway.dialects.base import (
    RENDER_FIELDS,
    Call,
    Dialect,
    Reply,
    engine_token_counts,
    is_clean,
    model_of,
    sanitise,
    with_fields,
    write_json,
)
from gateway.dialects.stream_reader import StreamReader
from gateway.records import Message

# Names under which vLLM has sent a model's reasoning; a template that wants it back reads the same name.
_REASONING = ("reasoning", "reasoning_content")
_TEXTS = frozenset({"content", *_REASONING})
_BEFORE_TEXT = b'"choices":[{"index":0,"delta":{"content":"'
_RUN = 8  # events; fewer are not worth it


class ChatDialect(Dialect):
    """See `gateway.dialects.base.Dialect`."""

    name = "chat"

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """See `Dialect.read`."""
        clean = is_clean(body)
        client_salt = sanitise(body)
        messages = body.get("messages")
        options = body.get("stream_options")
        return Call(
            body=body,
            raw=raw if clean else b"",
            model=model_of(body),
            messages=messages if isinstance(messages, list) and {*map(type, messages)} <= {dict} else [],
            frame={name: body[name] for name in RENDER_FIELDS if body.get(name) is not None},
            hide_usage=body.get("stream") is True and not (isinstance(options, dict) and options.get("include_usage")),
            client_salt=client_salt,
        )

    def write_with_salt(self, call: Call, salt: str) -> bytes:
        """See `Dialect.write_with_salt`."""
        body, raw = call.body, call.raw
        if call.front is not None:
            body, raw = {**body, **call.front.frame, "messages": call.whole}, b""
        if not call.hide_usage:
            return with_fields(raw, body, {"cache_salt": salt})
        # Without the client's include_usage, vLLM would not have sent continuous usage either.
        usage = {"include_usage": True, "continuous_usage_stats": False}
        if "stream_options" not in body:
            return with_fields(raw, body, {"cache_salt": salt, "stream_options": usage})
        options = body["stream_options"]
        if isinstance(options, dict) or options is None:
            body = {**body, "stream_options": {**(options or {}), **usage}}
        return write_json({**body, "cache_salt": salt})

    def _read_answer(self, answer: dict[str, Any]) -> Reply:
        choices = answer.get("choices")
        first = choices[0].get("message") if isinstance(choices, list) and choices else None
        message = _clean(first) if isinstance(first, dict) else None
        return Reply(message, engine_token_counts(answer.get("usage")), "" if message else "the reply holds no message")

    def _read_stream(self, chunks: Iterable[bytes]) -> Reply:
        return _ChatStream().read(chunks)


class _ChatStream(StreamReader):
    """Puts the message of the first choice together from its deltas."""

    def __init__(self) -> None:
        super().__init__()
        self._texts: dict[str, list[str]] = {}
        self._tools: dict[int, dict[str, Any]] = {}

    def parse(self, events: list[bytes]) -> list[dict[str, Any] | None]:
        """See `StreamReader.parse`. A long run of events that differ in nothing but their text becomes one event.

        That run is nearly all of a long reply: it takes half of the time to read a reply.
        """
        texts = _texts(events[1:])
        if len(texts) < _RUN:
            return super().parse(events)
        merged = {"choices": [{"index": 0, "delta": {"content": "".join(texts)}}]}
        return [*super().parse(events[:1]), merged, *super().parse(events[1 + len(texts) :])]

    def add(self, event: dict[str, Any]) -> None:
        if "usage" in event:
            self.usage = engine_token_counts(event["usage"]) or self.usage
        for choice in event.get("choices") or ():
            if choice.get("index", 0) == 0:
                self._add_delta(choice.get("delta") or {})

    def _add_delta(self, delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name in _TEXTS:
                if isinstance(value, str):
                    self._texts.setdefault(name, []).append(value)
            elif name == "tool_calls":
                for part in value or ():
                    self._add_tool_call(part)

    def _add_tool_call(self, part: dict[str, Any]) -> None:
        call = self._tools.setdefault(part.get("index", 0), {"function": {"name": "", "arguments": ""}})
        call |= {name: part[name] for name in ("id", "type") if part.get(name)}
        function = part.get("function") or {}
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""

    def message(self) -> Message:
        message: Message = {name: "".join(parts) for name, parts in self._texts.items()}
        return _clean({**message, "tool_calls": [self._tools[i] for i in sorted(self._tools)]})


def _clean(message: dict[str, Any]) -> Message:
    """The message as a client sends it back: without the empty fields that only a reply has."""
    clean: Message = {"role": "assistant", "content": message.get("content")}
    clean |= {name: message[name] for name in (*_REASONING, "tool_calls") if message.get(name)}
    return clean


def _texts(events: list[bytes]) -> list[str]:
    """The texts of the first events, as far as they differ in nothing else; none where that is not certain."""
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

"""Anthropic Messages: `/v1/messages`, and how many tokens one has: `/v1/messages/count_tokens`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from gateway.dialects import chat_to_messages, messages_to_chat
from gateway.dialects.base import (
    Call,
    Dialect,
    Reply,
    engine_token_counts,
    is_clean,
    json_object,
    model_of,
    sanitise,
    sentence,
    with_fields,
    write_json,
)
from gateway.dialects.stream_reader import StreamReader
from gateway.errors import GatewayError
from gateway.records import Message, Usage

# Anthropic's types of errors by status; everything else below 500 is an invalid request.
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Anthropic, and vLLM with it, counts a prompt in three parts.
_PROMPT = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
_TEXT_OF = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
_UNREADABLE = "the reply holds what cannot be sent back"


class MessagesDialect(Dialect):
    """See `gateway.dialects.base.Dialect`."""

    name = "messages"
    last_event = (b"event: message_stop",)

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """See `Dialect.read`."""
        clean = is_clean(body)
        client_salt = sanitise(body)
        try:
            messages, frame = messages_to_chat.conversation(body), messages_to_chat.frame(body)
        except messages_to_chat.Unreadable:
            messages, frame = [], {}
        return Call(
            body=body,
            raw=raw if clean else b"",
            model=model_of(body),
            messages=messages,
            frame=frame,
            client_salt=client_salt,
        )

    def write_with_salt(self, call: Call, salt: str) -> bytes:
        """See `Dialect.write_with_salt`."""
        return with_fields(call.raw if call.front is None else b"", _whole(call), {"cache_salt": salt})

    def question(self, call: Call) -> bytes:
        """Return the body that asks how many tokens the prompt of this call has. Raises as `write` does."""
        return (call.raw if call.front is None else b"") or write_json(_whole(call))

    def error(self, error: GatewayError) -> bytes:
        """See `Dialect.error`; newer clients of Anthropic's show the code as `error_code`."""
        kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        details = {"error_code": error.code}
        shown = {"type": kind, "message": sentence(error), "code": error.code, "details": details}
        return orjson.dumps({"type": "error", "error": shown, "request_id": None})

    def error_event(self, error: GatewayError, sent: Sequence[bytes] = ()) -> bytes:
        """See `Dialect.error_event`."""
        return b"event: error\ndata: " + self.error(error) + b"\n\n"

    def _read_answer(self, answer: dict[str, Any]) -> Reply:
        usage, content = _usage(answer.get("usage")), answer.get("content")
        if not isinstance(content, list):
            return Reply(None, usage, "the reply holds no message")
        message = _message(content)
        return Reply(message, usage, "" if message else _UNREADABLE)

    def _read_stream(self, chunks: Iterable[bytes]) -> Reply:
        return _MessageStream().read(chunks)


def _whole(call: Call) -> Mapping[str, Any]:
    return call.body if call.front is None else chat_to_messages.in_front(call.front, call.body)


def _message(content: list[Any]) -> Message | None:
    try:
        return messages_to_chat.assistant(content)
    except messages_to_chat.Unreadable:
        return None


class _MessageStream(StreamReader):
    """Puts a message together from the events of its content blocks."""

    last = "message_stop"

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, dict[str, Any]] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "content_block_delta":
                self._add_delta(event.get("index"), event.get("delta"))
            case "content_block_start":
                self._start(event.get("index"), event.get("content_block"))
            case "message_start":
                message = event.get("message")
                self.usage = _usage(message.get("usage")) if isinstance(message, dict) else None
            case "message_delta":
                # Only here is it known how much of the prompt was cached; the count before was another one.
                self.usage = _usage(event.get("usage"), self.usage) or self.usage
            case "message_stop":
                self.complete = True

    def _start(self, index: Any, block: Any) -> None:
        if isinstance(index, int) and isinstance(block, dict):
            self._blocks[index] = block
            self._texts[index] = []
        else:
            self.error = "the stream starts an invalid content block"

    def _add_delta(self, index: Any, delta: Any) -> None:
        name = _TEXT_OF.get(str(delta.get("type"))) if isinstance(delta, dict) else ""
        if name is None:
            return  # a signature, a citation: not part of a prompt
        piece = delta.get(name) if name else None
        if index in self._texts and isinstance(piece, str):
            self._texts[index].append(piece)
        else:
            self.error = "the stream holds a delta that belongs to no block"

    def message(self) -> Message | None:
        for index, block in self._blocks.items():
            text, kind = "".join(self._texts[index]), block.get("type")
            if kind in ("text", "thinking"):
                block[kind] = (block.get(kind) or "") + text
            elif text:
                block["input"] = json_object(text.encode())
                if block["input"] is None:
                    self.error = "the arguments of a tool call are not a JSON object"
                    return None
        message = _message([self._blocks[index] for index in sorted(self._blocks)])
        self.error = "" if message else _UNREADABLE
        return message


def _usage(usage: Any, before: Usage | None = None) -> Usage | None:
    """Read a `usage` object; if it counts the completion only, the prompt is that of `before`."""
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) or 0 for name in _PROMPT]
    if not all(type(count) is int and count >= 0 for count in counts):
        return None
    prompt: dict[str, Any] = {"prompt_tokens": sum(counts), "cached": usage.get("cache_read_input_tokens")}
    if usage.get("input_tokens") is None:
        if before is None:
            return None
        prompt = {"prompt_tokens": before.prompt, "cached": before.cached}
    details = {"cached_tokens": prompt.pop("cached")}
    return engine_token_counts(
        {**prompt, "completion_tokens": usage.get("output_tokens"), "prompt_tokens_details": details}
    )

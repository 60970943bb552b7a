"""OpenAI Responses: `/v1/responses`.

Responses are stored by the gateway, never by the engine: `previous_response_id` becomes input items in front of the
request's own, the engine gets `store: false`, and `conversation` names a session of the gateway.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from gateway.dialects import response_items, sse
from gateway.dialects.base import (
    Call,
    Dialect,
    Reply,
    Storage,
    engine_token_counts,
    is_clean,
    json_object,
    model_of,
    sanitise,
    sentence,
    with_fields,
)
from gateway.errors import GatewayError, invalid_field
from gateway.records import Message, Usage
from gateway.validation.shown import shown

_FRAME_FIELDS = ("parallel_tool_calls", "chat_template_kwargs", "mm_processor_kwargs")
# A prompt that is not made of instructions and input.
_OTHER_PROMPTS = ("prompt", "previous_input_messages")
# What a window's conversation may have been rendered from, and this API has no field for.
_CHAT_ONLY = ("chat_template", "documents")
_FINAL = ("response.completed", "response.incomplete")
_LAST_EVENT = b"\n\nevent: response.completed\n"
_NUMBER = re.compile(rb'"sequence_number":(\d+)')


class ResponsesDialect(Dialect):
    """See `gateway.dialects.base.Dialect`."""

    name = "responses"
    begins_with_token = False  # `response.created` comes at once (vllm 0.32, openai/responses/serving.py)
    last_event = tuple(f"event: {kind}\n".encode() for kind in (*_FINAL, "response.failed"))

    def read(self, body: dict[str, Any], raw: bytes) -> Call:
        """See `Dialect.read`."""
        clean = is_clean(body)
        client_salt = sanitise(body)
        sent = _items(body.get("input"))
        before = len(body)
        storage = _storage(body, sent)
        return Call(
            body=body,
            raw=raw if clean and len(body) == before else b"",
            model=model_of(body),
            messages=_messages(body, sent),
            frame=_frame(body),
            client_salt=client_salt,
            storage=storage,
        )

    def write_with_salt(self, call: Call, salt: str) -> bytes:
        """See `Dialect.write_with_salt`."""
        body, raw = (call.body, call.raw) if call.front is None else (_with_front(call), b"")
        store = {} if "store" in body else {"store": False}
        return with_fields(raw, body, {"cache_salt": salt, **store})

    def error_event(self, error: GatewayError, sent: Sequence[bytes] = ()) -> bytes:
        """See `Dialect.error_event`."""
        shown = {
            "type": "error",
            "code": error.code,
            "message": sentence(error),
            "param": None,
            "sequence_number": _last_number(sent) + 1,
        }
        return b"event: error\ndata: " + orjson.dumps(shown) + b"\n\n"

    def _read_answer(self, answer: Mapping[str, Any]) -> Reply:
        usage, output = _usage(answer.get("usage")), answer.get("output")
        if answer.get("status") in ("failed", "cancelled"):
            return Reply(None, usage, str(answer.get("error") or f"the response is {answer['status']}"))
        if not isinstance(output, list):
            return Reply(None, usage, "the reply holds no output")
        return Reply(_message(output), usage, answer=answer)

    def _read_stream(self, chunks: Iterable[bytes]) -> Reply:
        # The event at the end holds the whole response; what came before it need not be read.
        stream = b"".join(chunks)
        end = stream[max(stream.rfind(_LAST_EVENT), 0) :]
        events = [data for data in sse.events([end]) if data != b"[DONE]"]
        last = json_object(events[-1]) if events else {}
        if last is None:
            return Reply(None, None, "the stream ended with an event that is not a JSON object")
        answer = last.get("response")
        if last.get("type") in _FINAL and isinstance(answer, dict):
            return self._read_answer(answer)
        return Reply(None, None, _error_in(last) or "the stream ended before response.completed")


# --- requests


def instructions_message(instructions: str) -> Message:
    """The message that the engine makes of `instructions`."""
    return {"role": "system", "content": instructions}


def _storage(body: dict[str, Any], sent: list[Any] | None) -> Storage:
    """Remove from `body` what the gateway does itself, and return it."""
    if body.get("background"):
        raise invalid_field("background", "background responses are not supported", "leave it out, or use stream")
    previous, conversation, store = body.get("previous_response_id"), body.get("conversation"), body.get("store")
    if previous is not None and not isinstance(previous, str):
        raise invalid_field(
            "previous_response_id", "previous_response_id must be a string", "send the id of a response"
        )
    if store is not None and not isinstance(store, bool):
        raise invalid_field("store", f"store must be true or false, not {shown(store, 50)}", "leave it out for true")
    if previous is not None and conversation is not None:
        raise invalid_field(
            "previous_response_id",
            "previous_response_id and conversation exclude each other",
            "send the one that the input continues",
        )
    for name, value in (("previous_response_id", previous), ("conversation", conversation), ("store", store)):
        if value:  # null and false mean to the engine what we mean
            del body[name]
    given = body.get("instructions")
    instructions = given if isinstance(given, str) else ""
    return Storage(previous, conversation is not None, store is not False, instructions, sent or [])


def _items(sent: object) -> list[Any] | None:
    if isinstance(sent, str):
        return [{"type": "message", "role": "user", "content": sent}]
    return sent if isinstance(sent, list) else None


def _messages(body: Mapping[str, Any], sent: list[Any] | None) -> list[Message]:
    """What the prompt is rendered from; empty if chat cannot express it, or the engine will refuse it."""
    instructions = body.get("instructions")
    plain = instructions is None or isinstance(instructions, str)
    if (
        sent is None
        or not plain
        or response_items.continues_reply(sent)
        or any(body.get(name) for name in _OTHER_PROMPTS)
    ):
        return []
    messages = response_items.read(sent)
    return [*([instructions_message(instructions)] if instructions else []), *messages] if messages else []


def _frame(body: Mapping[str, Any]) -> dict[str, Any]:
    frame = {name: body[name] for name in _FRAME_FIELDS if body.get(name) is not None}
    if tools := response_items.chat_tools(body.get("tools")):
        frame["tools"] = tools
        if choice := response_items.chat_tool_choice(body.get("tool_choice")):
            frame["tool_choice"] = choice
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict) and reasoning.get("effort"):
        frame["reasoning_effort"] = reasoning["effort"]
    return frame


def _with_front(call: Call) -> dict[str, Any]:
    """The body with the whole conversation as its input."""
    inherited = dict(call.front.frame) if call.front else {}
    if name := next((name for name in _CHAT_ONLY if name in inherited), None):
        raise invalid_field(name, f"the window's {name} cannot be expressed in the Responses API", "use chat")
    if "tools" in inherited:
        inherited["tools"] = response_items.response_tools(inherited["tools"])
    if effort := inherited.pop("reasoning_effort", None):
        inherited["reasoning"] = {**(call.body.get("reasoning") or {}), "effort": effort}
    whole = call.whole
    own = call.storage is not None and whole[:1] == [instructions_message(call.storage.instructions)]
    kept = call.body if own else {name: value for name, value in call.body.items() if name != "instructions"}
    return {**kept, **inherited, "input": response_items.write(whole[1:] if own else whole)}


# --- replies


def _error_in(event: Mapping[str, Any]) -> str:
    if event.get("type") == "error" or event.get("error") is not None:
        return str(event.get("message") or event.get("error"))
    answer = event.get("response")
    if event.get("type") == "response.failed" and isinstance(answer, dict):
        return str(answer.get("error") or "the response failed")
    return ""


def _message(output: list[Any]) -> Message | None:
    """The output as one assistant message; None if it is more than that."""
    messages = response_items.read(output)
    if messages is None or len(messages) > 1:
        return None
    return messages[0] if messages else {"role": "assistant", "content": ""}


def _usage(usage: object) -> Usage | None:
    if not isinstance(usage, Mapping):
        return None
    return engine_token_counts(
        {
            "prompt_tokens": usage.get("input_tokens"),
            "completion_tokens": usage.get("output_tokens"),
            "prompt_tokens_details": usage.get("input_tokens_details"),
        }
    )


def _last_number(sent: Sequence[bytes]) -> int:
    for chunk in reversed(sent):
        if numbers := _NUMBER.findall(chunk):
            return int(numbers[-1])
    return -1

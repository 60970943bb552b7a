"""Events, requests and replies of the Messages API."""

import json
from typing import Any

from gateway.dialects.messages import MessagesDialect
from tests.support.fakes.engine import MODEL
from tests.unit.dialects.test_messages_to_chat import call, text, use

MESSAGES = MessagesDialect()


HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": HI}


def event(kind: str, **fields: Any) -> bytes:
    """One event, spelt as vLLM spells it."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n".encode()


def start(prompt: int = 120) -> bytes:
    usage = {"input_tokens": prompt, "output_tokens": 0}
    head = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [], "model": MODEL}
    return event("message_start", message={**head, "stop_reason": None, "stop_sequence": None, "usage": usage})


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    begun = event("content_block_start", content_block=content, index=index)
    pieces = b"".join(event("content_block_delta", delta=delta, index=index) for delta in deltas)
    return begun + pieces + event("content_block_stop", index=index)


def words(index: int, *pieces: str) -> bytes:
    return block(index, text(""), *({"type": "text_delta", "text": piece} for piece in pieces))


def thought(index: int, *pieces: str) -> bytes:
    signed = {"type": "signature_delta", "signature": "50b20169"}
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    return block(index, {"type": "thinking", "thinking": ""}, *deltas, signed)


def tool(index: int, call_id: str, name: str, *pieces: str) -> bytes:
    return block(index, use(call_id, name, {}), *({"type": "input_json_delta", "partial_json": p} for p in pieces))


# As vLLM counts: the whole prompt at first, at the end without what was cached or is cached now.
USAGE = {"input_tokens": 8, "output_tokens": 9, "cache_creation_input_tokens": 16, "cache_read_input_tokens": 96}


def end(reason: str = "end_turn", usage: Any = USAGE) -> bytes:
    last = event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=usage)
    return last + event("message_stop")


PARALLEL = [
    start(),
    thought(0, "be", "cause"),
    words(1, "Let me look."),
    tool(2, "chatcmpl-tool-1", "get_weather", '{"', "city", '": "Zü', 'rich"}'),
    tool(3, "chatcmpl-tool-2", "now", "{}"),
    tool(4, "chatcmpl-tool-3", "now"),
    end("tool_use"),
]


PARALLEL_MESSAGE = {
    "role": "assistant",
    "reasoning": "because",
    "content": "Let me look.",
    "tool_calls": [
        call("chatcmpl-tool-1", "get_weather", '{"city": "Z\\u00fcrich"}'),
        call("chatcmpl-tool-2", "now", "{}"),
        call("chatcmpl-tool-3", "now", "{}"),
    ],
}


AS_SENT = (
    b'{ "model":"demo", "max_tokens": 9,\n"messages" : [{"role":"user","content":[{"type":"text","text":"\\u0068i",'
    b'"cache_control":{"type":"ephemeral"}}]}], "temperature": 0.10, "metadata": {"user_id": "u"} }\n'
)

"""The Responses API of the fake engine, in the shapes that vLLM sends."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.fakes.engine import MODEL, Exchange, FakeEngine

PATH = "/v1/responses"
_ids = itertools.count(1)


def said(text: str) -> dict[str, Any]:
    """A message of an output."""
    part = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
    return {"id": _id("msg"), "content": [part], "role": "assistant", "status": "completed", "type": "message",
            "phase": None}  # fmt: skip


def called(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    """A function call of an output."""
    return {"arguments": arguments, "call_id": call_id, "name": name, "type": "function_call", "id": _id("fc"),
            "namespace": None, "status": "completed"}  # fmt: skip


def thought(text: str) -> dict[str, Any]:
    """A reasoning item of an output."""
    return {"id": _id("rs"), "summary": [], "type": "reasoning", "encrypted_content": None, "status": None,
            "content": [{"text": text, "type": "reasoning_text"}]}  # fmt: skip


def usage_of(sent: int, said_: int, cached: int = 0) -> dict[str, Any]:
    """A `usage` object of this API."""
    return {
        "input_tokens": sent,
        "input_tokens_details": {
            "cached_tokens": cached, "cache_write_tokens": 0, "input_tokens_per_turn": [], "cached_tokens_per_turn": [],
        },
        "output_tokens": said_,
        "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0},
        "total_tokens": sent + said_,
    }  # fmt: skip


def response_of(
    body: Mapping[str, Any], output: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """A response object."""
    return {
        "id": body.get("request_id") or _id("resp"),
        "created_at": 1,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": MODEL,
        "object": "response",
        "output": list(output),
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "status": "completed",
        "tools": body.get("tools") or [],
        "usage": usage,
        **more,
    }


def stream_of(response: Mapping[str, Any]) -> list[bytes]:
    """The events of a streamed response: what vLLM sends for messages and calls, and the whole at the end."""
    begun = {**response, "output": [], "status": "in_progress", "usage": None}
    steps: list[tuple[str, dict[str, Any]]] = [("created", {"response": begun}), ("in_progress", {"response": begun})]
    for index, item in enumerate(response["output"]):
        steps.append(("output_item.added", {"item": item, "output_index": index}))
        text = item["content"][0]["text"] if item["type"] == "message" else item.get("arguments", "")
        kind = "output_text.delta" if item["type"] == "message" else "function_call_arguments.delta"
        steps += [(kind, {"delta": word, "item_id": item["id"], "output_index": index}) for word in text.split(" ")]
        steps.append(("output_item.done", {"item": item, "output_index": index}))
    steps.append(("completed", {"response": dict(response)}))
    return [event(f"response.{name}", number, **fields) for number, (name, fields) in enumerate(steps)]


def event(kind: str, number: int, **fields: Any) -> bytes:
    """One event, spelt as vLLM spells it."""
    data = json.dumps({**fields, "sequence_number": number, "type": kind}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n".encode()


def serve(engine: FakeEngine, *outputs: Sequence[Mapping[str, Any]]) -> None:
    """Let an engine answer with these outputs, one after the other, and then with `Hello there!`."""
    waiting = list(outputs)

    def answer(exchange: Exchange) -> None:
        if exchange.request.path != PATH:
            exchange.json({"detail": "Not Found"}, 404)
            return
        body = exchange.request.json
        sent = json.dumps([body.get("instructions"), body["input"]])[:-2].encode()
        usage = _usage(engine, body, list(sent))
        response = response_of(body, waiting.pop(0) if waiting else [said("Hello there!")], usage)
        if not body.get("stream"):
            exchange.json(response)
            return
        exchange.begin()
        for one in stream_of(response):
            exchange.chunk(one)
        exchange.end()

    engine.on_other = answer


def _usage(engine: FakeEngine, body: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
    counted = engine._usage(body.get("cache_salt"), ids, completion=3)
    return usage_of(counted["prompt_tokens"], 3, counted["prompt_tokens_details"]["cached_tokens"])


def _id(kind: str) -> str:
    return f"{kind}_{next(_ids):08x}"

"""Replies of the scripted engine, in vLLM's formats for chat, Responses and Messages.

A question names the tools to call, step by step: `[[NAME {"argument": 1}]]`, with `&` between calls of one step. Each
request gets the next step, by the number of steps since the question; after the last one comes a plain text.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

CREATED = 1_760_000_000
_REMINDER = "<system-reminder>"  # marks texts that Claude Code adds to the user's
_SEPARATOR = "__"  # between a namespace and its tool, as vLLM shows them to the model
_QUOTED = 80  # characters of a result
_IDS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function by the model."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: a text and its tool calls."""

    text: str
    calls: tuple[ToolCall, ...]
    prompt_tokens: int
    results: int  # tool results that are new in the request

    @property
    def pieces(self) -> list[str]:
        """The text, split as it is streamed."""
        return [word if at == 0 else f" {word}" for at, word in enumerate(self.text.split(" "))] if self.text else []


def steps(question: str) -> list[list[tuple[str, dict[str, Any]]]]:
    """Return the tool calls that a question names, step by step."""
    plan: list[list[tuple[str, dict[str, Any]]]] = []
    at, joined = 0, False
    while (at := question.find("[[", at)) >= 0:
        name, _, rest = question[at + 2 :].partition(" ")
        if not rest.startswith("{"):  # other brackets
            at += 2
            continue
        try:
            arguments, end = json.JSONDecoder().raw_decode(rest)
        except json.JSONDecodeError:  # the question quoted in a request for a title
            at += 2
            continue
        at += 2 + len(name) + 1 + end + 2
        if joined:
            plan[-1].append((name, arguments))
        else:
            plan.append([(name, arguments)])
        joined = question[at : at + 1] == "&"
    return plan


def answer(question: str, answered: int, offered: Sequence[str], results: Sequence[str], new: int, size: int) -> Reply:
    """Return the reply to a question after `answered` steps. A tool that is not offered is not called."""
    plan = steps(question)
    wanted = [call for call in plan[answered] if call[0] in offered] if answered < len(plan) else []
    if wanted:
        calls = [ToolCall(_id(question, answered, at), name, json.dumps(a)) for at, (name, a) in enumerate(wanted)]
        return Reply("I will look.", tuple(calls), size, new)
    quoted = " | ".join(result[:_QUOTED] for result in results)
    return Reply(f"That is all after {answered} steps.{f' The tool said: {quoted}' if quoted else ''}", (), size, new)


def _id(*parts: object) -> str:
    """Return an id that is always the same for the same call, so that a replayed recording gets its own replies."""
    return f"call_{sha256(repr(parts).encode()).hexdigest()[:12]}"


# Reading a request: the question, the steps since, and the tools on offer.


def read_chat(body: Mapping[str, Any]) -> Reply:
    """Return the next reply to a chat completion."""
    turns = [(m["role"], text_of(m.get("content")), bool(m.get("tool_calls"))) for m in body["messages"]]
    offered = [tool["function"]["name"] for tool in body.get("tools") or () if "function" in tool]
    return _next(turns, offered, body)


def read_messages(body: Mapping[str, Any]) -> Reply:
    """Return the next reply to a Messages request."""
    turns: list[tuple[str, str, bool]] = []
    for message in body["messages"]:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        results = [b for b in blocks if b["type"] == "tool_result"]
        turns += [("tool", text_of(b.get("content")), False) for b in results]
        called = any(b["type"] == "tool_use" for b in blocks)
        texts = [b["text"] for b in blocks if b["type"] == "text" and not b["text"].startswith(_REMINDER)]
        if called or (texts and not results):
            turns.append((message["role"], "\n".join(texts), called))
    return _next(turns, [tool["name"] for tool in body.get("tools") or ()], body)


def read_responses(body: Mapping[str, Any]) -> Reply:
    """Return the next reply to a Responses request."""
    content = body["input"]
    items = [{"role": "user", "content": content}] if isinstance(content, str) else content
    turns: list[tuple[str, str, bool]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            turns.append((item["role"], text_of(item["content"]), False))
        elif kind == "function_call" and (not turns or turns[-1][0] != "call"):
            turns.append(("call", "", True))  # parallel calls are one step
        elif kind == "function_call_output":
            turns.append(("tool", text_of(item["output"]), False))
    return _next(turns, list(_response_tools(body)), body)


def _response_tools(body: Mapping[str, Any]) -> Iterator[str]:
    for tool in body.get("tools") or ():
        inner = tool.get("tools") or () if tool["type"] == "namespace" else ()
        yield from (f"{tool['name']}{_SEPARATOR}{inner_tool['name']}" for inner_tool in inner)
        yield tool.get("name", "")


def text_of(content: object) -> str:
    """Return the text of a message's content, which may be in parts."""
    if isinstance(content, str) or not isinstance(content, list):
        return str(content or "")
    return "\n".join(str(part.get("text", "")) for part in content)


def _next(turns: Sequence[tuple[str, str, bool]], offered: Sequence[str], body: Mapping[str, Any]) -> Reply:
    question_at = max((at for at, (role, _, _) in enumerate(turns) if role == "user"), default=0)
    since = turns[question_at:]
    answered = sum(1 for _, _, called in since if called)
    results = [text for role, text, _ in since if role == "tool"]
    roles = [role for role, _, _ in turns if role != "system"]  # Claude Code may end with a system message
    new = sum(1 for _ in itertools.takewhile(lambda role: role == "tool", reversed(roles)))
    return answer(turns[question_at][1] if turns else "", answered, offered, results, new, len(json.dumps(body)) // 4)


# Writing a response, as vLLM 0.32 does.

Event = tuple[str, Mapping[str, Any]]


def _chat_usage(reply: Reply) -> dict[str, Any]:
    completion = 8
    details = {"cached_tokens": 0}
    return {"prompt_tokens": reply.prompt_tokens, "total_tokens": reply.prompt_tokens + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": details}  # fmt: skip


def chat_complete(reply: Reply, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chat completion that is not streamed."""
    calls = [_chat_call(call) for call in reply.calls]
    message = {"role": "assistant", "content": reply.text or None, "refusal": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls" if calls else "stop"}
    return {"id": f"chatcmpl-{next(_IDS)}", "object": "chat.completion", "created": CREATED, "model": body["model"],
            "choices": [choice], "usage": _chat_usage(reply)}  # fmt: skip


def chat_events(reply: Reply, body: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the events of a streamed chat completion."""
    head = {"id": f"chatcmpl-{next(_IDS)}", "object": "chat.completion.chunk", "created": CREATED,
            "model": body["model"]}  # fmt: skip

    def event(delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data({**head, "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    for piece in reply.pieces:
        yield event({"content": piece})
    for at, call in enumerate(reply.calls):
        opening = {"index": at, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        yield event({"tool_calls": [opening]})
        for part in _halves(call.arguments):
            yield event({"tool_calls": [{"index": at, "function": {"arguments": part}}]})
    yield event({}, "tool_calls" if reply.calls else "stop")
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _data({**head, "choices": [], "usage": _chat_usage(reply)})
    yield b"data: [DONE]\n\n"


def messages_complete(reply: Reply, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Messages response that is not streamed."""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in reply.calls
    ]
    usage = {"input_tokens": reply.prompt_tokens, "output_tokens": 8}
    return {"id": f"msg_{next(_IDS)}", "type": "message", "role": "assistant", "content": blocks,
            "model": body["model"], "stop_reason": _stop(reply), "stop_sequence": None, "usage": usage}  # fmt: skip


def messages_events(reply: Reply, body: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the events of a streamed Messages response."""
    start = {**messages_complete(reply, body), "content": [], "stop_reason": None}
    start["usage"] = {"input_tokens": reply.prompt_tokens, "output_tokens": 0}
    yield _named("message_start", {"message": start})
    for at, (block, deltas) in enumerate(_blocks(reply)):
        yield _named("content_block_start", {"index": at, "content_block": block})
        for delta in deltas:
            yield _named("content_block_delta", {"index": at, "delta": delta})
        yield _named("content_block_stop", {"index": at})
    end = {"stop_reason": _stop(reply), "stop_sequence": None}
    yield _named("message_delta", {"delta": end, "usage": {"input_tokens": reply.prompt_tokens, "output_tokens": 8}})
    yield _named("message_stop", {})


def _blocks(reply: Reply) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    if reply.text:
        yield {"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in reply.pieces]
    for call in reply.calls:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield block, [{"type": "input_json_delta", "partial_json": part} for part in _halves(call.arguments)]


def responses_complete(reply: Reply, body: Mapping[str, Any], status: str = "completed") -> dict[str, Any]:
    """Return a Responses response that is not streamed, or its frame while it is in progress."""
    completed = status == "completed"
    usage = {"input_tokens": reply.prompt_tokens, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 8,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": reply.prompt_tokens + 8}  # fmt: skip
    return {
        "id": f"resp_{next(_IDS)}", "object": "response", "created_at": CREATED, "model": body["model"],
        "status": status, "output": _items(reply) if completed else [], "error": None,
        "usage": usage if completed else None,
        "incomplete_details": None, "instructions": body.get("instructions"), "metadata": body.get("metadata"),
        "parallel_tool_calls": True, "previous_response_id": None, "temperature": 1.0, "top_p": 1.0,
        "tool_choice": body.get("tool_choice", "auto"), "tools": body.get("tools") or [], "background": False,
        "service_tier": "auto", "text": None, "truncation": "disabled", "user": None,
    }  # fmt: skip


def responses_events(reply: Reply, body: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the events of a streamed Responses response."""
    last = responses_complete(reply, body)
    first = {**responses_complete(reply, body, "in_progress"), "id": last["id"]}
    items = _items(reply)
    events: list[Event] = [("response.created", {"response": first}), ("response.in_progress", {"response": first})]
    for at, item in enumerate(items):
        events += _item_events(at, item, reply)
    # The final response carries the items with the ids that were streamed.
    events.append(("response.completed", {"response": {**last, "output": items}}))
    for number, (kind, fields) in enumerate(events):
        yield _named(kind, {**fields, "sequence_number": number})


def _items(reply: Reply) -> list[dict[str, Any]]:
    part = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": None}
    message = {"type": "message", "id": f"msg_{next(_IDS)}", "role": "assistant", "status": "completed",
               "content": [part]}  # fmt: skip
    calls = [_function_call(call) for call in reply.calls]
    return [message, *calls] if reply.text else calls


def _function_call(call: ToolCall) -> dict[str, Any]:
    namespace, _, name = call.name.rpartition(_SEPARATOR)
    item = {"type": "function_call", "id": f"fc_{next(_IDS)}", "call_id": call.id, "name": name,
            "arguments": call.arguments, "status": "completed"}  # fmt: skip
    return {**item, "namespace": namespace} if namespace else item


def _item_events(at: int, item: Mapping[str, Any], reply: Reply) -> list[Event]:
    where = {"item_id": item["id"], "output_index": at}
    if item["type"] == "function_call":
        started = {**item, "arguments": "", "status": "in_progress"}
        deltas = [("response.function_call_arguments.delta", {**where, "delta": d}) for d in _halves(item["arguments"])]
        finished = {**where, "name": item["name"], "arguments": item["arguments"]}
        return [_added(at, started), *deltas, ("response.function_call_arguments.done", finished), _done(at, item)]
    where |= {"content_index": 0}
    (part,) = item["content"]
    text = [("response.output_text.delta", {**where, "delta": piece, "logprobs": []}) for piece in reply.pieces]
    return [
        _added(at, {**item, "content": [], "status": "in_progress"}),
        ("response.content_part.added", {**where, "part": {**part, "text": ""}}),
        *text,
        ("response.output_text.done", {**where, "text": reply.text, "logprobs": []}),
        ("response.content_part.done", {**where, "part": part}),
        _done(at, item),
    ]


def _added(at: int, item: Mapping[str, Any]) -> Event:
    return "response.output_item.added", {"output_index": at, "item": item}


def _done(at: int, item: Mapping[str, Any]) -> Event:
    return "response.output_item.done", {"output_index": at, "item": item}


def _chat_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _stop(reply: Reply) -> str:
    return "tool_use" if reply.calls else "end_turn"


def _halves(text: str) -> list[str]:
    middle = len(text) // 2
    return [part for part in (text[:middle], text[middle:]) if part]


def _named(kind: str, fields: Mapping[str, Any]) -> bytes:
    body = json.dumps({"type": kind, **fields}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {body}\n\n".encode()


def _data(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"

"""What the scripted engine says: the steps written in a question, in vLLM's shapes for chat, Responses and Messages.

A question says which tools shall be called: `[[NAME {"argument": 1}]]`, several with `&` between them at once. Each
request answers the next step, by how many have been answered since the question; after the last comes a plain text.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

CREATED = 1_760_000_000
_REMINDER = "<system-reminder>"  # Claude Code puts texts of its own beside the user's
_IN = "__"  # between a namespace and a tool in it, as vLLM shows them to the model
_QUOTED = 80  # characters of a result
_IDS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Said:
    """One answer: a text, and tool calls beside it or none."""

    text: str
    calls: tuple[ToolCall, ...]
    prompt_tokens: int
    results: int  # of tools, new in the request

    @property
    def pieces(self) -> list[str]:
        """The text as it is streamed."""
        return [word if at == 0 else f" {word}" for at, word in enumerate(self.text.split(" "))] if self.text else []


def steps(question: str) -> list[list[tuple[str, dict[str, Any]]]]:
    """The tool calls that a question asks for, step by step."""
    found: list[list[tuple[str, dict[str, Any]]]] = []
    at, joined = 0, False
    while (at := question.find("[[", at)) >= 0:
        name, _, rest = question[at + 2 :].partition(" ")
        if not rest.startswith("{"):  # brackets of somebody else
            at += 2
            continue
        try:
            arguments, end = json.JSONDecoder().raw_decode(rest)
        except json.JSONDecodeError:  # the question in quotation marks, as a title is asked for
            at += 2
            continue
        at += 2 + len(name) + 1 + end + 2
        if joined:
            found[-1].append((name, arguments))
        else:
            found.append([(name, arguments)])
        joined = question[at : at + 1] == "&"
    return found


def answer(question: str, answered: int, offered: Sequence[str], results: Sequence[str], new: int, size: int) -> Said:
    """The next answer to a question after `answered` steps. A tool that is not offered is not called."""
    plan = steps(question)
    wanted = [call for call in plan[answered] if call[0] in offered] if answered < len(plan) else []
    if wanted:
        calls = [ToolCall(_id(question, answered, at), name, json.dumps(a)) for at, (name, a) in enumerate(wanted)]
        return Said("I will look.", tuple(calls), size, new)
    said = " | ".join(result[:_QUOTED] for result in results)
    return Said(f"That is all after {answered} steps.{f' The tool said: {said}' if said else ''}", (), size, new)


def _id(*what: object) -> str:
    """The same for the same: a recording that is played again gets the replies that it was made with."""
    return f"call_{sha256(repr(what).encode()).hexdigest()[:12]}"


# Reading: what was asked, how many steps are behind it, which tools there are.


def read_chat(body: Mapping[str, Any]) -> Said:
    """A chat completion's next answer."""
    turns = [(m["role"], text_of(m.get("content")), bool(m.get("tool_calls"))) for m in body["messages"]]
    offered = [tool["function"]["name"] for tool in body.get("tools") or () if "function" in tool]
    return _next(turns, offered, body)


def read_messages(body: Mapping[str, Any]) -> Said:
    """A Messages request's next answer."""
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


def read_responses(body: Mapping[str, Any]) -> Said:
    """A Responses request's next answer."""
    given = body["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    turns: list[tuple[str, str, bool]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            turns.append((item["role"], text_of(item["content"]), False))
        elif kind == "function_call" and (not turns or turns[-1][0] != "call"):
            turns.append(("call", "", True))  # calls side by side are one step
        elif kind == "function_call_output":
            turns.append(("tool", text_of(item["output"]), False))
    return _next(turns, list(_response_tools(body)), body)


def _response_tools(body: Mapping[str, Any]) -> Iterator[str]:
    for tool in body.get("tools") or ():
        inner = tool.get("tools") or () if tool["type"] == "namespace" else ()
        yield from (f"{tool['name']}{_IN}{named['name']}" for named in inner)
        yield tool.get("name", "")


def text_of(content: object) -> str:
    """The text of a message's content, whatever parts it is in."""
    if isinstance(content, str) or not isinstance(content, list):
        return str(content or "")
    return "\n".join(str(part.get("text", "")) for part in content)


def _next(turns: Sequence[tuple[str, str, bool]], offered: Sequence[str], body: Mapping[str, Any]) -> Said:
    asked = max((at for at, (role, _, _) in enumerate(turns) if role == "user"), default=0)
    since = turns[asked:]
    answered = sum(1 for _, _, called in since if called)
    results = [text for role, text, _ in since if role == "tool"]
    said = [role for role, _, _ in turns if role != "system"]  # Claude Code ends with words of its own
    new = sum(1 for _ in itertools.takewhile(lambda role: role == "tool", reversed(said)))
    return answer(turns[asked][1] if turns else "", answered, offered, results, new, len(json.dumps(body)) // 4)


# Writing, as vLLM 0.32 does.

Event = tuple[str, Mapping[str, Any]]


def _chat_usage(said: Said) -> dict[str, Any]:
    done = 8
    details = {"cached_tokens": 0}
    return {"prompt_tokens": said.prompt_tokens, "total_tokens": said.prompt_tokens + done, "completion_tokens": done,
            "prompt_tokens_details": details}  # fmt: skip


def chat_whole(said: Said, body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion in one piece."""
    calls = [_chat_call(call) for call in said.calls]
    message = {"role": "assistant", "content": said.text or None, "refusal": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls" if calls else "stop"}
    return {"id": f"chatcmpl-{next(_IDS)}", "object": "chat.completion", "created": CREATED, "model": body["model"],
            "choices": [choice], "usage": _chat_usage(said)}  # fmt: skip


def chat_events(said: Said, body: Mapping[str, Any]) -> Iterator[bytes]:
    """A chat completion as a stream."""
    head = {"id": f"chatcmpl-{next(_IDS)}", "object": "chat.completion.chunk", "created": CREATED,
            "model": body["model"]}  # fmt: skip

    def event(delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data({**head, "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    for piece in said.pieces:
        yield event({"content": piece})
    for at, call in enumerate(said.calls):
        named = {"index": at, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        yield event({"tool_calls": [named]})
        for part in _halves(call.arguments):
            yield event({"tool_calls": [{"index": at, "function": {"arguments": part}}]})
    yield event({}, "tool_calls" if said.calls else "stop")
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _data({**head, "choices": [], "usage": _chat_usage(said)})
    yield b"data: [DONE]\n\n"


def messages_whole(said: Said, body: Mapping[str, Any]) -> dict[str, Any]:
    """A Messages answer in one piece."""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": said.text}] if said.text else []
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in said.calls
    ]
    usage = {"input_tokens": said.prompt_tokens, "output_tokens": 8}
    return {"id": f"msg_{next(_IDS)}", "type": "message", "role": "assistant", "content": blocks,
            "model": body["model"], "stop_reason": _stop(said), "stop_sequence": None, "usage": usage}  # fmt: skip


def messages_events(said: Said, body: Mapping[str, Any]) -> Iterator[bytes]:
    """A Messages answer as a stream."""
    start = {**messages_whole(said, body), "content": [], "stop_reason": None}
    start["usage"] = {"input_tokens": said.prompt_tokens, "output_tokens": 0}
    yield _named("message_start", {"message": start})
    for at, (block, deltas) in enumerate(_blocks(said)):
        yield _named("content_block_start", {"index": at, "content_block": block})
        for delta in deltas:
            yield _named("content_block_delta", {"index": at, "delta": delta})
        yield _named("content_block_stop", {"index": at})
    end = {"stop_reason": _stop(said), "stop_sequence": None}
    yield _named("message_delta", {"delta": end, "usage": {"input_tokens": said.prompt_tokens, "output_tokens": 8}})
    yield _named("message_stop", {})


def _blocks(said: Said) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    if said.text:
        yield {"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in said.pieces]
    for call in said.calls:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield block, [{"type": "input_json_delta", "partial_json": part} for part in _halves(call.arguments)]


def responses_whole(said: Said, body: Mapping[str, Any], status: str = "completed") -> dict[str, Any]:
    """A Responses answer in one piece, or its frame while it is in progress."""
    done = status == "completed"
    usage = {"input_tokens": said.prompt_tokens, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 8,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": said.prompt_tokens + 8}  # fmt: skip
    return {
        "id": f"resp_{next(_IDS)}", "object": "response", "created_at": CREATED, "model": body["model"],
        "status": status, "output": _items(said) if done else [], "usage": usage if done else None, "error": None,
        "incomplete_details": None, "instructions": body.get("instructions"), "metadata": body.get("metadata"),
        "parallel_tool_calls": True, "previous_response_id": None, "temperature": 1.0, "top_p": 1.0,
        "tool_choice": body.get("tool_choice", "auto"), "tools": body.get("tools") or [], "background": False,
        "service_tier": "auto", "text": None, "truncation": "disabled", "user": None,
    }  # fmt: skip


def responses_events(said: Said, body: Mapping[str, Any]) -> Iterator[bytes]:
    """A Responses answer as a stream."""
    last = responses_whole(said, body)
    first = {**responses_whole(said, body, "in_progress"), "id": last["id"]}
    items = _items(said)
    events: list[Event] = [("response.created", {"response": first}), ("response.in_progress", {"response": first})]
    for at, item in enumerate(items):
        events += _item_events(at, item, said)
    # The ids of the items are those that were streamed.
    events.append(("response.completed", {"response": {**last, "output": items}}))
    for number, (kind, fields) in enumerate(events):
        yield _named(kind, {**fields, "sequence_number": number})


def _items(said: Said) -> list[dict[str, Any]]:
    part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": None}
    message = {"type": "message", "id": f"msg_{next(_IDS)}", "role": "assistant", "status": "completed",
               "content": [part]}  # fmt: skip
    calls = [_function_call(call) for call in said.calls]
    return [message, *calls] if said.text else calls


def _function_call(call: ToolCall) -> dict[str, Any]:
    namespace, _, name = call.name.rpartition(_IN)
    item = {"type": "function_call", "id": f"fc_{next(_IDS)}", "call_id": call.id, "name": name,
            "arguments": call.arguments, "status": "completed"}  # fmt: skip
    return {**item, "namespace": namespace} if namespace else item


def _item_events(at: int, item: Mapping[str, Any], said: Said) -> list[Event]:
    where = {"item_id": item["id"], "output_index": at}
    if item["type"] == "function_call":
        begun = {**item, "arguments": "", "status": "in_progress"}
        deltas = [("response.function_call_arguments.delta", {**where, "delta": d}) for d in _halves(item["arguments"])]
        done = {**where, "name": item["name"], "arguments": item["arguments"]}
        return [_added(at, begun), *deltas, ("response.function_call_arguments.done", done), _done(at, item)]
    where |= {"content_index": 0}
    (part,) = item["content"]
    text = [("response.output_text.delta", {**where, "delta": piece, "logprobs": []}) for piece in said.pieces]
    return [
        _added(at, {**item, "content": [], "status": "in_progress"}),
        ("response.content_part.added", {**where, "part": {**part, "text": ""}}),
        *text,
        ("response.output_text.done", {**where, "text": said.text, "logprobs": []}),
        ("response.content_part.done", {**where, "part": part}),
        _done(at, item),
    ]


def _added(at: int, item: Mapping[str, Any]) -> Event:
    return "response.output_item.added", {"output_index": at, "item": item}


def _done(at: int, item: Mapping[str, Any]) -> Event:
    return "response.output_item.done", {"output_index": at, "item": item}


def _chat_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _stop(said: Said) -> str:
    return "tool_use" if said.calls else "end_turn"


def _halves(text: str) -> list[str]:
    middle = len(text) // 2
    return [part for part in (text[:middle], text[middle:]) if part]


def _named(kind: str, fields: Mapping[str, Any]) -> bytes:
    body = json.dumps({"type": kind, **fields}, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {body}\n\n".encode()


def _data(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"

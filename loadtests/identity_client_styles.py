"""How clients send a conversation back: rarely exactly as they received it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.scripted_upstream import Message

StoreReply = Callable[[Message], Message]
PrepareMessages = Callable[[Sequence[Message]], list[Message]]


def _unchanged(messages: Sequence[Message]) -> list[Message]:
    return list(messages)


@dataclass(frozen=True, slots=True)
class Client:
    """`store` turns a reply into the message that it keeps, `prepare` the history into the messages that it sends."""

    name: str
    store: StoreReply
    prepare: PrepareMessages = _unchanged


def _bare(reply: Message) -> Message:
    """Keep role, text and tool calls, but not the reasoning."""
    return {name: value for name, value in reply.items() if name != "reasoning"}


def _dumped(reply: Message) -> Message:
    """Keep what the openai client's `message.model_dump()` returns: all fields, null or not, the engine's included."""
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None,
             "reasoning": None}  # fmt: skip
    return {**empty, **reply}


def _dropping(reply: Message) -> Message:
    """Drop fields that are null."""
    return {name: value for name, value in _bare(reply).items() if value is not None}


def _assembled(reply: Message) -> Message:
    """Keep an assembled stream: tool calls keep their index, and a missing text is empty."""
    kept = {**_bare(reply), "content": reply["content"] or ""}
    if "tool_calls" in reply:
        kept["tool_calls"] = [{"index": i, **call} for i, call in enumerate(reply["tool_calls"])]
    return kept


def _trimmed(reply: Message) -> Message:
    kept = _bare(reply)
    if kept["content"]:
        kept["content"] = kept["content"].strip()
    return kept


def _rewritten(reply: Message, separators: tuple[str, str], *, integers: bool) -> Message:
    """Parse tool arguments and write them again; `integers`: 1.0 becomes 1, as in JavaScript."""
    kept = _bare(reply)
    if "tool_calls" in kept:
        kept["tool_calls"] = [_call_rewritten(call, separators, integers) for call in kept["tool_calls"]]
    return kept


def _call_rewritten(call: Message, separators: tuple[str, str], integers: bool) -> Message:
    def number(text: str) -> float | int:
        value = float(text)
        return int(value) if integers and value.is_integer() else value

    value = json.loads(call["function"]["arguments"], parse_float=number)
    text = json.dumps(value, separators=separators, ensure_ascii=not integers)
    return {"type": call["type"], "id": call["id"], "function": {"arguments": text, "name": call["function"]["name"]}}


def _thinking_in_text(reply: Message) -> Message:
    """Put the reasoning in front of the text."""
    kept = _bare(reply)
    if reply.get("reasoning"):
        kept["content"] = f"<think>\n{reply['reasoning']}\n</think>\n\n{reply['content'] or ''}"
    return kept


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [_parts(message) for message in messages]


def _parts(message: Message, **more: object) -> Message:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"], **more}]}


def _marked(messages: Sequence[Message]) -> list[Message]:
    """Put a cache breakpoint on the last message, whose content is a string again in the next request."""
    return [*messages[:-1], _parts(messages[-1], cache_control={"type": "ephemeral"})]


CLIENTS = (
    Client("bare", _bare),
    Client("dumps every field", _dumped),
    Client("drops null fields", _dropping),
    Client("keeps stream indexes", _assembled),
    Client("trims text", _trimmed),
    Client("respells arguments, Python", lambda reply: _rewritten(reply, (", ", ": "), integers=False)),
    Client("respells arguments, JavaScript", lambda reply: _rewritten(reply, (",", ":"), integers=True)),
    Client("content in parts", _dropping, _in_parts),
    Client("moving cache marks", _bare, _marked),
    Client("thinking in the text", _thinking_in_text),
)

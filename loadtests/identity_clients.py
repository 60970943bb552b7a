"""How clients send a conversation back: never quite as they received it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.scripted_upstream import Message

Back = Callable[[Message], Message]
Dress = Callable[[Sequence[Message]], list[Message]]


def _as_it_is(messages: Sequence[Message]) -> list[Message]:
    return list(messages)


@dataclass(frozen=True, slots=True)
class Client:
    """`back` is what it keeps of a reply, `dress` what it does to the whole list each time it sends it."""

    name: str
    back: Back
    dress: Dress = _as_it_is


def _bare(reply: Message) -> Message:
    """Role, text and tool calls, without the reasoning."""
    return {name: value for name, value in reply.items() if name != "reasoning"}


def _dumped(reply: Message) -> Message:
    """The openai client's `message.model_dump()`: every field there is, null or not, the engine's own too."""
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None,
             "reasoning": None}  # fmt: skip
    return {**empty, **reply}


def _dropping(reply: Message) -> Message:
    """No field that is null."""
    return {name: value for name, value in _bare(reply).items() if value is not None}


def _assembled(reply: Message) -> Message:
    """A stream put together: tool calls keep their index, and a text that never came is empty."""
    kept = {**_bare(reply), "content": reply["content"] or ""}
    if "tool_calls" in reply:
        kept["tool_calls"] = [{"index": i, **call} for i, call in enumerate(reply["tool_calls"])]
    return kept


def _trimmed(reply: Message) -> Message:
    kept = _bare(reply)
    if kept["content"]:
        kept["content"] = kept["content"].strip()
    return kept


def _respelt(reply: Message, separators: tuple[str, str], *, whole: bool) -> Message:
    """Tool arguments parsed and written again; `whole`: 1.0 as 1, as JavaScript has it."""
    kept = _bare(reply)
    if "tool_calls" in kept:
        kept["tool_calls"] = [_call_respelt(call, separators, whole) for call in kept["tool_calls"]]
    return kept


def _call_respelt(call: Message, separators: tuple[str, str], whole: bool) -> Message:
    def number(text: str) -> float | int:
        value = float(text)
        return int(value) if whole and value.is_integer() else value

    value = json.loads(call["function"]["arguments"], parse_float=number)
    spelt = json.dumps(value, separators=separators, ensure_ascii=not whole)
    return {"type": call["type"], "id": call["id"], "function": {"arguments": spelt, "name": call["function"]["name"]}}


def _thinking_in_text(reply: Message) -> Message:
    """The reasoning is put in front of the text."""
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
    """A cache breakpoint on the last message, which is a string again in the next request."""
    return [*messages[:-1], _parts(messages[-1], cache_control={"type": "ephemeral"})]


CLIENTS = (
    Client("bare", _bare),
    Client("dumps every field", _dumped),
    Client("drops null fields", _dropping),
    Client("keeps stream indexes", _assembled),
    Client("trims text", _trimmed),
    Client("respells arguments, Python", lambda reply: _respelt(reply, (", ", ": "), whole=False)),
    Client("respells arguments, JavaScript", lambda reply: _respelt(reply, (",", ":"), whole=True)),
    Client("content in parts", _dropping, _in_parts),
    Client("moving cache marks", _bare, _marked),
    Client("thinking in the text", _thinking_in_text),
)

"""Whether a request goes on from a transcript, and what the engine then gets to see.

Clients do not send back exactly what they received: fields that are null or empty come and go, a text may be a string
or a list of one text part, reasoning is usually dropped, or put in front of the text. `same` looks through that; what
is sent to the engine stays as the client, or the window, has it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import orjson

from gateway import texts
from gateway.errors import GatewayError
from gateway.records import Front, Message

SystemRule = Literal["", "keep", "replace"]

_SYSTEM_ROLES = ("system", "developer")  # no set: a client may send a list for a role, which has no hash
# Fields of a reply that the next turn's prompt does not hold, or that say nothing when they are empty.
_IGNORED = frozenset({"reasoning", "reasoning_content", "refusal", "annotations", "audio", "function_call"})

_64_BIT = 2.0**63


def canonical(message: Message) -> dict[str, Any]:
    """The message without what clients change on the way."""
    kept = {name: value for name, value in message.items() if name not in _IGNORED and value not in (None, "", [], {})}
    content = kept.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        kept["content"] = content = "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, str) and message.get("role") == "assistant":
        kept["content"] = _unthought(content).strip()  # many clients trim a reply
    if kept.get("content") == "":
        del kept["content"]
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_canonical_call(call) for call in kept["tool_calls"]]
    return kept


def _unthought(text: str) -> str:
    """A reply without the reasoning in front, which engines and clients put there and take away."""
    return text.partition("</think>")[2] or text if text.lstrip().startswith("<think>") else text


def _canonical_call(call: Any) -> Any:
    """A tool call with its arguments as a value: clients parse them and write them down again with other spaces.

    A call in a stream has an index, which some clients keep.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    kept = {name: value for name, value in call.items() if name != "index"}
    try:
        arguments = orjson.loads(function["arguments"])
    except orjson.JSONDecodeError:
        return kept
    return {**kept, "function": {**function, "arguments": _whole_numbers(arguments)}}


def _whole_numbers(value: Any) -> Any:
    """A JSON value in which 1.0 is written as 1, as other languages do.

    Beyond 64 bits a number is a float however it was written, and has to stay one: no such integer can be hashed.
    """
    if isinstance(value, dict):
        return {name: _whole_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(one) for one in value]
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _64_BIT
    return int(value) if whole else value


def same(a: Message, b: Message) -> bool:
    """Whether two messages mean the same to the conversation."""
    return a == b or canonical(a) == canonical(b)


def common(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many leading messages two lists share."""
    length = 0
    for one, other in zip(a, b, strict=False):
        if not same(one, other):
            break
        length += 1
    return length


def missing(window: Sequence[Message], sent: Sequence[Message], rule: SystemRule) -> Front | None:
    """Return what of a window's transcript a turn in a thawed session lacks; None where it was sent whole.

    `sent` is a full history if it begins with the window's messages, or if it shares at least the system message and
    the first exchange with them (then the client edited it later on, and putting the window in front would say it all
    twice).
    Otherwise it is what is new. Raises `window_system_conflict` when it brings another system message and `rule` does
    not say which to use, and `invalid_request` where one is a chat and the other is not.
    """
    if texts.kind(window) or texts.kind(sent):
        return texts.missing(window, sent)
    window_system, window_rest = split(window)
    sent_system, sent_rest = split(sent)
    shared = common(window_rest, sent_rest)
    full = shared == len(window_rest) or shared >= 2
    agree = len(window_system) == len(sent_system) and common(window_system, sent_system) == len(window_system)
    if full and agree:
        return None
    if sent_system and not agree and not rule:
        raise GatewayError(
            "window_system_conflict",
            "the request's system message differs from the window's",
            hint="send the window's own or none, or say which to use with X-Window-System: keep or replace",
        )
    theirs = agree or (sent_system and rule == "replace")
    return Front(None if theirs else window_system, [] if full else window_rest)


def merged(front: Front, sent: Sequence[Message]) -> list[Message]:
    """Return the whole conversation: what `sent` lacked, and `sent`."""
    if texts.kind(sent):
        return texts.joined([*front.history, *sent])
    system, rest = split(sent)
    return [*(system if front.system is None else front.system), *front.history, *rest]


def followed(conversation: Sequence[Message], reply: Message, *, echoes: bool) -> list[Message]:
    """Return the conversation with its reply."""
    if texts.kind(conversation):
        return texts.followed(conversation, reply, echoes=echoes)
    return [*conversation, reply]


def has_media(messages: Sequence[Message]) -> bool:
    """Whether a message holds anything but text: its KV objects then cannot be named from token ids (LMCache hashes
    the media in place of its placeholder tokens)."""
    return any(
        isinstance(part, dict) and part.get("type") not in ("text", "refusal", None)
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def hoisted(messages: Sequence[Message]) -> list[Message] | None:
    """Return the conversation with the text of all its system messages in one, in front.

    So vLLM makes a prompt of an Anthropic conversation where the template wants the system message first. None where
    none is elsewhere, or where one is of several parts, which that conversation never has.
    """
    texts = [message.get("content") for message in messages if message.get("role") == "system"]
    rest = [message for message in messages if message.get("role") != "system"]
    if list(messages[len(texts) :]) == rest or not all(isinstance(text, str) for text in texts):
        return None
    return [{"role": "system", "content": "".join(map(str, texts))}, *rest]


def leading(messages: Sequence[Message]) -> int:
    """How many system messages a conversation begins with."""
    count = 0
    while count < len(messages) and messages[count].get("role") in _SYSTEM_ROLES:
        count += 1
    return count


def split(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Leading system messages, and the rest."""
    count = leading(messages)
    return list(messages[:count]), list(messages[count:])

"""Whether a request continues a transcript, and what the engine is sent in that case.

Clients do not send back exactly what they received: fields that are null or empty come and go, a text may be a string
or a list of one text part, reasoning is usually dropped, or put in front of the text. `same` looks through that; what
is sent to the engine stays as the client, or the window, has it.
"""

from collections.abc import Sequence
from typing import Any, Literal

from gateway.dialects import text_transcripts
from gateway.errors import GatewayError
from gateway.records import Front, Message
from gateway.validation import json_limits

SystemRule = Literal["", "keep", "replace"]

SYSTEM_ROLES = ("system", "developer")  # not a set: a client may send a list for a role, which has no hash
# Fields of a reply that the next turn's prompt does not hold, or that mean nothing when they are empty.
_IGNORED = frozenset(
    {"reasoning", "reasoning_content", "refusal", "annotations", "audio", "function_call", "provider_specific_fields"}
)  # the last is litellm's

_64_BIT = 2.0**63
_DISTINCTIVE = 24  # characters of a reply that two conversations are unlikely to share by chance


def canonical(message: Message) -> dict[str, Any]:
    """The message without what clients change on the way."""
    kept = {name: value for name, value in message.items() if name not in _IGNORED and value not in (None, "", [], {})}
    content = kept.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        kept["content"] = content = "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, str) and message.get("role") == "assistant":
        kept["content"] = _without_reasoning(content).strip()  # many clients trim a reply
    if kept.get("content") == "":
        del kept["content"]
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_canonical_call(call) for call in kept["tool_calls"]]
    return kept


def _without_reasoning(text: str) -> str:
    """A reply without the reasoning in front, which engines and clients add and remove."""
    return text.partition("</think>")[2] or text if text.lstrip().startswith("<think>") else text


def _canonical_call(call: Any) -> Any:
    """A tool call with its arguments parsed: clients parse them and serialise them again with other spaces.

    A call in a stream has an index, which some clients keep.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    kept = {name: value for name, value in call.items() if name != "index"}
    try:
        arguments = json_limits.parse_text(function["arguments"])
    except ValueError:
        return kept
    return {**kept, "function": {**function, "arguments": _whole_numbers(arguments)}}


def _whole_numbers(value: Any) -> Any:
    """A JSON value in which 1.0 is written as 1, as other languages do.

    Beyond 64 bits a number is a float however it was written, and stays one: no such integer can be hashed.
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


def is_distinctive(reply: Message) -> bool:
    """Whether a reply is unlikely to occur in another conversation: it is long, or calls tools (ids are random)."""
    kept = canonical(reply)  # the same however the client sends it back
    content = kept.get("content")
    return "tool_calls" in kept or (isinstance(content, str) and len(content) >= _DISTINCTIVE)


def common(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many leading messages two lists share."""
    length = 0
    for one, other in zip(a, b, strict=False):
        if not same(one, other):
            break
        length += 1
    return length


def is_whole(window: Sequence[Message], sent: Sequence[Message]) -> bool:
    """Whether `sent` holds a window's transcript, apart perhaps from the system messages.

    It does if it begins with the window's messages, or shares at least the first exchange with them: then the client
    edited it later on, and with the window in front it would be there twice. A distinctive first reply stands for the
    exchange: many clients remove from a question what they had put around it (a reminder, passages).
    """
    if text_transcripts.kind(window) or text_transcripts.kind(sent):
        return text_transcripts.is_whole(window, sent)
    rest, theirs = split(window)[1], split(sent)[1]
    shared = common(rest, theirs)
    if shared == len(rest) or shared >= 2:
        return True
    place = _first_reply(rest)
    if place is None or place != _first_reply(theirs):
        return False
    return is_distinctive(theirs[place]) and same(rest[place], theirs[place])


def _first_reply(messages: Sequence[Message]) -> int | None:
    return next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), None)


def missing(
    window: Sequence[Message], sent: Sequence[Message], rule: SystemRule, current: Sequence[Message] | None = None
) -> Front | None:
    """Return what a turn in a thawed session lacks of its conversation; None where it was sent whole.

    `current` is the session's transcript by now, None if that is still the window's. If `sent` is not whole
    (`is_whole`), it is joined to the transcript where the two overlap, so that the last turns are not there twice if a
    client keeps only those; messages that are all new follow the whole transcript. A client that sends replies of the
    transcript keeps its conversation itself, and its own system message counts: it may tell the time, or be that of a
    sub-agent. Raises `window_system_conflict` if messages that are all new bring another system message and `rule` does
    not say which to use, and `invalid_request` if one is a chat and the other is not.
    """
    if text_transcripts.kind(window) or text_transcripts.kind(sent):
        return text_transcripts.missing(window, sent, current)
    had = window if current is None else current
    full = is_whole(window, sent)
    system, theirs = split(window if full else had)[0], split(sent)[0]
    agree = len(system) == len(theirs) and common(system, theirs) == len(system)
    if full and (agree or (theirs and not rule)):
        return None
    if theirs and not agree and not rule and _overlap(split(had)[1], split(sent)[1]) is None:
        raise GatewayError(
            "window_system_conflict",
            "the request's system message differs from the window's",
            hint="send the window's own or none, or say which to use with X-Window-System: keep or replace",
        )
    kept = None if agree or (theirs and rule != "keep") else system
    if full:
        return Front(kept, [])
    rest = split(window)[1]
    history, unsure = _history_before(rest, split(had)[1], split(sent)[1])
    within = len(history) <= len(rest) and common(history, rest) == len(history)
    return Front(kept, history, origin="window" if within else "session", unsure=unsure)


def _history_before(
    window: list[Message], current: list[Message], sent: Sequence[Message]
) -> tuple[list[Message], bool]:
    """What stands in front of `sent`, and whether the client may have meant otherwise.

    All of these are without their leading system messages.
    """
    since = current[len(window) :] if common(window, current) == len(window) else []
    repeated = common(since, sent)
    reply = _first_reply(sent)
    if repeated and (reply is not None or sum(message.get("role") == "assistant" for message in since) == 1):
        # The client keeps the turns since the window, or asks the first question again.
        return window, repeated == len(sent)
    if reply is None:
        return current, repeated > 0
    start = _overlap(current, sent)
    # At its very beginning: a successor, which has what was left out from the window.
    return (current[:start], False) if start else (window, bool(since) and start is None)


def _overlap(current: Sequence[Message], sent: Sequence[Message]) -> int | None:
    """Where in a transcript `sent` begins, judged by its first reply and what precedes that: the place with most
    messages shared, the latest of several. None if it has no reply, or none of the transcript's."""
    reply = _first_reply(sent)
    if reply is None:
        return None
    starts = [at - reply for at in range(reply, len(current)) if same(current[at], sent[reply])]
    shared = {start: common(current[start:], sent) for start in starts}
    fitting = [start for start, length in shared.items() if length > reply]
    return max(fitting, key=lambda start: (shared[start], start), default=None)


def merged(front: Front, sent: Sequence[Message]) -> list[Message]:
    """Return the whole conversation: what `sent` lacked, and `sent`."""
    if text_transcripts.kind(sent):
        return text_transcripts.joined([*front.history, *sent])
    system, rest = split(sent)
    return [*(system if front.system is None else front.system), *front.history, *rest]


def followed(conversation: Sequence[Message], reply: Message, *, echoes: bool) -> list[Message]:
    """Return the conversation with its reply."""
    if text_transcripts.kind(conversation):
        return text_transcripts.followed(conversation, reply, echoes=echoes)
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

    vLLM does so with an Anthropic conversation if the template wants the system message first. None if all of them are
    in front already, or if one has several parts, which that conversation never has.
    """
    texts = [message.get("content") for message in messages if message.get("role") == "system"]
    rest = [message for message in messages if message.get("role") != "system"]
    if list(messages[len(texts) :]) == rest or not all(isinstance(text, str) for text in texts):
        return None
    return [{"role": "system", "content": "".join(map(str, texts))}, *rest]


def leading(messages: Sequence[Message]) -> int:
    """How many system messages a conversation begins with."""
    count = 0
    while count < len(messages) and messages[count].get("role") in SYSTEM_ROLES:
        count += 1
    return count


def split(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Leading system messages, and the rest."""
    count = leading(messages)
    return list(messages[:count]), list(messages[count:])

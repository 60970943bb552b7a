"""Transcripts of the completions API: one growing text, or one growing list of token ids.

In a transcript such a conversation is one message, `{"role": "text", "content": "..."}` or `{"role": "tokens",
"content": [1, 2]}`, prompts and replies together: nothing in it tells them apart. Only a list of token ids whose last
reply is known as text alone (the client did not ask for its ids) has that text behind it, as a second message.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from gateway.errors import GatewayError
from gateway.records import Front, Message

TEXT = "text"
TOKENS = "tokens"
NAMES = {TEXT: "a text", TOKENS: "a list of token ids"}
_HOW = {
    TEXT: "send a text to /v1/completions",
    TOKENS: "send a list of token ids to /v1/completions",
    "": "send messages to /v1/chat/completions",
}

_Row = TypeVar("_Row", str, list[int])


def kind(messages: Sequence[Message]) -> str:
    """The kind of a conversation: `text`, `tokens`, or "" for chat messages."""
    role = messages[0].get("role") if messages else ""
    if role not in (TEXT, TOKENS) or any(message.get("role") not in (TEXT, TOKENS) for message in messages):
        return ""
    return str(role)


def is_whole(window: Sequence[Message], sent: Sequence[Message]) -> bool:
    """Whether `sent` begins with a window's text, or with more than half of it: then the client edited the rest.

    Raises `invalid_request` if the two are not of one kind.
    """
    had, has = kind(window), kind(sent)
    if had != has:
        raise GatewayError(
            "invalid_request",
            f"the session continues from {NAMES.get(had, 'a chat')}, which {NAMES.get(has, 'a chat')} cannot follow",
            hint=f"{_HOW[had]}, or use another session",
        )
    start = window[0]["content"]
    return shared(start, sent[0]["content"]) * 2 > len(start)


def missing(
    window: Sequence[Message], sent: Sequence[Message], current: Sequence[Message] | None = None
) -> Front | None:
    """Return what a turn in a thawed session lacks of its text; None if it was sent whole.

    `current` is the session's text by now, None if that is still the window's. Raises as `is_whole` does.
    """
    if is_whole(window, sent):
        return None
    if current is None or kind(current) != kind(sent) or len(window) > 1:
        return Front(None, window, origin="window")
    new = sent[0]["content"]
    repeated = current[0]["content"][len(window[0]["content"]) :][: len(new)] == new
    return Front(None, window, origin="window", unsure=True) if repeated else Front(None, current, origin="session")


def joined(parts: Iterable[Message]) -> list[Message]:
    """Join consecutive parts of one kind into one message."""
    conversation: list[Message] = []
    for part in parts:
        before = conversation[-1] if conversation else {}
        if before.get("role") == part["role"]:
            conversation[-1] = {"role": part["role"], "content": before["content"] + part["content"]}
        else:
            conversation.append({"role": part["role"], "content": part["content"]})
    return conversation


def followed(conversation: Sequence[Message], reply: Message, *, echoes: bool) -> list[Message]:
    """The conversation with its reply, as text or as the token ids that came with it; an echo is all of it."""
    if echoes:
        return [{"role": TEXT, "content": reply["content"]}]
    ids: Any = reply.get("token_ids")
    if conversation[-1]["role"] == TOKENS and ids is not None:
        return joined([*conversation, {"role": TOKENS, "content": ids}])
    return joined([*conversation, reply])


def shared(one: _Row, other: _Row) -> int:
    """How many leading characters two texts, or ids two lists, have in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""The title of a conversation: the first words of its first user message, safe to print on one line."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from gateway.dialects import text_transcripts
from gateway.records import Message

MAX_TITLE = 80  # characters
_ROLES = ("user", text_transcripts.TEXT)  # not a set: a client may send a list for a role, which has no hash
_LOOKED_AT = 8  # user messages, if the first ones hold only what an agent has added
_RAW = 1000  # characters of a message that may become the title
# What agents wrap their own additions in (<system-reminder>, <environment_context>); no HTML element has such a name.
_WRAPPER = re.compile(r"\s*+<([A-Za-z][\w.-]{1,63}+)(?:\s[^<>]{0,500}+)?>")
_JOINERS = "\u200c\u200d"  # invisible, but part of words and emoji


def title_of(messages: Sequence[Message]) -> str | None:
    """Return the title, at most `MAX_TITLE` characters without control or direction characters; None without text."""
    fallback = ""
    for text in _user_texts(messages):
        if title := one_line(_without_wrappers(text), MAX_TITLE):
            return title
        fallback = fallback or one_line(text, MAX_TITLE)
    return fallback or None


def _user_texts(messages: Sequence[Message]) -> Iterator[str]:
    found = (message.get("content") for message in messages if message.get("role") in _ROLES)
    return map(plain_text, islice(found, _LOOKED_AT))


def plain_text(content: Any) -> str:
    """The text of a message's content, a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _without_wrappers(text: str) -> str:
    """The text after the elements that an agent put in front of it."""
    while (tag := _WRAPPER.match(text)) and ("-" in tag[1] or "_" in tag[1]):
        _, closed, rest = text[tag.end() :].partition(f"</{tag[1]}>")
        if not closed:
            break
        text = rest
    return text


def one_line(text: str, length: int) -> str:
    """The beginning of a text on one line, without characters that a terminal or a page obeys."""
    line = " ".join(text.lstrip()[: max(_RAW, length)].split())
    if not line.isprintable():
        line = " ".join("".join(map(_printable, line)).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _printable(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    return " " if unicodedata.category(char) == "Cc" else ""

"""Aliases of a reply, by which its session is found when the client has changed something before the reply.

The prefix chain (`prefix_chain`) finds a conversation only while every message before the last reply stays the same.
Many clients change some of them on purpose: a system prompt tells the time, a reminder or retrieved passages are part
of the last question and are removed from it in the next request, the oldest turns are trimmed away. So each reply is
also recorded by its own hash, together with digests of the history and of the question that it answers. It is looked
for with both, with the history, and alone: each `Kind` leaves more out. Digests of the system prompt, the tools and the
lines of the question are stored with it (`marks`) and compared when it is found. They also tell sub-agents apart, which
send the conversation of their parent under another system prompt and with other tools.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from zlib import crc32

from blake3 import blake3
from msgspec import Struct

from gateway.dialects import transcripts
from gateway.records import Alias, Message

# What is left out when a reply is looked for, the least first:
# system: the system prompt · question: that, and the last question · history: that, and everything before it
Kind = Literal["system", "question", "history"]
KINDS: tuple[Kind, ...] = ("system", "question", "history")

_DIGEST = 16
_MARK = 8
_NONE = bytes(_MARK)  # in marks, whose parts are of one length
_HEAD_CHARS, _TAIL_CHARS = 1_000, 4_000  # of a question's text, from its beginning and its end
_HEAD_LINES, _TAIL_LINES = 8, 24
_LABEL_CHARS = 24
_LABEL = re.compile(r"(?:\[[^\]]{0,60}\]\s*)?(?:\w[\w ]{0,20}:\s+)?")
_DIGITS = b"0123456789"
_TAG = re.compile(r"</?[\w-]{1,60}>")


class Context(Struct, frozen=True):
    """What a reply answers, as digests. `history` is all between the system prompt and the question, b"" if nothing."""

    start: bytes
    system: bytes
    tools: bytes
    history: bytes
    question: bytes
    lines: frozenset[int]

    @classmethod
    def of(cls, start: bytes, messages: Sequence[Message], digests: Sequence[bytes], tools: bytes) -> "Context":
        """The context that consists of `messages`, with their `digests`; `tools` is what `tool_names` returns."""
        system = transcripts.leading(messages)
        asked = len(messages)
        while asked > system and messages[asked - 1].get("role") != "assistant":
            asked -= 1
        return cls(
            start,
            _undated(messages[:system], digests[:system]),
            _mark([digest(tools)]) if tools else _NONE,
            _mark(digests[system:asked]),
            _mark(digests[asked:]),
            frozenset(_lines(messages[asked:])),
        )

    def aliases(self, reply: Message, reply_hash: bytes) -> tuple[Alias, ...]:
        """The aliases of a reply to this.

        A short reply occurs too often to be looked for by its text alone: it has a second alias, which includes the
        system prompt and the tools.
        """
        own = self.system + self.tools
        marks = own + struct.pack(f">{len(self.lines)}I", *self.lines)
        alias = Alias(digest(self.start + reply_hash), self.history, self.question, marks)
        if transcripts.is_distinctive(reply):
            return (alias,)
        return alias, alias._replace(link=digest(self.start + own + reply_hash))


class Answered(Struct, frozen=True):
    """A reply in a request: how many messages there are up to it and with it, what it answers, and its aliases."""

    depth: int
    context: Context
    aliases: Sequence[Alias]


class Marks(Struct, frozen=True):
    """What is stored with an alias."""

    system: bytes
    tools: bytes
    lines: frozenset[int]

    @classmethod
    def read(cls, marks: bytes) -> "Marks":
        """Read what `Context.aliases` wrote."""
        lines = struct.iter_unpack(">I", marks[2 * _MARK :])
        return cls(marks[:_MARK], marks[_MARK : 2 * _MARK], frozenset(line for (line,) in lines))


def has_alias(kind: Kind, aliases: Sequence[Alias], there: Alias) -> bool:
    """Whether a reply recorded as `there` has one of `aliases`, with `kind` left out."""
    full, alone = aliases[0], aliases[-1]
    if kind == "history":
        return there.link == alone.link
    if kind == "question":
        return there.link == (full if full.history else alone).link and there.history == full.history
    return there[:3] == full[:3]


Match = Literal["", "same", "side"]


def compare(kind: Kind, here: Context, there: Marks) -> Match:
    """Whether an alias found elsewhere means the same conversation, a side conversation of it, or nothing.

    If neither the system prompt nor the tools are those of the session, the request is a sub-agent's.
    """
    same_system, same_tools = here.system == there.system, here.tools == there.tools
    first_reply = kind == "question" and not here.history
    if (kind == "history" or first_reply) and (same_system != same_tools or not _alike(here.lines, there.lines)):
        return ""
    if first_reply and not same_system:  # nothing else identifies the conversation
        return ""
    return "same" if same_system or same_tools else "side"


def _alike(one: frozenset[int], other: frozenset[int]) -> bool:
    """Whether two questions share half of the lines of the shorter one: the rest was put around it, or removed.

    Both may be empty, as the results of a tool.
    """
    shorter = min(len(one), len(other))
    return 2 * len(one & other) >= shorter if shorter else one == other


def tool_names(frame: Mapping[str, Any]) -> bytes:
    """The names of the tools in a frame, b"" without any. Their descriptions may tell the time, names do not."""
    tools = frame.get("tools")
    return "\0".join(sorted(map(_tool_name, tools))).encode(errors="replace") if isinstance(tools, list) else b""


def _tool_name(tool: Any) -> str:
    if not isinstance(tool, dict):
        return ""
    function = tool.get("function")
    definition = function if isinstance(function, dict) else tool
    return str(definition.get("name") or definition.get("type"))


def _lines(messages: Sequence[Message]) -> Iterator[int]:
    """Checksums of the first and last lines of a question, without labels, stamps and tags around what was asked."""
    lines = [line for text in _texts(messages) for line in _ends(text) if line and not line.isspace()]
    if len(lines) > _HEAD_LINES + _TAIL_LINES:
        lines = lines[:_HEAD_LINES] + lines[-_TAIL_LINES:]
    for line in map(_bare, lines):
        if line:
            yield crc32(line.encode(errors="replace"))


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _ends(text: str) -> list[str]:
    if len(text) <= _HEAD_CHARS + _TAIL_CHARS:
        return text.splitlines()
    return [*text[:_HEAD_CHARS].splitlines(), *text[-_TAIL_CHARS:].splitlines()]


def _bare(line: str) -> str:
    stripped = (_TAG.sub("", line) if "<" in line else line).strip()
    if stripped[:1] != "[" and ": " not in stripped[:_LABEL_CHARS]:
        return stripped
    label = _LABEL.match(stripped)
    return stripped[label.end() :] if label else stripped


def _undated(messages: Sequence[Message], digests: Sequence[bytes]) -> bytes:
    """A digest of the system prompt's text without digits, so that it is the same a minute later."""
    text = "\0".join(_texts(messages)).encode(errors="replace").translate(None, _DIGITS)
    return digest(text)[:_MARK] if text else _mark(digests) or _NONE


def _mark(digests: Sequence[bytes]) -> bytes:
    """A short digest of messages; b"" for none."""
    if len(digests) > 1:
        return digest(b"".join(digests))[:_MARK]
    return digests[0][:_MARK] if digests else b""


def digest(data: bytes) -> bytes:
    """The hash that chains and aliases are made of."""
    return blake3(data).digest(_DIGEST)

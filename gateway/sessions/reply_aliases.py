"""Aliases of a reply, by which its session is found when the client has changed something before the reply.

The prefix chain (`prefix_chain`) finds a conversation only while every message before the last reply stays the same.
Many clients change some of them on purpose: a system prompt tells the time, a reminder or retrieved passages are part
of the last question and are removed from it in the next request, the oldest turns are trimmed away. So each reply is
also recorded by what was said in it, together with digests of the history and of the question that it answers. It is
looked for with both, with the history, and alone: each `Kind` leaves more out. What the system prompt, the tools and
the lines of the question were is kept beside it in short (`marks`) and compared when it is found. Sub-agents are told
apart the same way: they send the conversation of their parent, under another system prompt and with other tools.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

from blake3 import blake3

from gateway.dialects import transcripts
from gateway.records import Alias, Message

# What is left out when a reply is looked for. In order of how much the rest says:
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


@dataclass(frozen=True, slots=True)
class Context:
    """What a reply answers, in short. `history` is what stands between the system prompt and the question, b"" where
    that is nothing.
    """

    start: bytes
    system: bytes
    tools: bytes
    history: bytes
    question: bytes
    lines: frozenset[int]

    @classmethod
    def of(cls, start: bytes, messages: Sequence[Message], digests: Sequence[bytes], tools: bytes) -> "Context":
        """The context that `messages` are, of which `digests` are the digests; `tools` is `tool_names`."""
        system = transcripts.leading(messages)
        asked = len(messages)
        while asked > system and messages[asked - 1].get("role") != "assistant":
            asked -= 1
        return cls(
            start,
            _undated(messages[:system], digests[:system]),
            _mark([_hash(tools)]) if tools else _NONE,
            _mark(digests[system:asked]),
            _mark(digests[asked:]),
            frozenset(_lines(messages[asked:])),
        )

    def aliases(self, reply: Message, said: bytes) -> tuple[Alias, ...]:
        """The names of a reply to this; `said` is its digest.

        A short reply is said too often to be looked for by its words alone: it has a second name, which holds the
        system prompt and the tools too.
        """
        own = self.system + self.tools
        marks = own + struct.pack(f">{len(self.lines)}I", *self.lines)
        links = [_hash(self.start + said)]
        if not transcripts.telling(reply):
            links.append(_hash(self.start + own + said))
        return tuple(Alias(link, self.history, self.question, marks) for link in links)


@dataclass(frozen=True, slots=True)
class Answered:
    """A reply in a request: how many messages there are with it, what it answers, and its further names."""

    depth: int
    context: Context
    names: Sequence[Alias]


@dataclass(frozen=True, slots=True)
class Marks:
    """What is kept beside a name."""

    system: bytes
    tools: bytes
    lines: frozenset[int]

    @classmethod
    def read(cls, marks: bytes) -> "Marks":
        """Read what `Context.aliases` wrote."""
        lines = struct.iter_unpack(">I", marks[2 * _MARK :])
        return cls(marks[:_MARK], marks[_MARK : 2 * _MARK], frozenset(line for (line,) in lines))


def is_named(kind: Kind, names: Sequence[Alias], there: Alias) -> bool:
    """Whether a reply recorded as `there` is one that goes by `names`, with that left out."""
    said, alone = names[0], names[-1]
    if kind == "history":
        return there.link == alone.link
    if kind == "question":
        return there.link == (said if said.history else alone).link and there.history == said.history
    return there[:3] == said[:3]


Match = Literal["", "same", "side"]


def compare(kind: Kind, here: Context, there: Marks) -> Match:
    """Whether a name found at another place means the same conversation, a side conversation of it, or nothing.

    Where neither the system prompt nor the tools are those of the session, it is a sub-agent that speaks.
    """
    same_system, same_tools = here.system == there.system, here.tools == there.tools
    if kind == "history" or (kind == "question" and not here.history):
        if not _alike(here.lines, there.lines):
            return ""
        if same_system != same_tools:
            return ""
    # Before the first reply nothing else is left to know the conversation by.
    if kind == "question" and not here.history and not same_system:
        return ""
    return "same" if same_system or same_tools else "side"


def _alike(one: frozenset[int], other: frozenset[int]) -> bool:
    """Whether two questions share half of the lines of the shorter one: the rest was put around it, or removed.

    Neither may have any, as the result of a tool that said nothing.
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
    named = function if isinstance(function, dict) else tool
    return str(named.get("name") or named.get("type"))


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
    """What tells a system prompt from another, be it that of another minute: its text without digits, in short."""
    text = "\0".join(_texts(messages)).encode(errors="replace").translate(None, _DIGITS)
    return _hash(text)[:_MARK] if text else _mark(digests) or _NONE


def _mark(digests: Sequence[bytes]) -> bytes:
    """What the messages of these digests are, in short; b"" for none."""
    if len(digests) > 1:
        return _hash(b"".join(digests))[:_MARK]
    return digests[0][:_MARK] if digests else b""


def _hash(data: bytes) -> bytes:
    return blake3(data).digest(_DIGEST)

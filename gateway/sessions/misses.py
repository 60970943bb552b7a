"""Explain cache misses: what a turn should have found in the cache, what it found, and why they differ.

Expected are all whole chunks of the previous turn - its prompt and its reply, without the last token, which no engine
computes - up to the length of this prompt, whose own last token is always computed. A chunk is the unit of the cache
behind the engine; it is a multiple of the engine's own blocks, so they never find less.

Details never contain text of a conversation: only roles, positions, names of fields and counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from msgspec import Struct, structs

from gateway.dialects import text_transcripts, transcripts
from gateway.records import Message

Reason = Literal[
    "none",  # everything expected was found
    "first-turn",  # there is no previous turn
    "shorter-than-chunk",  # the previous turn fills no chunk
    "message-changed",  # the history changed
    "frame-changed",  # tools or template arguments changed
    "reply-rerendered",  # the template renders a reply differently than it was sampled, or than before
    "other-engine",  # the previous turn went to another one
    "new-salt",  # the salt, or the model's fingerprint in it, changed
    "evicted",  # nothing else explains it
    "unknown",  # the engine does not report what it found, or the previous turn is not known
]

MAX_DETAIL = 200
_NOT_IN_PROMPT = frozenset({"tool_choice", "parallel_tool_calls"})  # vLLM: they affect sampling only
_GENEROUS, _FRONT_TOKENS = 1.5, 256
_CAREFUL = 0.85  # of what is estimated
_ENDING = 16  # tokens at most that a generation prompt adds to a prompt and the next one may not have
_NAME = 30
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class PreviousTurn(Struct, frozen=True):
    """The tokens of the previous turn, with its reply, and what they were rendered from.

    `messages` ends with the reply; it and `frame` are None if they are not known.
    """

    tokens: int
    prompt: int
    messages: Sequence[Message] | None = None
    frame: Mapping[str, Any] | None = None
    salt: str = ""
    fingerprint: str = ""
    engine: str = ""


class TurnCacheStats(Struct, frozen=True):
    """A turn as the engine counted it, and the previous one; "" is an engine or salt that is not known."""

    prompt: int
    cached: int | None
    chunk_size: int
    messages: Sequence[Message]
    before: PreviousTurn | None = None
    frame: Mapping[str, Any] | None = None
    salt: str = ""
    fingerprint: str = ""
    engine: str = ""
    idle_s: float = 0.0

    @property
    def expected(self) -> int:
        """Tokens that should have been found."""
        if self.before is None:
            return 0
        return _whole(min(self.before.tokens - 1, self.prompt - 1), self.chunk_size)

    @property
    def missed(self) -> bool:
        """Whether fewer were found: only then are the messages of the previous turn compared."""
        return self.cached is not None and self.cached < self.expected


class Miss(Struct, frozen=True):
    """What one turn found, and why. `str` is how it is stored: the reason, and the detail after a colon."""

    expected: int
    cached: int | None
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def explain_miss(e: TurnCacheStats) -> Miss:
    """Explain what a turn found. Pure; compares messages only if fewer tokens were found than expected."""
    reason, detail = _explain(e)
    return Miss(e.expected, e.cached, reason, detail if len(detail) <= MAX_DETAIL else f"{detail[: MAX_DETAIL - 3]}...")


def _explain(e: TurnCacheStats) -> tuple[Reason, str]:
    if e.before is None:
        return "first-turn", ""
    if e.cached is None:
        return "unknown", "the engine does not report what it found; vLLM does with --enable-prompt-tokens-details"
    if not e.expected and not e.cached:
        return "shorter-than-chunk", f"{min(e.before.tokens, e.prompt)} tokens, a chunk has {e.chunk_size}"
    return _explain_missing(e, e.before, e.cached) if e.missed else ("none", "")


def _explain_missing(e: TurnCacheStats, before: PreviousTurn, cached: int) -> tuple[Reason, str]:
    """The first reason that applies, in this order: each hides all that follow it."""
    if _differ(e.salt, before.salt):
        fingerprint = _differ(e.fingerprint, before.fingerprint)
        return "new-salt", "the model's fingerprint changed" if fingerprint else "the salt changed"
    if before.messages is None:
        return "unknown", "the previous turn is no longer kept"
    change = first_change(before.messages, e.messages)
    fields = frame_changes(before.frame or {}, e.frame or {}) if before.frame is not None else []
    if fields and not (change and change.system) and cached <= _front(before):
        return "frame-changed", f"{', '.join(fields)} {'differs' if len(fields) == 1 else 'differ'}"
    if _differ(e.engine, before.engine) and (change is None or not cached):
        return "other-engine", "the previous turn went to another engine"
    if change is not None:
        return _explain_changed(e, before, change, cached)
    return _explain_unchanged(e, before, before.messages, cached)


def _explain_changed(e: TurnCacheStats, before: PreviousTurn, change: "Change", cached: int) -> tuple[Reason, str]:
    """A message has changed; but if far less was found than precedes it, that is gone from the cache."""
    unchanged = shared(before, e.messages, e.frame or {})
    if unchanged is not None and 2 * cached < _whole(unchanged.tokens, e.chunk_size):
        return "evicted", f"most of what precedes a change was not found ({change.detail})"
    return "message-changed", change.detail


def frame_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the fields of a frame that differ and are part of a prompt, in order."""
    changed = [name for name in sorted({*before, *now}) if _written(before.get(name)) != _written(now.get(name))]
    # vLLM can leave out the tools if none may be called: --exclude-tools-when-tool-choice-none.
    none = (before.get("tool_choice") == "none") != (now.get("tool_choice") == "none")
    kept = [name[:_NAME] for name in changed if name not in _NOT_IN_PROMPT]
    return kept or (["tool_choice"] if none and before.get("tools") else [])


def _written(value: Any) -> bytes:
    """A field as a template writes it: in the order of its keys, and nothing if it is empty."""
    return orjson.dumps(value) if value else b""


def _front(before: PreviousTurn) -> float:
    """A generous estimate of the tokens of system messages and frame: if more were found, these are the same, or the
    template writes them later."""
    messages = before.messages or ()
    system = messages[: transcripts.leading(messages)]
    frame = sum(len(_written(value)) for value in (before.frame or {}).values())
    front, rest = frame + _size(system), _size(messages[len(system) :])
    return _GENEROUS * before.tokens * front / (front + rest + 1) + _FRONT_TOKENS


def _size(messages: Sequence[Message]) -> int:
    return sum(
        len(str(message.get("content") or "")) + len(str(message.get("tool_calls") or "")) for message in messages
    )


def shared(before: PreviousTurn, now: Sequence[Message], frame: Mapping[str, Any]) -> PreviousTurn | None:
    """A low estimate of what a fork finds of its parent's conversation; None if that is nothing, or unknown."""
    messages = before.messages or ()
    if before.frame is None or frame_changes(before.frame, frame):
        return None
    count = next((i for i, (one, other) in enumerate(zip(messages, now, strict=False)) if not alike(one, other)), None)
    part = messages[: min(len(messages), len(now)) if count is None else count]
    if len(part) <= transcripts.leading(part):
        return None
    size = sum(len(_written(value)) for value in before.frame.values())
    share = (size + _size(part)) / (size + _size(messages) + 1)
    tokens = int(before.tokens * share * _CAREFUL)
    return structs.replace(before, tokens=tokens, prompt=tokens, messages=part)


def _explain_unchanged(
    e: TurnCacheStats, before: PreviousTurn, messages: Sequence[Message], cached: int
) -> tuple[Reason, str]:
    """The history is unchanged, and yet less of it was found."""
    shorter = e.prompt <= before.prompt if text_transcripts.kind(messages) else len(e.messages) < len(messages)
    if not shorter and cached >= _whole(min(before.prompt, e.prompt) - _ENDING, e.chunk_size):
        return "reply-rerendered", f"found up to the last reply of {before.tokens - before.prompt} tokens"
    if not shorter and cached and any(m.get("reasoning") or m.get("reasoning_content") for m in messages):
        return "reply-rerendered", "earlier replies have reasoning, which templates drop later on; or it was evicted"
    return "evicted", f"nothing else explains it; {e.idle_s:.0f} s since the previous turn"


@dataclass(frozen=True, slots=True)
class Change:
    """The first difference between two histories; `system`: it precedes any tools in the prompt."""

    detail: str
    system: bool = False


def first_change(before: Sequence[Message], now: Sequence[Message]) -> Change | None:
    """The first difference between two histories; None if one continues the other, or repeats its last request."""
    if text_transcripts.kind(before) or text_transcripts.kind(now):
        change = _change_of_text(before, now)
        return Change(change) if change else None
    place = next((i for i, (one, other) in enumerate(zip(before, now, strict=False)) if not alike(one, other)), None)
    change = _change_of_chat(before, now, min(len(before), len(now)) if place is None else place)
    return Change(change, place is not None and place < transcripts.leading(before)) if change else None


def alike(one: Message, other: Message) -> bool:
    """Whether a usual template renders two messages to the same tokens, apart from reasoning."""
    return one == other or (transcripts.same(one, other) and _text(one) == _text(other))


def _text(message: Message) -> str:
    """The text of a message in a prompt; vLLM writes each part on a line of its own."""
    content = message.get("content")
    if not isinstance(content, list):
        return str(content or "")
    return "\n".join(str(part.get("text", "")) if isinstance(part, dict) else "" for part in content)


def _change_of_chat(before: Sequence[Message], now: Sequence[Message], place: int) -> str | None:
    if place == len(before) or (place == len(now) == len(before) - 1 and before[-1].get("role") == "assistant"):
        return None
    if place == len(now):
        return f"the last {len(before) - place} of {len(before)} messages are gone"
    old, new = before[place], now[place]
    if place + 1 < len(now) and transcripts.same(old, now[place + 1]):
        return f"{_message_name(place, new)} was inserted"
    if place + 1 < len(before) and transcripts.same(before[place + 1], new):
        return f"{_message_name(place, old)} is gone"
    if _role(old) != _role(new):
        return f"message {place}: {_role(new)} in place of {_role(old)}"
    what = "the reply was sent back differently" if old.get("role") == "assistant" else "differs"
    return f"{_message_name(place, old)}: {what} ({_how(old, new)})"


def _change_of_text(before: Sequence[Message], now: Sequence[Message]) -> str | None:
    """The same for a conversation that is one text, or one list of token ids."""
    had, has = text_transcripts.kind(before), text_transcripts.kind(now)
    if had != has:
        return f"{has or 'a chat'} in place of {had or 'a chat'}"
    one, other = before[0]["content"], now[0]["content"]
    place = text_transcripts.shared(one, other)
    if place in (len(one), len(other)):  # it is continued, or its last prompt is repeated
        return None
    return f"the text differs from character {place} on" if had == text_transcripts.TEXT else f"token {place} differs"


def _how(old: Message, new: Message) -> str:
    if transcripts.same(old, new):
        if _text(old).split() == _text(new).split():
            return "white space"
        return "reasoning in its text" if old.get("role") == "assistant" else "the same text in other parts"
    one, other = transcripts.canonical(old), transcripts.canonical(new)
    fields = [str(name)[:_NAME] for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    text, changed = one.get("content"), other.get("content")
    if fields == ["content"] and isinstance(text, str) and isinstance(changed, str):
        return f"content, from character {text_transcripts.shared(text, changed)} on"
    return ", ".join(fields)


def _message_name(place: int, message: Message) -> str:
    return f"message {place} ({_role(message)})"


def _role(message: Message) -> str:
    role = message.get("role")
    return role if isinstance(role, str) and role in _ROLES else "unknown role"


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


def _whole(tokens: int, chunk_size: int) -> int:
    return max(tokens, 0) // chunk_size * chunk_size

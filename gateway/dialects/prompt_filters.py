"""Remove volatile lines that agents put in front of the prompt.

A prefix cache holds nothing for a prompt whose first line differs in every request. A rule removes such a line only if
it means nothing to the model, and only from the very front of the leading system or developer messages. Messages of the
user and the model are never touched. A clock that the prompt shows the model ("Current time is 15:09:20") stays: it is
meant to be read.

The rules, and where they come from:

- `claude-billing-header`: Claude Code's `x-anthropic-billing-header: cc_version=...; cc_entrypoint=...; cch=...;`, the
  first block of its system prompt or the first line of a joined one; `cch` and the version's suffix are hashes of the
  request (anthropics/claude-code#24168, #68900). vLLM 0.32 removes it from system messages too, not from a developer's,
  and a conversation is recognised here by what it begins with.
- `request-id-line`: a first line with nothing but a request, trace or correlation id, as some frameworks add.
- `timestamp-line`: a first line with nothing but a time stamp of the request, to the second or finer, in ISO 8601.
"""

import re
from collections.abc import Mapping
from typing import Any

from gateway.dialects.transcripts import SYSTEM_ROLES
from gateway.records import Message

BILLING_HEADER = "x-anthropic-billing-header"
"""Claude Code's line about itself, different in each request: vLLM drops the block that begins with it."""

_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_ID = rf"(?:{_UUID}|[0-9a-f]{{16,64}}|(?:req|trace)[_-][0-9a-z]{{8,64}})"
_ID_NAME = r"(?:x-)?(?:request|trace|correlation)[ _-]?id"
_STAMP = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d| ?UTC)?"
_STAMP_NAME = r"(?:request[ _-]?)?timestamp"
# Possessive, so that a prompt of ten million blanks costs no more than checking the first of them.
_BEGIN = r"\s{0,64}+"
_BLANK = r"[ \t]{0,64}+"
_NEXT_LINE = rf"\r?\n(?:{_BLANK}\r?\n)*+"  # empty lines go with the line before them


def _rule(line: str, end: str) -> re.Pattern[str]:
    return re.compile(_BEGIN + line + _BLANK + end, re.ASCII | re.IGNORECASE)


_RULES: dict[str, re.Pattern[str]] = {
    # A value is a word. Blocks are sometimes joined without a line break, so what follows may begin right behind it.
    "claude-billing-header": _rule(
        rf"{BILLING_HEADER}:(?:{_BLANK}cc[a-z_]{{1,30}}=[^\s;]{{0,200}}(?:;|(?=\s|\Z)))++", f"(?:{_NEXT_LINE})?"
    ),
    "request-id-line": _rule(rf"\[?{_BLANK}{_ID_NAME}{_BLANK}[:=]{_BLANK}{_ID}{_BLANK}\]?", rf"(?:{_NEXT_LINE}|\Z)"),
    "timestamp-line": _rule(
        rf"\[?{_BLANK}(?:{_STAMP_NAME}{_BLANK}[:=]{_BLANK})?{_STAMP}{_BLANK}\]?", rf"(?:{_NEXT_LINE}|\Z)"
    ),
}
RULES = tuple(_RULES)
"""The names of all rules, as the setting `normalise` takes them."""

_TEXT_PARTS = ("text", "input_text")  # not a set: a client may send a list for a type, which has no hash

Applied = tuple[str, ...]
Rules = frozenset[str]


def apply(messages: list[Message], rules: Rules) -> tuple[list[Message], Applied]:
    """Return `messages` without what `rules` remove, and the names of the rules that applied, in order.

    The same list if none did. A message that becomes empty is dropped, unless it is the only one. No message is changed
    in place.
    """
    applied: Applied = ()
    for place, message in enumerate(messages):
        kept, more = _content(message.get("content"), rules) if _is_system(message) else (None, ())
        if not more:
            return (messages[place:], applied) if applied else (messages, ())
        applied = _joined(applied, more)
        if kept:
            return [{**message, "content": kept}, *messages[place + 1 :]], applied
    return messages, ()


def in_body(body: dict[str, Any], path: bytes, rules: Rules) -> tuple[dict[str, Any], Applied]:
    """Apply `rules` to the front of a request in its own dialect; `path` is that of the engine, `/v1/...`.

    The same body if no rule applied, else a new one, which has to be serialised again (`Call.raw` is b""). The bodies
    of other paths have no system prompt and are left alone.
    """
    if not rules or path not in _PROMPT_FIELDS:
        return body, ()
    system, messages = _PROMPT_FIELDS[path]
    return _in_field(body, system, messages, rules) if system else _in_list(body, messages, rules)


# The fields with the system prompt, "" where it is a message, and with the messages.
_PROMPT_FIELDS: Mapping[bytes, tuple[str, str]] = {
    b"/v1/chat/completions": ("", "messages"),
    b"/v1/messages": ("system", "messages"),
    b"/v1/messages/count_tokens": ("system", "messages"),
    b"/v1/responses": ("instructions", "input"),
}


def _in_field(body: dict[str, Any], name: str, then: str, rules: Rules) -> tuple[dict[str, Any], Applied]:
    """The system prompt in a field of its own; the list `then` is the front only if that field is empty."""
    kept, applied = _content(body.get(name), rules)
    if kept:
        return ({**body, name: kept}, applied) if applied else (body, ())
    left = {key: value for key, value in body.items() if key != name} if applied else body
    left, more = _in_list(left, then, rules)
    return left, _joined(applied, more)


def _in_list(body: dict[str, Any], name: str, rules: Rules) -> tuple[dict[str, Any], Applied]:
    found = body.get(name)
    kept, applied = apply(found, rules) if isinstance(found, list) else (found, ())
    return ({**body, name: kept}, applied) if applied else (body, ())


def _content(content: Any, rules: Rules) -> tuple[Any, Applied]:
    """A system prompt, a string or a list of parts, without what is removed."""
    if isinstance(content, str):
        return _text(content, rules)
    if isinstance(content, list):
        return _parts(content, rules)
    return content, ()


def _parts(parts: list[Any], rules: Rules) -> tuple[list[Any], Applied]:
    applied: Applied = ()
    for place, part in enumerate(parts):
        text, more = _text(part["text"], rules) if _is_text(part) else ("", ())
        if not more:
            return parts[place:], applied
        applied = _joined(applied, more)
        if text:
            return [{**part, "text": text}, *parts[place + 1 :]], applied
    return [], applied


def _text(text: str, rules: Rules) -> tuple[str, Applied]:
    """Remove lines from the front until no rule finds one."""
    start = 0
    applied: Applied = ()
    while found := _found(text, start, rules):
        name, start = found
        applied = _joined(applied, (name,))
    return text[start:], applied


def _found(text: str, start: int, rules: Rules) -> tuple[str, int] | None:
    """The first rule that removes something at `start`, and where the rest begins."""
    for name in RULES:
        if name in rules and (match := _RULES[name].match(text, start)):
            return name, match.end()
    return None


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in SYSTEM_ROLES


def _joined(one: Applied, other: Applied) -> Applied:
    return tuple(dict.fromkeys((*one, *other)))

"""Remove volatile lines that agents put in front of the prompt.

A prefix cache holds nothing for a prompt whose first line is another one in every request. A rule takes such a line out
only if it means nothing to the model, and only from the very front of the leading system or developer messages. What a
user or the model said is never touched. A clock that the prompt tells the model ("Current time is 15:09:20") stays
where it is: it is meant to be read.

The rules, and where they come from:

- `claude-billing-header`: Claude Code's `x-anthropic-billing-header: cc_version=...; cc_entrypoint=...; cch=...;`, the
  first block of its system prompt or the first line of a joined one; `cch` and the version's suffix are hashes of the
  request (anthropics/claude-code#24168, #68900). vLLM 0.32 takes it out of system messages too, not out of a
  developer's, and a conversation is recognised here by what it begins with.
- `request-id-line`: a first line with nothing but a request, trace or correlation id, as some frameworks stamp it.
- `timestamp-line`: a first line with nothing but a time stamp of the request, to the second or finer, in ISO 8601.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from gateway.records import Message

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
        rf"x-anthropic-billing-header:(?:{_BLANK}cc[a-z_]{{1,30}}=[^\s;]{{0,200}}(?:;|(?=\s|\Z)))++",
        f"(?:{_NEXT_LINE})?",
    ),
    "request-id-line": _rule(rf"\[?{_BLANK}{_ID_NAME}{_BLANK}[:=]{_BLANK}{_ID}{_BLANK}\]?", rf"(?:{_NEXT_LINE}|\Z)"),
    "timestamp-line": _rule(
        rf"\[?{_BLANK}(?:{_STAMP_NAME}{_BLANK}[:=]{_BLANK})?{_STAMP}{_BLANK}\]?", rf"(?:{_NEXT_LINE}|\Z)"
    ),
}
RULES = tuple(_RULES)
"""The names of all rules, as the setting `normalise` takes them."""

_SYSTEM_ROLES = ("system", "developer")  # no sets: a client may send a list for a role, which has no hash
_TEXT_PARTS = ("text", "input_text")

Applied = tuple[str, ...]
Rules = frozenset[str]


def apply(messages: list[Message], rules: Rules) -> tuple[list[Message], Applied]:
    """Return `messages` without what `rules` take out, and the names of those that did, in order.

    The same list where nothing was found. A message of which nothing is left is left out, unless it is the only one.
    No message is changed in place.
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

    The same body where nothing was found, else a new one, which has to be serialised again (`Call.raw` is b"").
    A path that has no system prompt of its own is left alone.
    """
    front = _FRONTS.get(path)
    return front(body, rules) if front and rules else (body, ())


def _chat(body: dict[str, Any], rules: Rules) -> tuple[dict[str, Any], Applied]:
    return _in_list(body, "messages", rules)


def _messages(body: dict[str, Any], rules: Rules) -> tuple[dict[str, Any], Applied]:
    return _in_field(body, "system", "messages", rules)


def _responses(body: dict[str, Any], rules: Rules) -> tuple[dict[str, Any], Applied]:
    return _in_field(body, "instructions", "input", rules)


_FRONTS: Mapping[bytes, Callable[[dict[str, Any], Rules], tuple[dict[str, Any], Applied]]] = {
    b"/v1/chat/completions": _chat,
    b"/v1/messages": _messages,
    b"/v1/messages/count_tokens": _messages,
    b"/v1/responses": _responses,
}


def _in_field(body: dict[str, Any], name: str, then: str, rules: Rules) -> tuple[dict[str, Any], Applied]:
    """The system prompt in a field of its own; the list `then` is the front only where that field says nothing."""
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
    """A system prompt, a string or a list of parts, without what is taken out; empty when nothing is left."""
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
    """Take lines from the front until no rule finds one."""
    start = 0
    applied: Applied = ()
    while found := _found(text, start, rules):
        name, start = found
        applied = _joined(applied, (name,))
    return text[start:], applied


def _found(text: str, start: int, rules: Rules) -> tuple[str, int] | None:
    """The first rule that takes something from `start` on, and where the rest begins."""
    for name in RULES:
        if name in rules and (taken := _RULES[name].match(text, start)):
            return name, taken.end()
    return None


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES


def _joined(one: Applied, other: Applied) -> Applied:
    return tuple(dict.fromkeys((*one, *other)))

"""Limits on JSON input: how many values it holds, and how deeply they nest.

A parser turns two bytes into an object of fifty, and holds Python's global lock meanwhile: a body within its size limit
could stop every stream for minutes and take gigabytes. So large texts are counted before they are parsed, and what was
parsed is counted exactly before it is used.
"""

import re
from typing import Any

import orjson

from gateway.errors import GatewayError

MAX_DEPTH = 100
"""Levels of arrays and objects, in imported files too. Real requests have fewer than 20. Writing JSON fails at 254."""

MAX_VALUES = 1_100_000
"""Members of all arrays and objects. Enough for a prompt of a million token ids; chat has 10,000 in a MB."""

MAX_CONTAINERS = 100_000
"""Arrays and objects, which cost ten times as much as a number."""

MAX_NAMES = 100_000
"""Members of objects: a distinct name costs as much as an array."""

COUNTED_BYTES = 512 * 1024
"""A shorter text is parsed without counting: even the worst takes less than 20 ms."""

MAX_QUOTED = 8_000_000
"""Commas and brackets inside strings as well: a string may hold JSON that is parsed later, as tool calls do."""

_UNCOUNTED_CHARS = 64 * 1024  # of a text inside JSON
_SHORT_BYTES = 16 * 1024
_STEP = 1024 * 1024  # bytes counted at a time, so that other threads can run
_BACKSLASH = ord("\\")
_BACKSLASHES = re.compile(rb"\\*")
_PLAIN = bytes(set(range(256)) - set(b'"[{,:'))  # bytes that do not matter for counting


class TooDeep(ValueError):
    """JSON that is nested too deep."""


class TooMany(ValueError):
    """JSON with too many values."""


def parse(text: bytes, most: int = MAX_VALUES) -> Any:
    """Parse a request's JSON within the bounds. Raises `too_complex`, and orjson.JSONDecodeError for other text."""
    try:
        return parse_bounded(text, most)
    except TooDeep as error:
        raise GatewayError("too_complex", f"the JSON is too complex: {error}", hint="nest it less") from error
    except TooMany as error:
        hint = "send less at once; max_json_values sets the limit"
        raise GatewayError("too_complex", f"the JSON is too complex: {error}", hint=hint) from error


def parse_bounded(text: bytes, most: int = MAX_VALUES) -> Any:
    """Parse JSON within the bounds. Raises TooDeep, TooMany, and orjson.JSONDecodeError for other text."""
    if len(text) > COUNTED_BYTES:
        check_text(text, most)
    value = orjson.loads(text)
    # A value takes two bytes or more, a level one bracket: most requests are too small to exceed the bounds.
    if len(text) > min(_SHORT_BYTES, 2 * most) or text.count(b"{") + text.count(b"[") > MAX_DEPTH:
        check_value(value, most)
    return value


def check_text(text: bytes, most: int = MAX_VALUES) -> None:
    """Raise TooMany for JSON text that holds more than `most` values. Takes 2 ms per MB, 10 where it is close."""
    at_most = _marks(text)
    if at_most > max(MAX_QUOTED, most):
        raise _too_many(at_most, max(MAX_QUOTED, most), "commas and brackets, those in strings included")
    if at_most > min(most, MAX_CONTAINERS, MAX_NAMES):
        _check_counts(*_outside_strings(text, most), most)


def check_value(value: Any, most: int = MAX_VALUES, depth: int = MAX_DEPTH) -> None:
    """Raise TooMany, TooDeep for a parsed value that is too large, or has more than `depth` levels."""
    level, values, containers, names = [value] if type(value) in (dict, list) else [], 0, 0, 0
    for _ in range(depth):
        if not level:
            return
        values += sum(map(len, level))
        containers += len(level)
        names += sum(len(each) for each in level if type(each) is dict)
        _check_counts(values, containers, names, most)
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
    if level:
        raise TooDeep(f"it nests more than {depth} levels deep")


def parse_text(text: str) -> Any:
    """Parse JSON that is a string in other JSON. Raises ValueError if it is invalid, too large or nested too deep."""
    if len(text) > _UNCOUNTED_CHARS and text.count(",") + text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise TooMany("it holds too many values")
    value = orjson.loads(text)
    check_value(value)
    return value


def _marks(text: bytes) -> int:
    """The number of commas and opening brackets, including those in strings."""
    return sum(
        text.count(mark, start, start + _STEP) for start in range(0, len(text), _STEP) for mark in (b",", b"{", b"[")
    )


def _check_counts(values: int, containers: int, names: int, most: int) -> None:
    """Raise TooMany if one of these exceeds its bound."""
    if values > most:
        raise _too_many(values, most, "values")
    if containers > MAX_CONTAINERS:
        raise _too_many(containers, MAX_CONTAINERS, "arrays and objects")
    if names > MAX_NAMES:
        raise _too_many(names, MAX_NAMES, "members of objects")


def _outside_strings(text: bytes, most: int) -> tuple[int, int, int]:
    """Values, containers and members of objects, outside strings. Counting stops soon after a bound is exceeded."""
    values = containers = names = start = 0
    inside = False
    while start < len(text) and values <= most and containers <= MAX_CONTAINERS and names <= MAX_NAMES:
        end = _cut(text, start + _STEP)
        piece = text[start:end].replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _PLAIN)
        parts = piece.split(b'"')
        bare = b"".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0
        opened = bare.count(b"[") + bare.count(b"{")
        containers += opened
        values += bare.count(b",") + opened
        names += bare.count(b":")
        start = end
    return values, containers, names


def _cut(text: bytes, end: int) -> int:
    """The next position at or after `end` that does not split an escape: a run of backslashes is kept whole."""
    if end < len(text) and text[end - 1] == _BACKSLASH:
        run = _BACKSLASHES.match(text, end)
        end = (run.end() if run else end) + 1
    return min(end, len(text))


def _too_many(count: int, most: int, what: str) -> TooMany:
    return TooMany(f"it holds {count} {what} or more; at most {most} are allowed")

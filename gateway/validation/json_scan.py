"""Split a JSON text into its parts without parsing it, for texts that are too large to be parsed at once.

A parser makes an object of every node, tens of times the size of the text, and holds the interpreter until it is done.
Here a large text is split part by part instead, and refused if it has too many nodes. Only the brackets and quotes
between parts are validated: each part still has to be parsed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.validation.json_limits import TooDeep, TooMany

_PIECE = 2**20  # bytes scanned in one call into C, which no other thread can interrupt
_MARK = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BLANK = re.compile(rb"[ \t\r\n]*+")
_QUOTE, _COMMA, _COLON = b'",:'
_OPENING = frozenset(b"[{")


class BadJson(ValueError):
    """The text is not a JSON array or object."""


@dataclass(slots=True)
class Budget:
    """What a text may still have: levels at any place, and containers and commas in total."""

    depth: int
    containers: int
    commas: int

    def open(self, depth: int) -> None:
        """Count a container at a depth. Raises TooDeep, TooMany."""
        if depth > self.depth:
            raise TooDeep(f"it is nested deeper than {self.depth} levels")
        self.containers -= 1
        if self.containers < 0:
            raise TooMany("it has too many objects and arrays")

    def separate(self) -> None:
        """Count a comma. Raises TooMany."""
        self.commas -= 1
        if self.commas < 0:
            raise TooMany("it has too many values")


def elements(data: memoryview, budget: Budget) -> Iterator[memoryview]:
    """Yield each element of the array `data`. Raises BadJson, TooDeep, TooMany."""
    return _parts(data, b"[]", budget)


def members(data: memoryview, budget: Budget) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the name, as written, and the value of each member of the object `data`. Raises as `elements` does."""
    for part in _parts(data, b"{}", budget):
        begin = _skip_blank(part, 0)
        if begin == len(part) or part[begin] != _QUOTE:
            raise BadJson("a member has no name")
        end = _string_end(part, begin + 1)
        colon = _skip_blank(part, end)
        if colon == len(part) or part[colon] != _COLON:
            raise BadJson("a member has no value")
        yield bytes(part[begin + 1 : end - 1]), part[colon + 1 :]


def _parts(data: memoryview, brackets: bytes, budget: Budget) -> Iterator[memoryview]:
    at = _skip_blank(data, 0)
    if at == len(data) or data[at] != brackets[0]:
        raise BadJson(f"it does not begin with {chr(brackets[0])}")
    budget.open(1)
    at, first = at + 1, True
    while True:
        end = _value_end(data, at, budget)
        if end == len(data):
            raise BadJson("it ends too early")
        last = data[end] == brackets[1]
        part = data[at:end]
        if not (first and last and _skip_blank(part, 0) == len(part)):
            yield part
        if last:
            break
        if data[end] != _COMMA:
            raise BadJson("its brackets do not match")
        budget.separate()
        at, first = end + 1, False
    if _skip_blank(data, end + 1) != len(data):
        raise BadJson("something comes after its end")


def _value_end(data: memoryview, at: int, budget: Budget) -> int:
    """The position of the comma or bracket that ends the nested value at `at`, or the length of the data."""
    depth = 0
    while at < len(data):
        mark = _MARK.search(data, at, at + _PIECE)
        if mark is None:
            at += _PIECE
            continue
        at, sign = mark.end(), data[mark.start()]
        if sign == _QUOTE:
            at = _string_end(data, at)
        elif sign in _OPENING:
            depth += 1
            budget.open(depth + 1)
        elif depth == 0:
            return mark.start()
        elif sign == _COMMA:
            budget.separate()
        else:
            depth -= 1
    return len(data)


def _string_end(data: memoryview, at: int) -> int:
    """The position after the quote that ends the string whose first character is at `at`."""
    while True:
        inside = _INSIDE.match(data, at, at + _PIECE)
        end = inside.end() if inside else at
        if end < len(data) and data[end] == _QUOTE:
            return end + 1
        if end == at:  # a backslash and nothing behind it, or the end
            raise BadJson("a string does not end")
        at = end


def _skip_blank(data: memoryview, at: int) -> int:
    while (blank := _BLANK.match(data, at, at + _PIECE)) and blank.end() > at:
        at = blank.end()
    return at

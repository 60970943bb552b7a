"""Fields of requests: what each must be, as JSON schema, and how it is read. One definition checks and documents it."""

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeGuard, TypeVar

from gateway.errors import GatewayError
from gateway.records import MAX_DESCRIPTION, MAX_TAGS, SESSION_ID, TAG, WINDOW_NAME, check_session_id, check_window_name
from gateway.validation.shown import shown

T = TypeVar("T")

_MAX_SECONDS = 1e10
_MAX_COMPARED = 100  # characters of an unknown name: finding the nearest one takes time in their square


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """One field. `read` takes its name and its JSON value, and raises a GatewayError with `code`, naming the field."""

    schema: Mapping[str, Any]
    read: Callable[[str, Any], T]
    code: str = "invalid_request"

    def __call__(self, name: str, value: Any) -> T:
        """Return what the value means."""
        return self.read(name, value)

    def about(self, description: str) -> "Field[T]":
        """The same with a description."""
        return replace(self, schema={**self.schema, "description": description})


def reads(schema: Mapping[str, Any], code: str = "invalid_request") -> Callable[[Callable[[str, Any], T]], Field[T]]:
    """Make a Field of the function that reads it."""
    return lambda read: Field(schema, read, code)


def or_null(inner: Field[T]) -> Field[T | None]:
    """The same, or null where that means something."""
    schema = {**inner.schema, "type": [inner.schema["type"], "null"]}
    return Field(schema, lambda name, value: None if value is None else inner.read(name, value), inner.code)


def invalid(name: str, must: str, value: object) -> GatewayError:
    """The error for a field with an invalid value."""
    return GatewayError("invalid_request", f"{name} must be {must}, not {shown(value)}", details={"field": name})


def refuse_unknown(given: Collection[str], allowed: Collection[str]) -> None:
    """Raise `unknown_parameter` for the first name that is not allowed, with the nearest one that is."""
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, list(allowed), n=1) if len(name) <= _MAX_COMPARED else []
            raise GatewayError(
                "unknown_parameter",
                f"unknown parameter {shown(name)}",
                hint=f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(allowed) or 'none'}",
                details={"field": name[:_MAX_COMPARED]},
            )


def _matching(pattern: re.Pattern[str]) -> Mapping[str, str]:
    return {"type": "string", "pattern": f"^{pattern.pattern}$"}


@reads({**_matching(SESSION_ID), "description": "id of a session"}, "invalid_session_id")
def session_id(name: str, value: object) -> str:
    """The id of a session."""
    return check_session_id(value, name)


@reads(
    {"type": "string", "pattern": f"^{WINDOW_NAME.pattern}$", "description": "name of a window"}, "invalid_window_name"
)
def window_name(name: str, value: object) -> str:
    """The name of a window."""
    return check_window_name(value, name)


def text(max_length: int) -> Field[str]:
    """A string of at most so many characters."""

    @reads({"type": "string", "maxLength": max_length, "pattern": "^[^\\x00]*$"})
    def read(name: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > max_length or "\0" in value:
            raise invalid(name, f"a string of at most {max_length} characters", value)
        return value

    return read


description = text(MAX_DESCRIPTION).about("what it is, for whoever finds it later")


def non_blank(max_length: int) -> Field[str]:
    """A string of at most so many characters, and not only of blanks."""
    inner = text(max_length)

    @reads({**inner.schema, "minLength": 1})
    def read(name: str, value: object) -> str:
        string = inner.read(name, value)
        if not string.strip():
            raise invalid(name, "a non-blank string", value)
        return string

    return read


@reads({"type": "array", "items": _matching(TAG), "maxItems": MAX_TAGS, "description": "tags to find it by"})
def tags(name: str, value: object) -> tuple[str, ...]:
    """A list of tags, without duplicates."""
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        raise invalid(name, f"a list of at most {MAX_TAGS} tags", value)
    for tag in value:
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            raise invalid(name, "tags of 1 to 64 letters, digits and _ . : -", tag)
    return tuple(dict.fromkeys(value))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(most: float) -> Field[float]:
    """A number, more than 0 and at most `most`."""

    @reads({"type": "number", "exclusiveMinimum": 0, "maximum": most})
    def read(name: str, value: object) -> float:
        if not _is_number(value) or not 0 < value <= most:
            raise invalid(name, f"a number, more than 0 and at most {most:.10g}", value)
        return value

    return read


@reads({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": _MAX_SECONDS})
def seconds(name: str, value: object) -> float:
    """A duration in seconds, more than 0."""
    if not _is_number(value) or not 0 < value < _MAX_SECONDS:
        raise invalid(name, "a number of seconds, more than 0", value)
    return float(value)


def whole(low: int, high: int) -> Field[int]:
    """A whole number from `low` to `high`."""

    @reads({"type": "integer", "minimum": low, "maximum": high})
    def read(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise invalid(name, f"a whole number from {low} to {high}", value)
        return value

    return read


@reads({"type": "boolean"})
def boolean(name: str, value: object) -> bool:
    """`true` or `false`."""
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)
    return value


def one_of(*choices: str) -> Field[str]:
    """One of some words."""

    @reads({"type": "string", "enum": [*choices]})
    def read(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise invalid(name, f"one of {', '.join(choices)}", value)
        return value

    return read


@reads({"type": "string", "format": "date-time", "description": "ISO 8601 date or time; UTC if it names no zone"})
def moment(name: str, value: Any) -> float:
    """An ISO 8601 date or date-time, UTC if it names no zone, as seconds since the epoch."""
    try:
        parsed = datetime.fromisoformat(value)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(name, "an ISO 8601 date or time such as 2026-01-31 or 2026-01-31T12:00:00Z", value) from error


def json_list(text: str) -> list[Any]:
    """The list that a variable of the environment holds. Raises ValueError."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text or "[]"), list):
            return value
    raise ValueError('is not a JSON list, as in \'[{"url": "http://gpu.example", "cache_url": "http://kv.example"}]\'')

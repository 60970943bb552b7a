"""Read parameters: each field by name, validated. An unknown one is refused, never ignored."""

import difflib
import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from gateway.errors import GatewayError
from gateway.records import MAX_DESCRIPTION, MAX_TAGS, SESSION_ID, TAG, WINDOW_NAME, check_session_id, check_window_name
from gateway.validation.fields import Field, reads
from gateway.validation.shown import shown

_MOST_SECONDS = 1e10
_LONGEST_NAME = 100  # of a parameter that somebody has misspelt: to compare costs its length squared


@reads({"type": "string", "pattern": f"^{SESSION_ID.pattern}$"}, "invalid_session_id")
def session_id(name: str, value: object) -> str:
    """The id of a session."""
    return check_session_id(value, name)


@reads({"type": "string", "pattern": f"^{WINDOW_NAME.pattern}$"}, "invalid_window_name")
def window_name(name: str, value: object) -> str:
    """The name of a window."""
    return check_window_name(value, name)


def refuse_unknown(given: Collection[str], known: Collection[str]) -> None:
    """Raise `unknown_parameter` for the first name that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1) if len(name) <= _LONGEST_NAME else []
            raise GatewayError(
                "unknown_parameter",
                f"unknown parameter {shown(name)}",
                hint=f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known) or 'none'}",
                details={"field": name[:100]},
            )


def invalid(name: str, must: str, value: object) -> GatewayError:
    """The error for a field that is not what it must be."""
    return GatewayError("invalid_request", f"{name} must be {must}, not {shown(value)}", details={"field": name})


def text(name: str, value: object, *, longest: int) -> str:
    """A string of at most `longest` characters."""
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        raise invalid(name, f"a string of at most {longest} characters", value)
    return value


def line(longest: int) -> Field[str]:
    """A parameter that is such a string."""
    schema = {"type": "string", "maxLength": longest, "pattern": "^[^\\x00]*$"}
    return Field(schema, lambda name, value: text(name, value, longest=longest))


description = line(MAX_DESCRIPTION)


@reads({"type": "array", "items": {"type": "string", "pattern": f"^{TAG.pattern}$"}, "maxItems": MAX_TAGS})
def tags(name: str, value: object) -> tuple[str, ...]:
    """A list of tags; the same tag twice is one."""
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        raise invalid(name, f"a list of at most {MAX_TAGS} tags", value)
    for tag in value:
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            raise invalid(name, "tags of 1 to 64 letters, digits and _ . : -", tag)
    return tuple(dict.fromkeys(value))


@reads({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": _MOST_SECONDS})
def seconds(name: str, value: object) -> float:
    """A duration in seconds, more than 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 < value < _MOST_SECONDS
    ):
        raise invalid(name, "a number of seconds, more than 0", value)
    return float(value)


def whole(low: int, high: int) -> Field[int]:
    """A whole number in a query, from `low` to `high`."""

    @reads({"type": "integer", "minimum": low, "maximum": high})
    def read(name: str, value: str) -> int:
        if (
            not value.isascii()
            or not value.removeprefix("-").isdigit()
            or len(value) > 12
            or not low <= int(value) <= high
        ):
            raise invalid(name, f"a whole number from {low} to {high}", value)
        return int(value)

    return read


def count(low: int, high: int) -> Field[int]:
    """A whole number in a body, from `low` to `high`."""

    @reads({"type": "integer", "minimum": low, "maximum": high})
    def read(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise invalid(name, f"a whole number from {low} to {high}", value)
        return value

    return read


@reads({"type": "boolean"})
def boolean(name: str, value: object) -> bool:
    """`true` or `false` in a body."""
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)
    return value


@reads({"type": "boolean"})
def flag(name: str, value: str) -> bool:
    """`true` or `false` in a query."""
    if value not in ("true", "false"):
        raise invalid(name, "true or false", value)
    return value == "true"


def one_of(*choices: str) -> Field[str]:
    """One of some words."""

    @reads({"type": "string", "enum": [*choices]})
    def read(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise invalid(name, f"one of {', '.join(choices)}", value)
        return value

    return read


@reads({"type": "string", "format": "date-time", "description": "ISO 8601 date or time; UTC if it names no zone"})
def when(name: str, value: str) -> float:
    """An ISO 8601 date or date-time, UTC where it names no zone, as seconds since the epoch."""
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise invalid(name, "an ISO 8601 date or time such as 2026-01-31 or 2026-01-31T12:00:00Z", value) from error


def read(
    given: Mapping[str, Any], table: Mapping[str, Field[Any]], required: Collection[str] = (), *, nulls: bool = False
) -> dict[str, Any]:
    """Check `given` against a table of fields. One that is absent has its default, or is left out of the answer.

    So is one that is null, unless `nulls`.
    """
    refuse_unknown(given.keys(), table.keys())
    for name in required:
        if given.get(name) is None:
            raise GatewayError("invalid_request", f"{name} is missing", details={"field": name})
    defaults = {name: known.schema["default"] for name, known in table.items() if "default" in known.schema}
    return defaults | {name: table[name](name, value) for name, value in given.items() if nulls or value is not None}

"""Words to write JSON schemas of answers with."""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]

TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
FLAG: Json = {"type": "boolean"}
ANYTHING: Json = {"type": "object"}
MOMENT: Json = {"type": "string", "format": "date-time"}


def shape(about: str = "", /, optional: Mapping[str, Json] | None = None, **always: Json) -> Json:
    """An object with these properties and perhaps those in `optional`, and no others."""
    schema = {"type": "object", "properties": {**always, **(optional or {})}, "required": [*always]}
    return _described({**schema, "additionalProperties": False}, about)


def by_name(value: Json, about: str = "") -> Json:
    """An object of such values, under names that only the answer knows."""
    return _described({"type": "object", "additionalProperties": value}, about)


def list_of(item: Json, about: str = "") -> Json:
    """A list of such items."""
    return _described({"type": "array", "items": item}, about)


def word(*words: str, about: str = "") -> Json:
    """One of some words."""
    return _described({"type": "string", "enum": [*words]}, about)


def or_null(schema: Json) -> Json:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def _described(schema: dict[str, Any], about: str) -> Json:
    return {**schema, "description": about} if about else schema

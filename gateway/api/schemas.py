"""JSON schemas of pydantic models, without the titles, which only repeat the names."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

Json = dict[str, Any]


def of_types(
    types: Iterable[Any], ref_template: str = "#/$defs/{model}", mode: JsonSchemaMode = "serialization"
) -> tuple[list[Json], Json]:
    """The schemas of some types, in their order, and the definitions that they refer to."""
    inputs = [(number, mode, TypeAdapter(one)) for number, one in enumerate(types)]
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template=ref_template)
    return [_untitled(schemas[number, mode]) for number, _, _ in inputs], _untitled(shared.get("$defs", {}))


def of_request(model: type[BaseModel]) -> Json:
    """The schema of an object that is received."""
    (schema,), definitions = of_types([model], mode="validation")
    found: Json = definitions.get(model.__name__, schema)
    return found


def without_null(schema: Json) -> Json:
    """The schema of a value that may be null, where null is the same as absent and need not be documented."""
    if "anyOf" not in schema:
        return schema
    return {**schema["anyOf"][0], **{name: inner for name, inner in schema.items() if name != "anyOf"}}


def _untitled(schema: Any) -> Any:
    """The same without titles. A property may still be called `title`: it is no string then."""
    if isinstance(schema, list):
        return [_untitled(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: _untitled(inner) for name, inner in schema.items() if not _is_noise(name, inner)}


def _is_noise(name: str, value: Any) -> bool:
    return (name == "title" and isinstance(value, str)) or (name == "default" and value is None)

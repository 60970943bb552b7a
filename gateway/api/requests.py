"""What an operation takes, as pydantic models: each field is read by a `Field`, so its errors and its schema are the
same wherever it is used.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from gateway.api.schemas import Json
from gateway.errors import GatewayError
from gateway.validation import fields
from gateway.validation.fields import Field

_WHOLE = re.compile(r"-?[0-9]{1,12}")


class Reads:
    """Marks the type of a model's field with the `Field` that reads it."""

    def __init__(self, field: Field[Any]) -> None:
        self.field = field

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            lambda value, info: self.field.read(info.context[info.field_name], value)
        )

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> Json:
        return dict(self.field.schema)


class Request(BaseModel):
    """What is sent to an operation. Unless `nulls` is set, null is the same as absent."""

    nulls: ClassVar[bool] = False

    def given(self) -> Json:
        """The fields that were sent."""
        return self.model_dump(exclude_unset=True)


class Query(Request):
    """A query."""


class Body(Request):
    """A body."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        """The schema, closed, and with null wherever that is the same as absent."""
        found = handler.resolve_ref_schema(handler(schema))
        found["additionalProperties"] = False
        for name, inner in found["properties"].items():
            if not cls.nulls and "anyOf" not in inner and name not in found.get("required", ()):
                found["properties"][name] = {"anyOf": [inner, {"type": "null"}]}
        return found


class Changes(Body):
    """A body in which null is a value, and a field that is absent keeps its value."""

    nulls: ClassVar[bool] = True


class Nothing(Body):
    """For operations without a body."""


AnyRequest = TypeVar("AnyRequest", bound=Request)


def read(model: type[AnyRequest], given: Mapping[str, Any]) -> AnyRequest:
    """Validate what was sent. Raises `unknown_parameter`, and `invalid_request` and its kin, naming the field."""
    names = names_of(model)
    fields.refuse_unknown(given, names)
    used: dict[str, str] = {}
    for alias in given:
        if given[alias] is not None or model.nulls:
            if names[alias] in used:
                raise given_twice(used[names[alias]], alias)
            used[names[alias]] = alias
    for name, field in model.model_fields.items():
        if field.is_required() and name not in used:
            raise GatewayError("invalid_request", f"{name} is missing", hint=f"send `{name}`", details={"field": name})
    return model.model_validate({alias: given[alias] for alias in used.values()}, context=used)


@cache  # every request reads them
def names_of(model: type[Request]) -> Mapping[str, str]:
    """The names under which each field may be sent, with the field's own."""
    return {alias: name for name, field in model.model_fields.items() for alias in _aliases(name, field)}


def _aliases(name: str, field: FieldInfo) -> Iterable[Any]:
    """The names under which a field may be sent."""
    choices = field.validation_alias
    return choices.choices if isinstance(choices, AliasChoices) else (name,)


def given_twice(name: str, other: str) -> GatewayError:
    """The error for a field that is sent under two names."""
    message = f"{name} and {other} are one parameter, and both are given"
    return GatewayError("invalid_request", message, hint="give one of them", details={"field": other})


def read_query(model: type[AnyRequest], given: Mapping[str, Any]) -> AnyRequest:
    """Validate a query, whose numbers and booleans are text. Raises as `read` does."""
    return read(model, {name: _from_text(model, name, value) for name, value in given.items()})


@cache  # most requests have none
def without_query(model: type[AnyRequest]) -> AnyRequest:
    """A query with nothing in it; all requests share it. Raises as `read` does."""
    return read(model, {})


def _from_text(model: type[Request], name: str, value: Any) -> Any:
    """The number or boolean that a text stands for. Any other text is left to the field, to refuse or to read."""
    kind = model.model_fields[name].annotation if name in model.model_fields else None
    if kind is bool:
        return {"true": True, "false": False}.get(value, value)
    return int(value) if kind is int and _WHOLE.fullmatch(value) else value


def codes(model: type[Request]) -> set[str]:
    """The codes of the errors for invalid values."""
    return {code for field in model.model_fields.values() for code in _codes(field.annotation, field.metadata)}


def _codes(annotation: Any, metadata: Iterable[Any]) -> Iterable[str]:
    yield from (mark.field.code for mark in metadata if isinstance(mark, Reads))
    for inner in get_args(annotation):
        yield from _codes(inner, getattr(inner, "__metadata__", ()))

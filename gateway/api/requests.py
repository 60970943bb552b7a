"""What an operation takes, as pydantic models: each field is read by a `Field`, so its errors and its schema are that
one's, wherever else it is used.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from gateway.api import parameters
from gateway.errors import GatewayError
from gateway.validation.fields import Field

Json = dict[str, Any]


class Reads:
    """Marks the type of a field with the `Field` that reads it."""

    def __init__(self, field: Field[Any]) -> None:
        self.field = field

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            lambda value, info: self.field.read(info.field_name or "", value)
        )

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> Json:
        return dict(self.field.schema)


class Request(BaseModel):
    """The query or the body of a request. Where `nulls` is not set, a null is as good as an absent field."""

    nulls: ClassVar[bool] = False


class Query(Request):
    """A query."""


class Body(Request):
    """A body."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        """The schema, closed, and with null wherever that is as good as absent."""
        found = handler.resolve_ref_schema(handler(schema))
        found["additionalProperties"] = False
        for name, inner in found["properties"].items():
            if not cls.nulls and "anyOf" not in inner and name not in found.get("required", ()):
                found["properties"][name] = {"anyOf": [inner, {"type": "null"}]}
        return found


class Changes(Body):
    """A body in which null is a value, and a field that is absent stays as it was."""

    nulls: ClassVar[bool] = True

    def given(self) -> Json:
        """The fields that were sent."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class Nothing(Body):
    """Where nothing is taken."""


AnyRequest = TypeVar("AnyRequest", bound=Request)


def read(model: type[AnyRequest], given: Mapping[str, Any]) -> AnyRequest:
    """Check what was sent. Raises `unknown_parameter`, and `invalid_request` and its kin, naming the field."""
    parameters.refuse_unknown(given.keys(), model.model_fields)
    for name, field in model.model_fields.items():
        if field.is_required() and given.get(name) is None:
            raise GatewayError("invalid_request", f"{name} is missing", details={"field": name})
    return model.model_validate({name: value for name, value in given.items() if model.nulls or value is not None})


def codes(model: type[Request]) -> set[str]:
    """The codes of the errors for values that are not what they must be."""
    return {code for field in model.model_fields.values() for code in _codes(field.annotation, field.metadata)}


def _codes(annotation: Any, metadata: Iterable[Any]) -> Iterable[str]:
    yield from (mark.field.code for mark in metadata if isinstance(mark, Reads))
    for inner in get_args(annotation):
        yield from _codes(inner, getattr(inner, "__metadata__", ()))

"""A parameter: what it must be, as JSON schema, and how it is read. One definition checks it and documents it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """One parameter. `code` is the error's where it is not what it must be; a `default` in the schema is kept to."""

    schema: Mapping[str, Any]
    read: Callable[[str, Any], T]
    code: str = "invalid_request"

    def __call__(self, name: str, value: Any) -> T:
        """Return what the value means. Raises GatewayError, naming the field."""
        return self.read(name, value)

    def about(self, text: str) -> "Field[T]":
        """The same, described."""
        return replace(self, schema={**self.schema, "description": text})

    def default(self, value: Any) -> "Field[T]":
        """The same; where it is absent, it has this value."""
        return replace(self, schema={**self.schema, "default": value})


def reads(schema: Mapping[str, Any], code: str = "invalid_request") -> Callable[[Callable[[str, Any], T]], Field[T]]:
    """Make a Field of the function that reads it."""
    return lambda read: Field(schema, read, code)


def or_null(inner: Field[T]) -> Field[T | None]:
    """The same, or null where that means something."""
    schema = {"anyOf": [inner.schema, {"type": "null"}]}
    return Field(schema, lambda name, value: None if value is None else inner.read(name, value), inner.code)

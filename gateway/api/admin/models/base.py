"""What the models share: they are closed, and have no fields but those that are declared.

A field that is `absent()` may be left out of an answer; every other one is always there.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from gateway.records import KvState

Number = Annotated[int | float, WithJsonSchema({"type": "number"})]  # an int stays one
Moment = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
Warnings = Annotated[list[str], Field(description="what went wrong or is missing")]
Kv = Annotated[KvState, Field(description="how much of its KV is pinned; `absent`: a thaw recomputes it")]
Json = dict[str, Any]


def absent() -> Any:
    """The default of a field that may be left out of an answer. It is neither documented nor sent."""
    return Field(default_factory=lambda: None)


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class ErrorInfo(Answer):
    code: str
    message: str
    hint: str
    retryable: bool
    details: Json


class Error(Answer):
    error: ErrorInfo


class Page(Answer):
    total: int
    has_more: bool
    limit: int
    offset: int

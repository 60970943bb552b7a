"""Parameters of MCP tools: how each is described to a model, and validated before the admin API is called."""

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gateway.api import parameters
from gateway.errors import GatewayError
from gateway.records import MAX_DESCRIPTION
from gateway.validation.fields import Field, reads

_SECONDS = {name: value for name, value in parameters.seconds.schema.items() if name != "exclusiveMinimum"}

Json = dict[str, Any]
Check = Callable[[str, Any], Any]
Tell = Callable[[Mapping[str, Any]], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class AdminRequest:
    """What is asked of the admin API."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Json | None = None


# Answers with what the admin API says, its errors included; progress is told on the way.
Ask = Callable[[AdminRequest, Tell], Awaitable[Json]]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a tool. `wire`: its name at the admin API, "" where that has no need of it."""

    schema: Json
    check: Check
    required: bool = False
    wire: str | None = None
    also: tuple[str, ...] = ()  # other names it is accepted under
    shown: bool = True


def schema_of(params: Mapping[str, Param]) -> Json:
    """What may be given, as JSON schema."""
    shown = {name: param for name, param in params.items() if param.shown}
    schema: Json = {"type": "object", "properties": {name: param.schema for name, param in shown.items()}}
    required = [name for name, param in shown.items() if param.required]
    return {**schema, "required": required, "additionalProperties": False}


def checked(params: Mapping[str, Param], arguments: Mapping[str, Any], *, nulls: bool = False) -> Json:
    """What was given, under our own names. null is nothing, unless `nulls`.

    Raises `unknown_parameter`, and `invalid_request` and its kin, naming the parameter.
    """
    names = {other: name for name, param in params.items() for other in (name, *param.also)}
    parameters.refuse_unknown(arguments, names)
    given: Json = {}
    said: dict[str, str] = {}
    for other, value in arguments.items():
        if value is None and not nulls:
            continue
        name = names[other]
        if name in given:
            raise twice(said[name], other)
        given[name] = params[name].check(other, value)
        said[name] = other
    for name, param in params.items():
        if param.required and name not in given:
            raise GatewayError("invalid_request", f"{name} is missing", details={"field": name})
    return given


def twice(one: str, other: str) -> GatewayError:
    """The error for a parameter that is given under two names."""
    message = f"{one} and {other} are one parameter, and both are given"
    return GatewayError("invalid_request", message, hint="give one of them", details={"field": other})


class Maker(Protocol):
    """Makes a parameter of one kind; what it is not given it has by default."""

    def __call__(
        self, about: str = "", *, required: bool = False, wire: str | None = None, also: tuple[str, ...] = ()
    ) -> Param:
        """Make one, described as `about`."""
        ...


def _kind(read: Field[Any], **schema: Any) -> Maker:
    """A parameter that is read as the admin API reads it. `schema`: what a model is told otherwise."""
    told = {**read.schema, **schema}

    def make(about: str = "", *, required: bool = False, wire: str | None = None, also: tuple[str, ...] = ()) -> Param:
        return Param({**told, "description": about} if about else told, read.read, required, wire, also)

    return make


def whole(low: int, high: int) -> Maker:
    """A whole number from `low` to `high`."""
    return _kind(parameters.count(low, high))


def _seconds_or_none(name: str, value: Any) -> float | None:
    return None if type(value) in (int, float) and value == 0 else parameters.seconds(name, value)


def _warm(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "gpu" if value else "none"
    return parameters.one_of("gpu", "cpu", "none")(name, value)


def text(longest: int) -> Maker:
    """A string of at most so many characters."""
    return _kind(_text(longest))


def said(longest: int) -> Maker:
    """A string of at most so many characters that is not blank."""
    string = _text(longest)

    @reads({**string.schema, "minLength": 1})
    def check(name: str, value: Any) -> str:
        if not string.read(name, value).strip():
            raise parameters.invalid(name, "a non-blank string", value)
        return str(value)

    return _kind(check)


def _text(longest: int) -> Field[str]:
    known = parameters.line(longest)  # JSON has no NUL that a model would send: it is not told of it
    return replace(known, schema={name: value for name, value in known.schema.items() if name != "pattern"})


def one_of(*choices: str | bool, **same: str) -> Maker:
    """One of some words, or of others that stand for one of those: `same` has them."""

    def check(name: str, value: Any) -> Any:
        known = any(type(value) is type(choice) and value == choice for choice in [*choices, *same])
        if not known:
            raise parameters.invalid(name, f"one of {', '.join(as_query(choice) for choice in choices)}", value)
        return same.get(value, value)

    kind = "string" if all(isinstance(choice, str) for choice in choices) else "boolean"
    return _kind(Field({"type": kind, "enum": [*choices, *same]}, check))


def as_query(value: Any) -> str:
    """A value as it is written in a query."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


session = _kind(parameters.session_id, description="id of a session, as session_list gives it")
window = _kind(parameters.window_name, description="name of a window: letters, digits and _ . -")
tags = _kind(
    Field(parameters.tags.schema, lambda name, value: list(parameters.tags(name, value))),
    description="tags to find it by",
)
seconds = _kind(parameters.seconds)
seconds_or_none = _kind(Field({**_SECONDS, "minimum": 0}, _seconds_or_none))
flag = _kind(parameters.boolean)
limit = whole(1, 100)
offset = whole(0, 2**31)
description = text(MAX_DESCRIPTION)
warm = _kind(Field({"type": ["boolean", "string"], "enum": [True, False, "gpu", "cpu", "none"]}, _warm))

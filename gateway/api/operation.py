"""The definition of an admin operation: what it takes, what it answers, and its errors. `Endpoint` serves it, and
`gateway.api.admin.openapi` documents it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from gateway.api import requests
from gateway.validation import fields
from gateway.validation.fields import Field

Handler = Callable[..., Awaitable[Any]]  # takes a Call, and the query or the body

JSON = "application/json"
NDJSON = "application/x-ndjson"

# The placeholders of paths, and the error for a name that does not exist.
PLACEHOLDERS: Mapping[str, tuple[Field[str], str]] = {
    "name": (fields.window_name, "window_not_found"),
    "session_id": (fields.session_id, "session_not_found"),
}
# Errors of operations that need the engine.
ENGINE = ("model_mismatch", "engine_unreachable", "engine_timeout")
_ALWAYS = ("invalid_request", "unknown_parameter", "request_timeout", "payload_too_large", "too_complex", "internal")
_OF_NO_PROBE = ("unauthorized", "forbidden", "store_unavailable")
_IN_A_PATH = ("not_found", "method_not_allowed")  # a name with a slash in it is another path


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path. The handler's docstring is its summary; its result, an `answer`, is sent with `status`.

    `errors`: the codes that the handler itself raises. `also`: answers with another status. A `probe` needs no key.
    """

    method: str
    path: str
    handler: Handler
    answer: Any
    status: int = 200
    query: type[requests.Query] = requests.Query
    body: type[requests.Body] = requests.Nothing
    errors: tuple[str, ...] = ()
    also: Mapping[int, Any] = field(default_factory=dict)
    takes: str = JSON
    gives: str = JSON
    probe: bool = False

    @property
    def answers(self) -> dict[int, Any]:
        """The types of its JSON answers, by status."""
        if self.gives != JSON:
            return {}
        return {self.status: self.answer, **self.also}

    @property
    def placeholders(self) -> list[str]:
        """The names in braces of the path."""
        return re.findall(r"\{(\w+)\}", self.path)

    @property
    def codes(self) -> list[str]:
        """Every code that its errors may have."""
        found = [*_ALWAYS, *(() if self.probe else _OF_NO_PROBE), *self.errors]
        for name_field, missing in (PLACEHOLDERS[name] for name in self.placeholders):
            found += [name_field.code, missing, *_IN_A_PATH]
        found += [*requests.codes(self.query), *requests.codes(self.body)]
        found += ["storage_full"] if self.method != "GET" else []  # each of them writes to the store
        return sorted(set(found))


def operation(method: str, path: str, *, answer: Any = None, **options: Any) -> Callable[[Handler], Operation]:
    """Make an Operation of a function, whose annotations of `query`, `body` and the result are its models.

    `answer` overrides the result's.
    """

    def define(handler: Handler) -> Operation:
        types = get_type_hints(handler, include_extras=True)
        takes = {name: types[name] for name in ("query", "body") if name in types}
        return Operation(method, path, handler, answer or types["return"], **takes, **options)

    return define

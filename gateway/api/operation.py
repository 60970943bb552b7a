"""One definition of each admin route: what it takes, what it answers, and which errors. `Endpoint` serves it, and
`gateway.api.admin.openapi` documents it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

from gateway.api import parameters
from gateway.validation.fields import Field

if TYPE_CHECKING:
    from gateway.api.endpoint import Call

Json = dict[str, Any]
Verb = Callable[["Call"], Awaitable[Any]]

JSON = "application/json"
NDJSON = "application/x-ndjson"

# What may stand in a path, and the error where there is no such thing.
PLACEHOLDERS: Mapping[str, tuple[Field[str], str]] = {
    "name": (parameters.window_name, "window_not_found"),
    "session_id": (parameters.session_id, "session_not_found"),
}
# What a verb may raise that needs the engine.
ENGINE = ("model_mismatch", "engine_unreachable", "engine_timeout")
_ALWAYS = ("invalid_request", "unknown_parameter", "request_timeout", "payload_too_large", "too_complex", "internal")
_GUARDED = ("unauthorized", "forbidden")
_IN_A_PATH = ("not_found", "method_not_allowed")  # a name with a slash in it is another path


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path. The verb's docstring is its summary; what it returns, an `answer`, is sent under `status`.

    `required` names fields of the body; with `nulls`, a null in the body is a value, and else as good as absent.
    `errors`: the codes that the verb itself raises. `also`: answers under another status. A `probe` asks for no key.
    """

    method: str
    path: str
    verb: Verb
    answer: Any
    status: int = 200
    query: Mapping[str, Field[Any]] = field(default_factory=dict)
    body: Mapping[str, Field[Any]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    nulls: bool = False
    errors: tuple[str, ...] = ()
    also: Mapping[int, Any] = field(default_factory=dict)
    takes: str = JSON
    gives: str = JSON
    probe: bool = False

    @property
    def answers(self) -> dict[int, Any]:
        """The type of its JSON answers, by status."""
        if self.gives != JSON:
            return {}
        return {self.status: self.answer, **self.also}

    @property
    def placeholders(self) -> list[str]:
        """The names in braces of the path."""
        return re.findall(r"\{(\w+)\}", self.path)

    @property
    def codes(self) -> list[str]:
        """Every code that its error answers may have."""
        found = [*_ALWAYS, *(() if self.probe else _GUARDED), *self.errors]
        for known, missing in (PLACEHOLDERS[name] for name in self.placeholders):
            found += [known.code, missing, *_IN_A_PATH]
        found += [known.code for known in (*self.query.values(), *self.body.values())]
        found += ["storage_full"] if self.method != "GET" else []  # each of them writes to the store
        return sorted(set(found))


def operation(method: str, path: str, *, answer: Any = None, **options: Any) -> Callable[[Verb], Operation]:
    """Make an Operation of a function. Its return type is the type of the answer, unless another is given."""

    def define(verb: Verb) -> Operation:
        return Operation(method, path, verb, answer or get_type_hints(verb, include_extras=True)["return"], **options)

    return define

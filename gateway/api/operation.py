"""One definition of each admin route: what it takes, what it answers, and which errors. `Endpoint` serves it, and
`gateway.api.admin.openapi` documents it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

from gateway.api import parameters, requests
from gateway.validation.fields import Field

if TYPE_CHECKING:
    pass

Json = dict[str, Any]
Verb = Callable[..., Awaitable[Any]]  # of a Call, and of what is taken

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

    `errors`: the codes that the verb itself raises. `also`: answers under another status. A `probe` asks for no key.
    """

    method: str
    path: str
    verb: Verb
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
        found += [*requests.codes(self.query), *requests.codes(self.body)]
        found += ["storage_full"] if self.method != "GET" else []  # each of them writes to the store
        return sorted(set(found))


def operation(method: str, path: str, *, answer: Any = None, **options: Any) -> Callable[[Verb], Operation]:
    """Make an Operation of a function. The type of its argument `query` or `body` is what it takes; its return type is
    the type of the answer, unless another is given.
    """

    def define(verb: Verb) -> Operation:
        types = get_type_hints(verb, include_extras=True)
        takes = {name: types[name] for name in ("query", "body") if name in types}
        return Operation(method, path, verb, answer or types["return"], **takes, **options)

    return define

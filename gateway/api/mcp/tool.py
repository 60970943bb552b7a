"""MCP tools and resources: what an agent reads about them, and how a call becomes a request to the admin API."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel

from gateway.api.mcp import answers
from gateway.api.mcp.admin_request import AdminRequest, Json
from gateway.api.mcp.arguments import schema_of, without_blanks
from gateway.api.requests import Request, read
from gateway.errors import GatewayError
from gateway.records import check_window_name

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_READS = (  # routes that change nothing, but for those with GET
    "POST /admin/ask",
    "POST /admin/policies/check",
    "POST /admin/windows/{window_name}/ask",
    "POST /admin/windows/{window_name}/verify",
)


@dataclass(frozen=True, slots=True)
class About:
    """What an agent has to know before it calls a tool: what that does, when to use it, its cost, what it returns."""

    does: str
    use: str
    cost: str
    returns: str

    def __str__(self) -> str:
        return f"{self.does}. Use it {self.use}. Cost: {self.cost}. Returns {self.returns}."


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool, the admin routes that it calls, and the `kinds` of answers that it gives.

    Of several routes, a call uses the one whose placeholders are given; `request_of` makes the request where that does
    not decide it. The output schema omits the content of the fields `brief`. Of the arguments, those that are given are
    sent, and the defaults of the fields `always`, which differ from the admin API's. An empty string clears the fields
    `cleared`; elsewhere a blank one counts as absent. `adds`: arguments that add a field to the answer if they are
    true, with that field's name and how it is made of the answer.
    """

    name: str
    routes: tuple[str, ...]
    about: About
    arguments: type[Request]
    kinds: tuple[type[BaseModel], ...]
    brief: tuple[str, ...] = ()
    shape: Callable[[Json], Json] = lambda answer: answer
    adds: tuple[tuple[str, str, Callable[[Json], Json]], ...] = ()
    always: frozenset[str] = frozenset()
    cleared: frozenset[str] = frozenset()
    destroys: bool = False
    request_of: Callable[[Json], AdminRequest] | None = None

    @property
    def reads_only(self) -> bool:
        """Whether it changes nothing."""
        return all(route.startswith("GET ") or route in _READS for route in self.routes)

    def result(self, answer: Json, arguments: Mapping[str, Any]) -> Json:
        """What a call returns for the admin API's answer."""
        added = {name: add(answer) for flag, name, add in self.adds if arguments.get(flag) is True}
        return {"success": True, **self.shape(answer), **added}

    @property
    def input_schema(self) -> Json:
        """The arguments, as JSON schema. The names of the replaced system are accepted too, and not documented."""
        return schema_of(self.arguments)

    @property
    def answer(self) -> Json:
        """The answer to a call that succeeds, as JSON schema."""
        return answers.schema_of(self.kinds, self.brief)

    @property
    def output_schema(self) -> Json:
        """The answer, or an error: some clients validate errors against the schema too, and hide what does not fit."""
        schema = {name: value for name, value in self.answer.items() if name != "required"}
        properties = {"success": {"type": "boolean"}, **self.answer["properties"], "error": {"type": "object"}}
        either = [{"required": self.answer["required"]}, {"required": ["error"]}]
        return {**schema, "properties": properties, "anyOf": either}

    def request(self, arguments: Mapping[str, Any]) -> AdminRequest:
        """Turn a call into a request to the admin API. Raises `invalid_request` and its kin, naming the parameter."""
        valid = read(self.arguments, without_blanks(self.arguments, arguments, self.cleared))
        given = valid.model_dump(include=valid.model_fields_set | self.always)
        if self.request_of is not None:
            return self.request_of(given)
        method, path = self._route(given).split(" ")
        for name in _PLACEHOLDER.findall(path):
            path = path.replace(f"{{{name}}}", quote(given.pop(name), safe=""))
        if method in ("POST", "PUT", "PATCH"):
            return AdminRequest(method, path, body=given)
        return AdminRequest(method, path, {name: _as_query(value) for name, value in given.items() if value != ()})

    def _route(self, given: Json) -> str:
        fit = [route for route in self.routes if given.keys() >= set(_PLACEHOLDER.findall(route))]
        if len(fit) == 1:
            return fit[0]
        names = " or ".join(name for route in self.routes for name in _PLACEHOLDER.findall(route))
        raise GatewayError("invalid_request", f"give exactly one of {names}", details={"field": names})


def _as_query(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Resource:
    """Something to read. `uri` may have one placeholder, which the route has too. `also`: other names of it."""

    uri: str
    name: str
    about: str
    route: str
    shape: Callable[[Json], Json] = lambda answer: answer
    also: tuple[str, ...] = ()

    def path(self, uri: str) -> str | None:
        """The admin API's path for `uri`, or None if that is another resource. Raises `invalid_window_name`."""
        if uri in self.also:
            return self.route
        pattern = _PLACEHOLDER.sub("([^/]*)", re.escape(self.uri).replace(r"\{", "{").replace(r"\}", "}"))
        match = re.fullmatch(pattern, uri)
        if match is None:
            return None
        names = [check_window_name(unquote(part), "window name in the URI") for part in match.groups()]
        return self.route.format(name=quote(names[0], safe="")) if names else self.route

"""MCP tools and resources: what a model reads about them, and how a call becomes an admin request."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel

from gateway.api.mcp import answers
from gateway.api.mcp import parameters as params
from gateway.api.mcp.parameters import AdminRequest, Json, Param
from gateway.errors import GatewayError
from gateway.records import check_window_name

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_ERROR: Json = {"type": "object", "required": ["code", "message", "hint", "retryable", "details"]}


@dataclass(frozen=True, slots=True)
class About:
    """What a model has to know before it calls a tool: what that does, when to use it, its cost, what it returns."""

    does: str
    use: str
    cost: str
    returns: str

    def __str__(self) -> str:
        return f"{self.does}. Use it {self.use}. Cost: {self.cost}. Returns {self.returns}."


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: which admin routes it stands for (the one whose placeholders are given), and what it answers: one of
    `kinds`, of which a client is told without what is in the fields `brief`.

    `asks` makes the request where the placeholders do not say which route it is.
    """

    name: str
    routes: tuple[str, ...]
    about: About
    params: Mapping[str, Param]
    kinds: tuple[type[BaseModel], ...]
    brief: tuple[str, ...] = ()
    shape: Callable[[Json], Json] = lambda answer: answer
    defaults: Mapping[str, Any] = field(default_factory=dict)
    destroys: bool = False
    asks: Callable[[Json], AdminRequest] | None = None

    @property
    def reads_only(self) -> bool:
        """Whether it changes nothing."""
        return all(route.startswith("GET ") or route in _READS for route in self.routes)

    @property
    def input_schema(self) -> Json:
        """What a client may send, as JSON schema. The words of the replaced system are taken too, and not shown."""
        return params.schema_of(self.params)

    @property
    def answer(self) -> Json:
        """What it answers where nothing goes wrong, as JSON schema."""
        return answers.schema_of(self.kinds, self.brief)

    @property
    def output_schema(self) -> Json:
        """What it answers, or an error: some clients hold errors against the schema too, and hide what does not fit."""
        schema = {name: value for name, value in self.answer.items() if name != "required"}
        properties = {**self.answer["properties"], "error": _ERROR}
        either = [{"required": self.answer["required"]}, {"required": ["error"]}]
        return {**schema, "properties": properties, "anyOf": either}

    def request(self, arguments: Mapping[str, Any]) -> AdminRequest:
        """Turn a call into a request to the admin API. Raises `invalid_request` and its kin, naming the parameter."""
        given = {**self.defaults, **params.checked(self.params, arguments)}
        if self.asks is not None:
            return self.asks(given)
        method, path = self._route(given).split(" ")
        in_path = set(_PLACEHOLDER.findall(path))
        for name in in_path:
            path = path.replace(f"{{{name}}}", quote(given[name], safe=""))
        sent = {
            (name if param.wire is None else param.wire): given[name]
            for name, param in self.params.items()
            if name in given and name not in in_path and param.wire != ""
        }
        if method in ("POST", "PUT", "PATCH"):
            return AdminRequest(method, path, body=sent)
        return AdminRequest(method, path, {name: params.as_query(value) for name, value in sent.items()})

    def _route(self, given: Json) -> str:
        fit = [route for route in self.routes if given.keys() >= set(_PLACEHOLDER.findall(route))]
        if len(fit) == 1:
            return fit[0]
        names = " or ".join(name for route in self.routes for name in _PLACEHOLDER.findall(route))
        raise GatewayError("invalid_request", f"give exactly one of {names}", details={"field": names})


@dataclass(frozen=True, slots=True)
class Resource:
    """Something to read: `uri` may have one placeholder, which the route has too. `also`: other names of it."""

    uri: str
    name: str
    about: str
    route: str
    shape: Callable[[Json], Json] = lambda answer: answer
    also: tuple[str, ...] = ()

    def path(self, uri: str) -> str | None:
        """The path that answers for `uri`, or None if that is another resource. Raises `invalid_window_name`."""
        if uri in self.also:
            return self.route
        pattern = _PLACEHOLDER.sub("([^/]*)", re.escape(self.uri).replace(r"\{", "{").replace(r"\}", "}"))
        found = re.fullmatch(pattern, uri)
        if found is None:
            return None
        names = [check_window_name(unquote(part), "window name in the URI") for part in found.groups()]
        return self.route.format(name=quote(names[0], safe="")) if names else self.route


# Routes that are no GET and yet change nothing.
_READS = (
    "POST /admin/policies/check",
    "POST /admin/windows/{window_name}/ask",
    "POST /admin/windows/{window_name}/verify",
)

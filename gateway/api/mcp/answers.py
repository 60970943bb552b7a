"""The answers of the tools, as JSON schemas made from the admin API's models.

These are shorter than the admin API's own, because an agent pays for them in each conversation: they allow additional
properties, have no references, stop at the second level of objects, and tell only of the first what is always there.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from gateway.api import schemas
from gateway.api.admin.models import freezing, responses, status
from gateway.api.mcp.admin_request import Json

_DEPTH = 2
_NO_ID = (
    "unknown: your client sends no session id to MCP servers. Do not guess: ask the user which session of session_list "
    "this is, or to configure the id that the client sends to the model here too: as the header X-Session-ID, or in "
    "CWG_SESSION_ID for `cwg mcp`"
)


class Windows(responses.Page):
    windows: list[responses.WindowLine]


class Sessions(responses.Page):
    sessions: list[responses.SessionLine]


class WindowStatus(responses.WindowStatus):
    type: Literal["window"]
    window: Json


class SessionStatus(responses.Session):
    type: Literal["session"]


class CacheStats(status.Cache):
    total_blocks: int
    total_bytes: int


class HealthOf(status.Component):
    name: str


class Health(status.Health):
    components: list[HealthOf]  # type: ignore[assignment] # here a list
    by_name: status.Components


class CurrentSession(responses.CurrentSession):
    message: str


class PolicyConfig(responses.Answer):
    policy: freezing.Rules
    set_at_run_time: list[str]
    available: list[str]
    warnings: list[str]


def current_session(answer: Json) -> Json:
    """The answer of GET /admin/current-session in words: an agent must not guess."""
    session_id, source, known = answer["session_id"], answer["recognised_by"], answer["sessions"]
    if source is None:
        message = _NO_ID
    elif session_id is None:
        message = f"your client's id ({source}) stands for several conversations. Do not guess: ask the user"
    elif known:
        message = f"you are in session {session_id}, by the id that your client sends ({source})"
    else:
        message = (
            f"your client names session {session_id} ({source}), which has no finished turn. If you have had one, the "
            "client sends the model another id: session_list has it"
        )
    return {**answer, "message": message}


def policy(answer: Json) -> Json:
    """The answer of /admin/policies, with the rules in an object of their own."""
    about = {name: answer[name] for name in answer if name not in freezing.Rules.model_fields}
    return {"policy": {name: answer[name] for name in answer if name not in about}, "warnings": [], **about}


@cache
def schema_of(kinds: tuple[type[BaseModel], ...], brief: Collection[str] = ()) -> Json:
    """The schema of an answer that is one of `kinds`, without the content of the fields in `brief`."""
    found, definitions = schemas.of_types(kinds)
    shapes: list[Json] = [_simple(schema, definitions, _DEPTH) for schema in found]
    first, *others = shapes
    for other in others:
        first["properties"] = _either(first["properties"], other["properties"])
        first["required"] = [name for name in first["required"] if name in other["required"]]
    for name in brief:
        first["properties"][name] = _simple(first["properties"][name], {}, 0)
    return first


def _simple(schema: Any, definitions: Mapping[str, Json], depth: int) -> Any:
    """The schema with at most `depth` levels of objects."""
    if isinstance(schema, list):
        return [_simple(inner, definitions, depth) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {**definitions[schema["$ref"].rpartition("/")[2]], **schema}
    if "properties" in schema and depth == 0:
        return {name: schema[name] for name in ("type", "description") if name in schema}
    left_out = ("$ref", "format") if depth == _DEPTH else ("$ref", "format", "required")
    kept = {name: inner for name, inner in schema.items() if name not in left_out}
    if kept.get("additionalProperties") in (True, False):
        del kept["additionalProperties"]
    properties = {name: _simple(inner, definitions, depth - 1) for name, inner in kept.pop("properties", {}).items()}
    simple = {name: _simple(inner, definitions, depth) for name, inner in kept.items()}
    return _with_null({**simple, "properties": properties} if properties else simple)


def _with_null(schema: Json) -> Json:
    """The schema with `type: [x, null]` in place of `anyOf` with x and null, which is longer."""
    kinds = schema.get("anyOf", [])
    if len(kinds) != 2 or kinds[1] != {"type": "null"} or "type" not in kinds[0] or "enum" in kinds[0]:
        return schema
    about = {name: inner for name, inner in schema.items() if name != "anyOf"}
    return {**kinds[0], **about, "type": [kinds[0]["type"], "null"]}


def _either(some: Json, others: Json) -> Json:
    """The properties of an answer that is one of two objects."""
    both = {name: _one_of(some[name], others[name]) for name in some if name in others}
    return {**some, **others, **both}


def _one_of(one: Json, other: Json) -> Json:
    if one == other:
        return one
    values = [value for schema in (one, other) for value in _enum(schema)]
    return {"type": "string", "enum": [*dict.fromkeys(values)]} if values else {"anyOf": [one, other]}


def _enum(schema: Json) -> list[str]:
    """The values of an enumeration."""
    return [schema["const"]] if "const" in schema else schema.get("enum", [])

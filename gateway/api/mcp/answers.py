"""What the tools answer, as JSON schemas made from the admin API's models.

A schema is shorter than the admin API's own, because an agent pays for it in each conversation: it says what is always
there and leaves open what else may be, has no references, and of what lies deeper than one level only that it is an
object.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from gateway.api import schemas
from gateway.api.admin import models
from gateway.api.mcp.parameters import Json

_DEPTH = 2


class WindowStatus(models.WindowStatus):
    type: Literal["window"]


class SessionStatus(models.Session):
    type: Literal["session"]


class CacheStats(models.Cache):
    total_blocks: int
    total_bytes: int


class PolicyConfig(models.Answer):
    policy: models.Rules
    set_at_run_time: list[str]
    available: list[str]
    warnings: list[str]


def typed(answer: Json) -> Json:
    """A status says of what it is."""
    return {"type": "window" if "kv_cache" in answer else "session", **answer}


def cache_stats(answer: Json) -> Json:
    """What GET /admin/cache says, and the sum of its tiers."""
    tiers = answer["tiers"].values()
    total = {
        "total_blocks": sum(tier["objects"] for tier in tiers),
        "total_bytes": sum(tier["bytes"] for tier in tiers),
    }
    return {**total, **answer}


def policy(answer: Json) -> Json:
    """The rules apart from what is said of them."""
    about: Json = {name: answer[name] for name in ("set_at_run_time", "available", "warnings") if name in answer}
    rules = {name: value for name, value in answer.items() if name not in about}
    return {"policy": rules, "warnings": [], **about}


@cache
def schema_of(kinds: tuple[type[BaseModel], ...], brief: Collection[str] = ()) -> Json:
    """The schema of an answer that is one of `kinds`. Fields in `brief` are shown without what is in them."""
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
    """A schema of at most so many objects one in the other."""
    if isinstance(schema, list):
        return [_simple(inner, definitions, depth) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {**definitions[schema["$ref"].rpartition("/")[2]], **schema}
    if "properties" in schema and depth == 0:
        return {name: schema[name] for name in ("type", "description") if name in schema}
    kept = {name: inner for name, inner in schema.items() if name not in ("$ref", "format")}
    if kept.get("additionalProperties") in (True, False):
        del kept["additionalProperties"]
    properties = {name: _simple(inner, definitions, depth - 1) for name, inner in kept.pop("properties", {}).items()}
    simple = {name: _simple(inner, definitions, depth) for name, inner in kept.items()}
    return _with_null({**simple, "properties": properties} if properties else simple)


def _with_null(schema: Json) -> Json:
    """`type: [x, null]` for what may be an x or null: that is shorter than `anyOf`."""
    kinds = schema.get("anyOf", [])
    if len(kinds) != 2 or kinds[1] != {"type": "null"} or "type" not in kinds[0] or "enum" in kinds[0]:
        return schema
    about = {name: inner for name, inner in schema.items() if name != "anyOf"}
    return {**kinds[0], **about, "type": [kinds[0]["type"], "null"]}


def _either(some: Json, others: Json) -> Json:
    """The properties of two objects of which an answer is one."""
    both = {name: _one_of(some[name], others[name]) for name in some.keys() & others.keys()}
    return {name: both.get(name, schema) for name, schema in {**some, **others}.items()}


def _one_of(one: Json, other: Json) -> Json:
    if one == other:
        return one
    words = [word for schema in (one, other) for word in _words(schema)]
    return {"type": "string", "enum": [*dict.fromkeys(words)]} if words else {"anyOf": [one, other]}


def _words(schema: Json) -> list[str]:
    """The words that a string may be, if only a few."""
    return [schema["const"]] if "const" in schema else schema.get("enum", [])

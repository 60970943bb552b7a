"""Arguments of the MCP tools: the admin API's requests, and where a tool takes more than the admin API does."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AliasChoices, Field, GetJsonSchemaHandler
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema

from gateway.api import schemas
from gateway.api.admin.models import requests
from gateway.api.admin.models.requests import Flag, SessionId, WindowName
from gateway.api.health import COMPONENTS
from gateway.api.mcp.admin_request import Json
from gateway.api.requests import Reads, Request, names_of, read
from gateway.dialects.search_text import MAX_SEARCH
from gateway.errors import GatewayError
from gateway.records import SessionState
from gateway.store.types import SORT_COLUMNS
from gateway.validation import fields
from gateway.validation.fields import or_null, reads
from gateway.windows.autofreeze import rules
from gateway.windows.thaw import Warm
from policies.token_threshold import MOST_TOKENS


def schema_of(model: type[Request]) -> Json:
    """The JSON schema of arguments. Null is accepted for absent ones too, which no agent needs to know."""
    schema = schemas.of_request(model)
    properties = {name: schemas.without_null(inner) for name, inner in schema.get("properties", {}).items()}
    required = schema.get("required", [])
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def without_blanks(model: type[Request], given: Mapping[str, Any], cleared: Collection[str] = ()) -> Json:
    """The arguments without the blank strings of optional parameters: models fill in what they do not use.

    An empty string remains where it clears something.
    """
    fields_by_name = names_of(model)

    def says_nothing(name: str, value: object) -> bool:
        if name not in fields_by_name or not isinstance(value, str) or value.strip():
            return False
        return not model.model_fields[fields_by_name[name]].is_required() and not (name in cleared and value == "")

    return {name: value for name, value in given.items() if not says_nothing(name, value)}


def _one_of(*choices: str, **synonyms: str) -> fields.Field[str]:
    """One of some words, or of others that mean one of them."""
    inner = fields.one_of(*choices)

    @reads({"type": "string", "enum": [*choices, *synonyms]})
    def read(name: str, value: object) -> str:
        word = value.lower() if isinstance(value, str) else value
        return inner.read(name, synonyms.get(word, word) if isinstance(word, str) else value)

    return read


@reads({"type": ["boolean", "string"], "enum": [True, False, "gpu", "cpu", "none"]})
def _warm(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "gpu" if value else "none"
    return fields.one_of("gpu", "cpu", "none").read(name, value)


@reads({"type": "number", "minimum": 0, "exclusiveMaximum": fields.seconds.schema["exclusiveMaximum"]})
def _seconds_or_zero(name: str, value: object) -> float | None:
    return None if type(value) in (int, float) and value == 0 else fields.seconds.read(name, value)


def _only_true(why: str) -> fields.Field[bool]:
    """True: the replaced system could also do otherwise, and we cannot."""

    @reads({"type": "boolean", "enum": [True]})
    def read(name: str, value: object) -> bool:
        if fields.boolean.read(name, value):
            return True
        message = f"{name} must be true, not false"
        raise GatewayError("invalid_request", message, hint=f"omit it: {why}", details={"field": name})

    return read


def is_share(value: object) -> bool:
    """Whether a threshold is a share of the context limit, not a number of tokens."""
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= 1


@reads(or_null(fields.number(MOST_TOKENS)).schema)
def _tokens_or_share(name: str, value: object) -> Any:
    return value if is_share(value) else rules.READERS["token_threshold"].read(name, value)


@reads({})
def _tokens_or_zero(name: str, value: object) -> Any:
    return None if type(value) is int and value == 0 else rules.READERS["token_threshold"].read(name, value)


# The context, which the replaced system did not have by itself. It has no effect, so models do not read of it.
_Unused = SkipJsonSchema[Annotated[str, Reads(fields.text(2**20))]]


class Window(Request):
    window_name: WindowName


class Session(Request):
    session_id: SessionId


class Freeze(requests.FreezeRequest):
    prompt_prefix: _Unused = Field("", exclude=True)


class Thaw(requests.ThawRequest, Window):
    warm: Annotated[Warm, Reads(_warm)] = Field(
        "gpu",
        validation_alias=AliasChoices("warm_cache", "warm"),
        description="how far up to load now: true or `gpu`: into the engine, and measured; `cpu`: into memory; false "
        "or `none`: with the first request",
    )


class Ask(requests.AskAnyRequest, requests.AskRequest):
    window_name: WindowName | None = Field(None, description="which window; without it, those that match best")
    question: requests.Question = Field(description="what to ask; a window knows nothing later")


class Clone(requests.CloneRequest):
    source_window: WindowName
    target_window: WindowName = Field(
        validation_alias=AliasChoices("target_window", "new_window_name"), description="name of the clone"
    )


class FanOut(requests.FanoutRequest, Window):
    pass


class WindowList(requests.WindowFilters):
    created_after: Annotated[str, Reads(fields.text(64))] | None = Field(None, description="ISO 8601 date or time")
    created_before: Annotated[str, Reads(fields.text(64))] | None = Field(None, description="ISO 8601 date or time")
    sort_by: Annotated[str, Reads(_one_of(*SORT_COLUMNS, size_bytes="size", total_size_bytes="size"))] = Field(
        "created_at", description="what to sort by"
    )


class Search(Request):
    q: Annotated[str, Reads(fields.non_blank(MAX_SEARCH))] = Field(
        validation_alias=AliasChoices("query", "q"), description="what to look for, literally"
    )
    limit: Annotated[int, Reads(fields.whole(1, 100))] = Field(20, description="how many to return")


class Status(requests.StatusQuery):
    window_name: WindowName | None = None
    session_id: SessionId | None = None
    include_cache_stats: Flag = Field(False, exclude=True, description="also `cache_stats`: a summary of the cache")


class Tree(requests.TreeQuery):
    limit: requests.NodeCount = 100


class Savings(requests.LedgerQuery):
    limit: requests.LedgerLimit = Field(5, description="how many windows, and how many sessions")


class Verify(requests.VerifyRequest, Window):
    pass


class Describe(Window):
    description: requests.Description | None = Field(None, description="the new one; empty to clear it")
    tags: requests.Tags | None = Field(None, description="the new ones, all of them; empty to clear them")
    ttl_seconds: Annotated[float, Reads(_seconds_or_zero)] | None = Field(
        None, description="seconds it is kept for from now on; 0: for ever"
    )


_BLOCKS_GO = "KV that another window or a session uses stays anyway, and the rest could not be found by anybody"


class Delete(Window):
    delete_blocks: Annotated[bool, Reads(_only_true(_BLOCKS_GO))] = Field(
        True, exclude=True, description="KV that nobody else holds always goes with it"
    )
    force: Flag = Field(False, exclude=True, description="accepted; nothing asks for confirmation")


class SessionList(requests.SessionsQuery):
    state: Annotated[SessionState, Reads(_one_of(*get_args(SessionState)).about("only in this state"))] | None = Field(
        None, validation_alias=AliasChoices("state_filter", "state")
    )


class HealthCheck(requests.HealthQuery):
    component: Annotated[str, Reads(_one_of(*COMPONENTS, kv_store="cache", vllm="engine", registry="store"))] | None = (
        Field(None, description="only this one")
    )


class AutoFreezeCheck(requests.PolicyCheckRequest):
    token_count: SkipJsonSchema[Annotated[int, Reads(fields.whole(0, MOST_TOKENS))]] = Field(0, exclude=True)
    prompt_prefix: _Unused = Field("", exclude=True)


class RuleChanges(requests.PolicyChanges):
    """The rules, some of them also under the names and with the values that the replaced system had."""

    token_threshold: Annotated[Any, Reads(_tokens_or_share)] = Field(
        None, description="freeze at this many tokens; a number up to 1 means context_share; null: off"
    )
    naming_pattern: Annotated[Any, Reads(rules.READERS["naming_pattern"])] = Field(
        None, validation_alias=AliasChoices("naming_pattern", "window_name_pattern")
    )
    token_count_threshold: SkipJsonSchema[Annotated[Any, Reads(_tokens_or_zero)]] = None
    include_prompt: SkipJsonSchema[Annotated[bool, Reads(_only_true("a window always has its text"))]] = Field(
        True, exclude=True
    )


@reads(schema_of(RuleChanges))
def _policy(name: str, value: object) -> Json:
    if not isinstance(value, dict):
        raise fields.invalid(name, "an object", value)
    changes: Json = read(RuleChanges, without_blanks(RuleChanges, value)).given()
    return changes


class AutoFreezeConfig(RuleChanges):
    """Rules are also accepted without `policy` around them, which is not documented."""

    nulls: ClassVar[bool] = False
    policy: Annotated[Json, Reads(_policy)] | None = Field(None, description="the rules to change")
    reset: Flag = Field(False, description="back to the settings that the gateway was started with")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        found = super().__get_pydantic_json_schema__(schema, handler)
        return {**found, "properties": {name: found["properties"][name] for name in ("policy", "reset")}}

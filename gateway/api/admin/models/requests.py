"""Requests of the admin API: the body or the query of each operation."""

from typing import Annotated, Any, get_args

from pydantic import Field

from gateway.api import parameters
from gateway.api.admin.models.base import absent
from gateway.api.health import COMPONENTS
from gateway.api.requests import Body, Changes, Query, Reads
from gateway.records import SessionState
from gateway.store.types import SORT_KEYS
from gateway.validation.fields import or_null, reads
from gateway.windows import ask, fanout, tree
from gateway.windows.autofreeze import rules
from gateway.windows.thaw import Warm

_LINE = parameters.line(ask.MAX_QUESTION)


@reads({**_LINE.schema, "minLength": 1})
def question(name: str, value: object) -> str:
    """What somebody asks: a text that is not blank."""
    asked = _LINE.read(name, value)
    if not asked.strip():
        raise parameters.invalid(name, "a non-blank string", value)
    return asked


SessionId = Annotated[str, Reads(parameters.session_id)]
WindowName = Annotated[str, Reads(parameters.window_name)]
Description = Annotated[str, Reads(parameters.description)]
Tags = Annotated[tuple[str, ...], Reads(parameters.tags)]
Seconds = Annotated[float, Reads(parameters.seconds)]
ModelName = Annotated[str, Reads(parameters.line(500))]
Moment = Annotated[float, Reads(parameters.when)]
Boolean = Annotated[bool, Reads(parameters.boolean)]  # in a body
Flag = Annotated[bool, Reads(parameters.flag)]  # in a query
MaxTokens = Annotated[int, Reads(parameters.count(1, ask.MAX_TOKENS))]
Question = Annotated[str, Reads(question)]


class _Page(Query):
    limit: Annotated[int, Reads(parameters.whole(1, 100))] = 50
    offset: Annotated[int, Reads(parameters.whole(0, 2**31))] = 0


class SessionsQuery(_Page):
    state: Annotated[SessionState, Reads(parameters.one_of(*get_args(SessionState)))] | None = None
    model: ModelName | None = None


class WindowsQuery(_Page):
    tags: Tags | None = Field(None, description="only with all of these tags")
    model: ModelName | None = None
    session_id: SessionId | None = None
    search: Annotated[str, Reads(parameters.line(200))] | None = Field(
        None, description="only with this text in name or description"
    )
    created_after: Moment | None = None
    created_before: Moment | None = None
    sort_by: Annotated[str, Reads(parameters.one_of(*SORT_KEYS))] = "created_at"
    sort_order: Annotated[str, Reads(parameters.one_of("asc", "desc"))] = "desc"


class StatusQuery(Query):
    include_blocks: Flag = False
    include_lineage: Flag = False


class ExportQuery(Query):
    as_text: Flag = Field(False, description="leave the KV out")


class ImportQuery(Query):
    window_name: WindowName | None = Field(None, description="without it, the name that it was exported under")
    as_text: Flag = Field(False, description="take text and ids, and leave the KV")


class TreeQuery(Query):
    limit: Annotated[int, Reads(parameters.whole(1, tree.MOST))] = Field(
        1000, description="windows, and sessions, at most"
    )


class HealthQuery(Query):
    component: Annotated[str, Reads(parameters.one_of(*COMPONENTS))] | None = None


class MetricsQuery(Query):
    format: Annotated[str, Reads(parameters.one_of("json", "prometheus"))] = "json"


class FreezeRequest(Body):
    session_id: SessionId
    window_name: WindowName
    description: Description | None = None
    tags: Tags | None = None
    ttl_seconds: Seconds | None = None


class ThawRequest(Body):
    new_session_id: SessionId | None = Field(None, description="generated if not given")
    warm: Annotated[Warm, Reads(parameters.one_of("none", "cpu", "gpu"))] = "none"
    continuation_prompt: Question | None = Field(None, description="sent immediately as the new session's next turn")
    max_tokens: MaxTokens | None = Field(None, description="of the answer to continuation_prompt")


class CloneRequest(Body):
    target_window: WindowName
    description: Description | None = None
    tags: Tags | None = None
    isolate: Boolean = Field(False, description="under its own salt")


class DescribeRequest(Changes):
    description: Annotated[str | None, Reads(or_null(parameters.description))] = absent()
    tags: Annotated[tuple[str, ...] | None, Reads(or_null(parameters.tags))] = absent()
    ttl_seconds: Annotated[float | None, Reads(or_null(parameters.seconds))] = absent()


class VerifyRequest(Body):
    deep: Boolean = Field(False, description="have the engine use the KV, and compare")


class AskRequest(Body):
    question: Question
    max_tokens: MaxTokens | None = None


class FanoutRequest(Body):
    count: Annotated[int, Reads(parameters.count(1, fanout.MOST))]
    prefix: SessionId | None = Field(None, description="the new sessions are named PREFIX-1, PREFIX-2 and so on")


class PolicyChanges(Changes):
    enabled: Annotated[Any, Reads(rules.READERS["enabled"])] = absent()
    idle_timeout_minutes: Annotated[Any, Reads(rules.READERS["idle_timeout_minutes"])] = absent()
    token_threshold: Annotated[Any, Reads(rules.READERS["token_threshold"])] = absent()
    context_share: Annotated[Any, Reads(rules.READERS["context_share"])] = absent()
    at_shutdown: Annotated[Any, Reads(rules.READERS["at_shutdown"])] = absent()
    policies: Annotated[Any, Reads(rules.READERS["policies"])] = absent()
    naming_pattern: Annotated[Any, Reads(rules.READERS["naming_pattern"])] = absent()
    cooldown_seconds: Annotated[Any, Reads(rules.READERS["cooldown_seconds"])] = absent()
    keep: Annotated[Any, Reads(rules.READERS["keep"])] = absent()
    ttl_seconds: Annotated[Any, Reads(rules.READERS["ttl_seconds"])] = absent()


class PolicyCheckRequest(Body):
    session_id: SessionId

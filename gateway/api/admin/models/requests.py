"""Requests of the admin API: the body or the query of each operation."""

from typing import Annotated, Any, get_args

from pydantic import AliasChoices, Field, create_model

from gateway.api.admin.models.responses import absent
from gateway.api.health import COMPONENTS
from gateway.api.requests import Body, Changes, Query, Reads
from gateway.dialects.search_text import MAX_SEARCH
from gateway.records import MAX_MODEL, SessionState
from gateway.store.types import SORT_COLUMNS
from gateway.validation import fields
from gateway.validation.fields import or_null
from gateway.windows import ask, ask_any, at_turn, thaw, tree
from gateway.windows.autofreeze import rules

MAX_URL = 2000  # characters

SessionId = Annotated[str, Reads(fields.session_id)]
WindowName = Annotated[str, Reads(fields.window_name)]
Description = Annotated[str, Reads(fields.description)]
Tags = Annotated[tuple[str, ...], Reads(fields.tags)]
Seconds = Annotated[float, Reads(fields.seconds)]
ModelName = Annotated[str, Reads(fields.text(MAX_MODEL).about("only of this model"))]
Moment = Annotated[float, Reads(fields.moment)]
State = Annotated[SessionState, Reads(fields.one_of(*get_args(SessionState)).about("only in this state"))]
Flag = Annotated[bool, Reads(fields.boolean)]
NodeCount = Annotated[
    int, Reads(fields.whole(1, tree.MAX_NODES).about("at most so many windows, and so many sessions"))
]
LedgerLimit = Annotated[int, Reads(fields.whole(1, 100))]
MaxTokens = Annotated[
    int, Reads(fields.whole(1, ask.MAX_TOKENS).about(f"most tokens of the answer; default {ask.DEFAULT_TOKENS}"))
]
AtTurn = Annotated[
    int, Reads(fields.whole(1, at_turn.MAX_TURN).about("the turn to begin at, 1 for the first; `messages` has them"))
]
Question = Annotated[str, Reads(fields.non_blank(ask.MAX_QUESTION))]


class _Page(Query):
    limit: Annotated[int, Reads(fields.whole(1, 100))] = Field(50, description="how many to return")
    offset: Annotated[int, Reads(fields.whole(0, 2**31))] = Field(0, description="how many to skip")


class SessionsQuery(_Page):
    state: State | None = None
    model: ModelName | None = None


class WindowFilters(_Page):
    tags: Tags | None = Field(None, description="only with all of these tags")
    model: ModelName | None = None
    session_id: SessionId | None = Field(None, description="only frozen from this session")
    search: Annotated[str, Reads(fields.text(MAX_SEARCH))] | None = Field(
        None,
        description="only with this text in name, description, tags or messages; each word may be part of a longer one",
    )
    sort_order: Annotated[str, Reads(fields.one_of("asc", "desc"))] = Field("desc", description="direction")


class WindowsQuery(WindowFilters):
    without_tags: Tags | None = Field(None, description="only with none of these tags, such as `auto`")
    created_after: Moment | None = None
    created_before: Moment | None = None
    sort_by: Annotated[str, Reads(fields.one_of(*SORT_COLUMNS))] = "created_at"


class SearchQuery(Query):
    q: Annotated[str, Reads(fields.non_blank(MAX_SEARCH))] = Field(description="what to look for, literally")
    limit: Annotated[int, Reads(fields.whole(1, 100))] = Field(20, description="how many to return")


class DrainRequest(Body):
    engine: Annotated[str, Reads(fields.non_blank(MAX_URL).about("its URL, or its host and port"))]
    undo: Flag = Field(False, description="let it have requests again")


class StatusQuery(Query):
    include_blocks: Flag = Field(False, description="list every KV object")
    include_lineage: Flag = Field(False, description="parent, ancestors and clones")


class ExportQuery(Query):
    as_text: Flag = Field(False, description="leave the KV out")


class ImportQuery(Query):
    window_name: WindowName | None = Field(None, description="without it, the name that it was exported under")
    as_text: Flag = Field(False, description="take text and ids, and leave the KV")


class TreeQuery(Query):
    limit: NodeCount = 1000


class LedgerQuery(Query):
    limit: LedgerLimit = Field(20, description="how many windows, and how many sessions")


class HealthQuery(Query):
    component: Annotated[str, Reads(fields.one_of(*COMPONENTS))] | None = None


class MetricsQuery(Query):
    format: Annotated[str, Reads(fields.one_of("json", "prometheus"))] = Field("json", description="of the answer")


class FreezeRequest(Body):
    session_id: SessionId
    window_name: WindowName
    description: Description | None = None
    tags: Tags | None = None
    ttl_seconds: Seconds | None = Field(None, description="seconds it is kept for; for ever if not given")


class ThawRequest(Body):
    new_session_id: SessionId | None = Field(None, description="generated if not given")
    into_session: SessionId | None = Field(
        None,
        validation_alias=AliasChoices("into_session", "into"),
        description="an existing session of the window's lineage, to be taken back to it",
    )
    keep_as: WindowName | None = Field(None, description="window to freeze `into_session` into first")
    at_turn: AtTurn | None = None
    warm: Annotated[thaw.Warm, Reads(fields.one_of("none", "cpu", "gpu"))] = "none"
    continuation_prompt: Question | None = Field(None, description="sent at once as the new session's next user turn")
    max_tokens: MaxTokens | None = Field(None, description="of the answer to continuation_prompt")
    as_text: Flag = Field(False, description="only its text, where the model changed")


class CloneRequest(Body):
    target_window: WindowName = Field(description="name of the clone")
    description: Description | None = None
    tags: Tags | None = Field(None, description="tags of the clone; those of the source if not given")
    isolate: Flag = Field(False, description="under a cache salt of its own")
    at_turn: AtTurn | None = None


class DescribeRequest(Changes):
    description: Annotated[str | None, Reads(or_null(fields.description))] = absent()
    tags: Annotated[tuple[str, ...] | None, Reads(or_null(fields.tags))] = absent()
    ttl_seconds: Annotated[float | None, Reads(or_null(fields.seconds))] = absent()


class VerifyRequest(Body):
    deep: Flag = Field(False, description="have the engine use the KV of each tier, and compare what it generates")


class AskRequest(Body):
    question: Question = Field(description="what to ask; the window knows nothing later")
    max_tokens: MaxTokens | None = None
    at_turn: AtTurn | None = None


class AskAnyRequest(Body):
    question: Question = Field(description="what to ask; the windows that match it best are asked")
    search: Annotated[str, Reads(fields.non_blank(MAX_SEARCH))] | None = Field(
        None, description="what to find the windows by; the question if not given"
    )
    max_windows: Annotated[int, Reads(fields.whole(1, ask_any.MAX_WINDOWS))] = Field(
        ask_any.DEFAULT_WINDOWS, description="how many windows to ask"
    )
    max_tokens: MaxTokens | None = None
    timeout_seconds: Annotated[int, Reads(fields.whole(1, ask_any.MAX_TIMEOUT_S))] = Field(
        ask_any.DEFAULT_TIMEOUT_S, description="how long to wait for the answers"
    )


class FanoutRequest(Body):
    count: Annotated[int, Reads(fields.whole(1, thaw.MAX_FANOUT))] = Field(description="how many sessions")
    prefix: SessionId | None = Field(None, description="sessions are named PREFIX-1, PREFIX-2 ...")
    at_turn: AtTurn | None = None


_RULES: Any = {name: (Annotated[Any, Reads(reader)], absent()) for name, reader in rules.READERS.items()}


class PolicyChanges(create_model("PolicyChanges", __base__=Changes, **_RULES)):  # type: ignore[misc] # a dynamic base
    pass


class PolicyCheckRequest(Body):
    session_id: SessionId

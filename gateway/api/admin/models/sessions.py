"""Sessions and their turns."""

from pydantic import Field

from gateway.api.admin.models.base import Answer, Moment, Number, Page, Warnings
from gateway.records import Outcome, SessionState


class SessionLine(Answer):
    id: str
    state: SessionState
    model: str
    token_count: int
    turn_count: int
    lineage: str
    recognised_by: str
    forked_from: str | None
    successor: str | None
    window: str | None
    engine: str | None
    normalised: list[str]
    created_at: Moment
    last_active_at: Moment
    frozen_at: Moment | None


class Estimates(Answer):
    """how its model's tokens are estimated, and how far off that was"""

    source: str
    exact: bool
    why: str
    bytes_per_token: Number | None
    tokens_around_a_message: Number
    prompts: int
    mean_error: Number | None
    p95_error: Number | None
    mean_error_of_new: Number | None
    p95_error_of_new: Number | None


class Turn(Answer):
    started_at: Moment
    duration_ms: Number
    model: str
    outcome: Outcome
    status: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    detail: str
    recognised_by: str
    engine: str | None
    estimated_tokens: int | None
    expected_cached_tokens: int | None
    miss: str | None


class Sessions(Page):
    sessions: list[SessionLine]


class Session(SessionLine):
    context_limit: int | None
    estimates: Estimates | None
    turns: list[Turn] = Field(description="newest first")
    windows: list[str]
    warnings: Warnings


class SessionDeleted(Answer):
    session_id: str
    deleted: bool
    blocks_deleted: int
    space_freed_bytes: int
    warnings: Warnings

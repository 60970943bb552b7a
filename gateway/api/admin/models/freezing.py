"""The rules of automatic freezing, and what they decide."""

from pydantic import Field

from gateway.api.admin.models.responses import Answer, Estimates, Number, Warnings
from gateway.api.schemas import Json


class Rules(Answer):
    enabled: bool
    idle_timeout_minutes: Number | None
    token_threshold: int | None
    context_share: Number | None
    at_shutdown: bool
    policies: list[Json]
    naming_pattern: str
    tags: list[str]
    cooldown_seconds: Number
    keep: int
    ttl_seconds: Number | None


class Policies(Rules):
    set_at_run_time: list[str] = Field(description="rules set here; the others come from the settings")
    available: list[str] = Field(description="what `policies` may use")


class PoliciesSet(Policies):
    warnings: Warnings


class Opinion(Answer):
    policy: str
    reason: str | None
    error: str | None


class PolicyCheck(Answer):
    session_id: str
    triggered: bool
    reason: str | None
    held_back: str | None
    window_name: str
    token_count: int
    covered_tokens: int
    context_limit: int | None
    threshold_percent: Number | None
    idle_seconds: Number
    estimates: Estimates | None
    policies: list[Opinion] = Field(description="what each says")

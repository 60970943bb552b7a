"""GET /admin/ledger."""

from pydantic import Field

from gateway.api.admin.models.responses import Answer, Moment, Number, Saved


class WindowSaved(Answer):
    name: str
    size_bytes: int
    byte_hours: Number = Field(description="its size by its age")
    saved: Saved


class SessionSaved(Answer):
    id: str
    saved: Saved


class Held(Answer):
    """what the KV of windows takes, shared KV counted once, as of the last sweep"""

    bytes: int
    byte_hours: Number = Field(description="bytes over time, since `since`")
    since: Moment | None


class Curve(Answer):
    """how long an engine takes to compute prompts, learned from those that it computed without the cache"""

    engine: str
    model: str
    fingerprint: str
    began_at: Moment
    current: bool = Field(description="false: the engine became quicker or slower since, or is at another address")
    samples: int
    tokens_reach: int | None = Field(description="longest prompt that is estimated; null: nothing is yet")
    seconds_by_tokens: dict[str, Number] = Field(description="a few lengths of prompts, and how long each takes")
    error_share: Number | None
    reason: str | None = Field(description="why nothing is estimated yet")


class Ledger(Answer):
    total: Saved
    turns: Saved
    thaws: Saved
    asks: Saved
    since: Moment | None
    windows: list[WindowSaved] = Field(description="those that have saved most tokens, the first most")
    sessions: list[SessionSaved]
    held: Held
    curves: list[Curve] = Field(description="newest first")

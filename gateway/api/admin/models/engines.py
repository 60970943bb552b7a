"""What draining an engine answers."""

from pydantic import Field

from gateway.api.admin.models.responses import Answer, Moment, Number, Warnings


class Moved(Answer):
    session_id: str
    window_name: str = Field(description="the automatic window that it was frozen into")
    engine: str = Field(description="where its next turn will go; empty if no other engine can be reached")
    chunks_loaded: int | None = Field(description="into the memory of that engine's cache; null: none were loaded")


class NotMoved(Answer):
    """a session that could not be frozen; its next turn goes to another engine all the same"""

    session_id: str
    reason: str


class WaitingFor(Answer):
    requests: int | None = Field(description="that the engine computes or that wait there; null: it does not say")
    sessions: int = Field(description="that are still to be frozen, with those in a turn and those that failed")
    seconds: Number = Field(description="until every worker and gateway knows of the drain")
    in_a_turn: list[str] = Field(description="ids of sessions in a turn, which are frozen when it is over")


class Drained(Answer):
    engine: str
    draining: bool
    since: Moment | None
    moved: list[Moved] = Field(description="by this call")
    failed: list[NotMoved]
    waiting_for: WaitingFor
    empty: bool = Field(description="it may be stopped: no request is there, and no session is to be frozen")
    warnings: Warnings

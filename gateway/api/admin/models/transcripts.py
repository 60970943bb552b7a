"""The text of a window or of a session."""

from pydantic import Field

from gateway.api.admin.models.responses import Answer
from gateway.api.schemas import Json


class Transcript(Answer):
    messages: list[Json] = Field(description="each with its `turn`, null in a text or a list of token ids")
    turns: int = Field(description="finished turns: in a window, `at_turn` may be 1 to this")
    frame: Json


class Messages(Transcript):
    window_name: str


class SessionMessages(Transcript):
    session_id: str

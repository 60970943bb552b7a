"""A turn of a session, from the handler that reads its request to the recorder that stores it."""

from dataclasses import dataclass, field

from gateway.dialects.base import Call, Dialect
from gateway.engines.client import Model
from gateway.records import StoredResponse
from gateway.sessions.prefix_chain import ClientSessionId, Prompt
from gateway.sessions.session_match import SessionMatch


@dataclass(slots=True, eq=False)
class TurnContext:
    """What is known of a turn; each step of the request fills in its part.

    Two are never equal: a session that is full makes a second turn of one request.
    """

    tenant: str
    dialect: Dialect
    call: Call  # with the history that the gateway puts in front, once that is known
    client_id: ClientSessionId | None
    prompt: Prompt  # what the client sent
    normalised: tuple[str, ...]  # rules that took something from the front of the prompt
    heavy_body: bool  # what a client sent was large, whatever of it are messages
    arrived: float  # of time.monotonic
    previous: StoredResponse | None = None  # that the request continues
    model: Model | None = None
    match: SessionMatch = field(init=False)
    ancestor: str = ""  # in a successor, the window that has the messages which were left out
    dropped: int = 0  # how many those are

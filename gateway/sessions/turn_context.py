"""A turn of a session, from the handler that reads its request to the recorder that stores it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.dialects.base import Call, Dialect
from gateway.engines.client import Model
from gateway.records import Outcome, StoredResponse
from gateway.runtime.offload import HEAVY_BYTES, is_heavy
from gateway.sessions.prefix_chain import ClientSessionId, Prompt
from gateway.sessions.session_match import SessionMatch


@dataclass(slots=True)
class RelayResult:
    """How a request was answered. `chunks` is a copy of the reply, None where it was too large to keep."""

    outcome: Outcome = "gateway_error"
    status: int = 0
    streamed: bool = False
    chunks: list[bytes] | None = field(default_factory=list)
    size: int = 0
    detail: str = ""
    held: tuple[list[tuple[bytes, bytes]], bytes] | None = None  # headers and body: the engine said the context is full

    def keep(self, chunks: Sequence[bytes], limit: int) -> None:
        """Keep chunks, or nothing at all once they are more than `limit` bytes."""
        if self.chunks is None:
            return
        self.size += sum(map(len, chunks))
        if self.size <= limit:
            self.chunks += chunks
        else:
            self.chunks = None
            self.detail = "the reply was larger than max_reply_bytes and was not kept"


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
    fingerprint: str = ""  # of the model, empty where no engine serves it
    salt: str = ""
    engine: str = ""
    started_at: float = 0.0  # of time.time, when the engine was asked
    overhead_s: float = 0.0  # our own work before that
    duration_ms: float = 0.0
    result: RelayResult = field(default_factory=RelayResult)

    @property
    def heavy(self) -> bool:
        """Whether to read and hash it takes so long that it is done beside the event loop."""
        if self.heavy_body or sum(map(len, self.result.chunks or ())) > HEAVY_BYTES:
            return True
        front = self.call.front
        return is_heavy(self.call.messages) or (front is not None and is_heavy(front.history))

    @property
    def ended_at(self) -> float:
        """When it was over, of time.time."""
        return self.started_at + self.duration_ms / 1000

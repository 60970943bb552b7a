"""A turn of a session, from the handler that reads its request to the recorder that stores it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.dialects.base import Call, Dialect
from gateway.engines.client import Model
from gateway.records import Outcome, StoredResponse
from gateway.runtime.offload import HEAVY_BYTES, is_heavy
from gateway.sessions.client_ids import ClientSessionId
from gateway.sessions.prefix_chain import Prompt
from gateway.sessions.session_match import SessionMatch
from gateway.telemetry.trace_context import Span


@dataclass(slots=True)
class RelayResult:
    """How a request was answered. `chunks` is a copy of the reply, None if it was too large to keep."""

    outcome: Outcome = "gateway_error"
    status: int = 0
    streamed: bool = False
    chunks: list[bytes] | None = field(default_factory=list)
    size: int = 0
    began_at: float = 0.0  # when the first of the reply came, of time.monotonic
    detail: str = ""
    refusal: tuple[list[tuple[bytes, bytes]], bytes] | None = None  # headers and body of "the context is full", unsent

    def keep(self, chunks: Sequence[bytes], limit: int) -> None:
        """Keep chunks, or nothing at all once they are more than `limit` bytes."""
        if not self.size:
            self.began_at = time.monotonic()
        self.size += sum(map(len, chunks))
        if self.size <= limit and self.chunks is not None:
            self.chunks += chunks
        elif self.chunks is not None:
            self.chunks = None
            self.detail = "the reply was larger than max_reply_bytes and was not kept"


@dataclass(slots=True, eq=False)
class TurnContext:
    """Everything known of a turn; each step of the request fills in its part.

    Compared by identity: a request has a second turn if its session is full.
    """

    tenant: str
    dialect: Dialect
    call: Call  # with the history in front, once that is known
    client_id: ClientSessionId | None
    prompt: Prompt  # what the client sent
    normalised: tuple[str, ...]  # rules that removed something from the front of the prompt
    heavy_body: bool  # the body was large, whatever its messages are
    arrived: float  # of time.monotonic
    previous: StoredResponse | None = None  # which the request continues
    model: Model | None = None
    match: SessionMatch = field(init=False)
    ancestor: str = ""  # in a successor, the window with the messages that were left out
    dropped: int = 0  # the number of those
    fingerprint: str = ""  # of the model, empty if no engine serves it
    salt: str = ""
    engine: str = ""
    span: Span | None = None  # of the request to the engine, if it is traced
    admitted_at: float = 0.0  # of time.monotonic, when it was read and let in
    identified_at: float = 0.0  # the same, when its session and its history were known
    started_at: float = 0.0  # of time.time, when the engine was asked
    overhead_s: float = 0.0  # the gateway's work before that
    duration_ms: float = 0.0
    result: RelayResult = field(default_factory=RelayResult)

    @property
    def heavy(self) -> bool:
        """Whether reading and hashing it takes so long that it is done in a thread."""
        front = self.call.front
        large = self.heavy_body or self.result.size > HEAVY_BYTES
        return large or is_heavy(self.call.messages) or (front is not None and is_heavy(front.history))

    def first_token_ms(self, completion_tokens: int) -> float | None:
        """Milliseconds from the request to the engine until its first token; None if nothing tells when that came."""
        result = self.result
        if not result.streamed:  # the answer comes at the end
            return self.duration_ms if completion_tokens == 1 else None
        if not self.dialect.begins_with_token or not result.began_at:
            return None
        return (result.began_at - self.arrived - self.overhead_s) * 1000

    @property
    def ended_at(self) -> float:
        """When it was over, of time.time."""
        return self.started_at + self.duration_ms / 1000

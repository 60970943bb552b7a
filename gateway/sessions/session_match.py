"""Which session a request belongs to, and how that was recognised."""

from dataclasses import dataclass

from gateway.records import Session
from gateway.sessions.prefix_chain import ConversationPrefix

MATCHES = ("id", "prefix", "retry", "last-reply", "fork", "side", "window", "successor", "ambiguous", "new")
"""What the response header X-Session-Match may say, see docs/sessions.md."""


@dataclass(frozen=True, slots=True)
class SessionMatch:
    """Where a request belongs: its session, how that was recognised, and the chain that it is part of.

    `request` is the beginning that the request is, where it was needed on the way. `is_new`: no turn has used the
    session yet.
    """

    session: Session
    source: str
    seed: bytes
    request: ConversationPrefix | None = None
    is_new: bool = False

    @property
    def asked(self) -> bytes | None:
        """The chain's link of the whole request, where it was needed."""
        return self.request.asked if self.request else None

    @property
    def header(self) -> str:
        """How the session was recognised, as the response header has it."""
        word = self.source.replace(" ", "-")
        return word if word in MATCHES else "id"

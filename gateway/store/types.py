"""What goes into the store and comes out of it, besides the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import (
    Message,
    Session,
    StoredResponse,
    Trace,
    Turn,
    Window,
)


class StoreUnavailable(GatewayError):
    """The store cannot be read or written just now, whatever it is: its disk is full or out of order."""


@dataclass(frozen=True, slots=True)
class WindowQuery:
    """What `list_windows` filters and sorts by. Tags are ANDed; `search` looks in name and description."""

    tags: tuple[str, ...] = ()
    model: str | None = None
    session_id: str | None = None
    search: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    sort_by: str = "created_at"
    descending: bool = True
    limit: int = 20
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Unfrozen:
    """A session, and what is known of its automatic freezes.

    `covered_tokens`: see `policies.contract.Observation`. It is not frozen before `not_before`, for a cool-down or for
    its `failures` in a row.
    """

    session: Session
    covered_tokens: int = 0
    not_before: float = 0.0
    failures: int = 0


SORT_KEYS = ("name", "created_at", "token_count", "size")


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A finished turn on its way into the store. `messages` is None where the transcript does not move on.

    `session` is what the turn's session was when it began; the store makes it if it is new.
    `response` is its answer where that is kept by its id, and `asked` what the request brought.
    """

    turn: Turn
    session: Session
    fingerprint: str
    salt: str
    messages: Sequence[Message] | None
    frame: Mapping[str, object]
    trace: Trace
    normalised: str = ""
    response: StoredResponse | None = None
    asked: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """What was said, and the frame that a prompt is rendered from with it; None where there is no frame."""

    messages: Sequence[Message]
    frame: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Released:
    """What a deleted window has let go of: `pins` that no window holds, and `names` of an isolated clone for LMCache.

    For any other window the names are those of the pins, and `names` is empty. `window` is the one that was deleted.
    """

    pins: tuple[ObjectKey, ...] = ()
    names: tuple[ObjectKey, ...] = ()
    window: Window | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class OrphanedSalt:
    """A salt that a session or a window has let go of at `since`; another one may still use it."""

    salt: str
    tenant: str
    lineage: str
    since: float


@dataclass(frozen=True, slots=True)
class SaltNote:
    """A salt that KV is being made under; `session_id` is empty where it is no session's."""

    salt: str
    tenant: str
    lineage: str
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class SaltUse:
    """A salt that sessions of a lineage have turns under, and when one of them was last active."""

    salt: str
    tenant: str
    lineage: str
    last_active_at: float

"""What is passed to the store and returned by it, besides the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import Message, Session, StoredResponse, Trace, Turn, Window


class StoreUnavailable(GatewayError):
    """The store cannot be read or written at the moment: its disk is full or faulty."""


SORT_COLUMNS = MappingProxyType(
    {"name": "name", "created_at": "created_at", "token_count": "token_count", "size": "size_bytes"}
)
"""The column that each `WindowQuery.sort_by` sorts by."""


@dataclass(frozen=True, slots=True)
class WindowQuery:
    """What `list_windows` filters and sorts by. Tags are ANDed; `search` looks in name and description."""

    tags: tuple[str, ...] = ()
    without_tags: tuple[str, ...] = ()
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
class FreezeCandidate:
    """A session, and the state of its automatic freezes.

    `covered_tokens`: see `policies.contract.Observation`. It is not frozen before `not_before`, because of a cool-down
    or of its `failures` in a row.
    """

    session: Session
    covered_tokens: int = 0
    not_before: float = 0.0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A finished turn to be stored. `messages` is None if the transcript stays as it is.

    `session` is the turn's session as it was when the turn began; the store creates it if it is new.
    `response` is the turn's response if that is stored by its id, and `request_input` what the request sent.
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
    request_input: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A transcript's messages, and the frame that a prompt is rendered from with them, None if there is none."""

    messages: Sequence[Message]
    frame: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Released:
    """What no window holds any more since `window` was deleted: `pins`, and `names` of an isolated clone in LMCache.

    For any other window LMCache has the names of the pins, and `names` is empty.
    """

    pins: tuple[ObjectKey, ...] = ()
    names: tuple[ObjectKey, ...] = ()
    window: Window | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class OrphanedSalt:
    """A salt whose session or window was deleted at `since`; another one may still use it."""

    salt: str
    tenant: str
    lineage: str
    since: float


@dataclass(frozen=True, slots=True)
class SaltNote:
    """A salt that KV is being computed under; `session_id` is empty if it belongs to no session."""

    salt: str
    tenant: str
    lineage: str
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class SaltUse:
    """A salt of sessions of a lineage, and when one of them was last active."""

    salt: str
    tenant: str
    lineage: str
    last_active_at: float

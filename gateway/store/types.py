"""What is passed to the store and returned by it, besides the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from msgspec import Struct

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import Message, Session, StoredResponse, Trace, Turn, Window
from gateway.store.prefill_curve import PrefillCurve


class StoreUnavailable(GatewayError):
    """The store cannot be read or written at the moment: its disk is full or faulty."""


@dataclass(frozen=True, slots=True)
class StoreCheck:
    """What a look at the store itself has found, and what to do about it."""

    status: Literal["ok", "warning", "failed"]
    message: str
    remedy: str = ""


class ClaimLost(Exception):
    """The gateway's lease ended since it made a claim, and others have acted on that."""


@dataclass(frozen=True, slots=True)
class Member:
    """A gateway as it joins the others that share the store.

    `oldest` is the oldest protocol of sharing it that this one can work with; `process` as `own_process.identity`.
    """

    id: str
    ttl_s: float
    protocol: int
    oldest: int
    host: str
    process: str


@dataclass(frozen=True, slots=True)
class Peer:
    """Another gateway, whether its lease holds, and when it last looked who the others are, by the database's clock."""

    alive: bool
    id: str
    protocol: int
    oldest: int
    host: str
    process: str
    looked_at: float


@dataclass(frozen=True, slots=True)
class Claimed:
    """Objects whose removal is claimed, under the lease of `gateway`; `busy`: how many more others have claimed."""

    id: str = ""
    gateway: str = ""
    keys: tuple[ObjectKey, ...] = ()
    busy: int = 0


SORT_COLUMNS = MappingProxyType(
    {"name": "name", "created_at": "created_at", "token_count": "token_count", "size": "size_bytes"}
)
"""The column that each `WindowQuery.sort_by` sorts by."""


@dataclass(frozen=True, slots=True)
class Match:
    """Where a search found something: `name`, `description`, `tag` or `message`, and the text around it.

    `message` is the place of the message in the text, from 0, and `role` whose it is.
    """

    field: str
    snippet: str
    message: int | None = None
    role: str | None = None


@dataclass(frozen=True, slots=True)
class WindowQuery:
    """What `list_windows` filters and sorts by. Tags are ANDed; `search` looks in name, description and tags."""

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


class TurnRecord(Struct, frozen=True):
    """A finished turn to be stored. `messages` is None if the transcript stays as it is.

    `session` is the turn's session as it was when the turn began; the store creates it if it is new.
    `displaces`: it continues a conversation that the session's id belongs to, whatever else has that id now.
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
    displaces: bool = False
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


class SaltNote(Struct, frozen=True):
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


Source = Literal["turn", "thaw", "ask"]
"""What saved something, and was booked."""


class Booking(NamedTuple):
    """A request whose prompt the engine has counted, for the ledger.

    `window` and `session_id` are empty if it has none. `first_token_s`: seconds from the request to the first token, 0
    if that was not seen.
    """

    tenant: str
    source: Source
    engine: str
    fingerprint: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    at: float
    session_id: str = ""
    window: str = ""
    first_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Saved:
    """What was saved by requests whose cached tokens the engine counted.

    `seconds_estimated` is what computing `tokens_estimated` of the `tokens` would have taken, None if nothing is known;
    `reason` says why it is not all of them. `error_share` is the median relative error of such estimates.
    """

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds_estimated: float | None = None
    tokens_estimated: int = 0
    error_share: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LearnedCurve:
    """A prefill curve of an engine and a model, `curve` None while it has too few `samples`."""

    id: int
    engine: str
    fingerprint: str
    model: str
    began_at: float
    samples: int
    curve: PrefillCurve | None
    error_share: float | None


@dataclass(frozen=True, slots=True)
class HeldKv:
    """The bytes that windows hold as of `at`, and what they add up to over time since `since`."""

    bytes: int
    byte_hours: float
    since: float
    at: float

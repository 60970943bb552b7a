"""The records that the gateway stores, as frozen dataclasses. Times are seconds since the epoch, UTC."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gateway.errors import GatewayError
from gateway.validation.shown import shown

SessionState = Literal["active", "frozen", "thawed", "expired"]
# complete: every whole chunk is pinned · partial: only the first ones · absent: none, thaw recomputes everything
KvState = Literal["complete", "partial", "absent"]
Outcome = Literal["completed", "engine_error", "engine_cut", "client_gone", "gateway_error"]

MAX_NAME = 128  # characters of a session's id, and of a window's name
SESSION_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{MAX_NAME - 1}}}")
WINDOW_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")
AUTO_TAG = "auto"  # of windows that were made automatically
TAG = re.compile(r"[\w.:-]{1,64}")
MAX_TAGS = 20
MAX_DESCRIPTION = 2000
MAX_MODEL = 500  # characters of a model's name

Message = dict[str, Any]


def check_session_id(value: object, where: str = "session_id") -> str:
    """Return `value` if it is a session id; raises `invalid_session_id` naming the field `where`."""
    if isinstance(value, str) and SESSION_ID.fullmatch(value):
        return value
    raise GatewayError(
        "invalid_session_id",
        f"{where} {shown(value, 200)} is not a valid session id",
        hint=f"use 1 to {MAX_NAME} of A-Z a-z 0-9 _ . : - and begin with a letter or digit",
        details={"field": where},
    )


def check_window_name(value: object, where: str = "window_name") -> str:
    """Return `value` if it is a window name; raises `invalid_window_name` naming the field `where`."""
    if isinstance(value, str) and WINDOW_NAME.fullmatch(value):
        return value
    raise GatewayError(
        "invalid_window_name",
        f"{where} {shown(value, 200)} is not a valid window name",
        hint=f"use 1 to {MAX_NAME} of A-Z a-z 0-9 _ . - and begin with a letter or digit",
        details={"field": where},
    )


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation. `transcript` and `frame` are content ids in the store.

    `source` says how it was recognised when it began, `parent` which session it is a fork of. `head`, `asked` and `tip`
    are links of its chain (gateway.sessions.prefix_chain): what it began with, what its last turn asked, and its last
    reply; `answered` tells whether what was asked last has its reply.
    """

    tenant: str
    id: str
    lineage: str
    model: str = ""
    fingerprint: str = ""
    salt: str = ""  # of its last turn, under `fingerprint`
    state: SessionState = "active"
    token_count: int = 0
    turn_count: int = 0
    transcript: bytes | None = None
    frame: bytes | None = None
    window: str | None = None
    window_transcript: bytes | None = None
    created_at: float = 0.0
    last_active_at: float = 0.0
    frozen_at: float | None = None
    source: str = ""
    parent: str | None = None
    head: bytes | None = None
    asked: bytes | None = None
    tip: bytes | None = None
    answered: bool = False
    prompt_tokens: int = 0  # of its last turn
    engine: str = ""  # that served its last turn
    normalised: str = ""  # rules of gateway.dialects.prompt_filters that took something out, separated by spaces
    successor: str | None = None  # the session that continues its conversation, since its context was full


@dataclass(frozen=True, slots=True)
class Succession:
    """A full session and its successor: what was left out are `dropped` messages after the system's.

    `link` is the link of the chain (gateway.sessions.prefix_chain) that they are, begun with nothing; `window` holds
    them.
    """

    tenant: str
    session_id: str
    successor: str
    window: str
    dropped: int
    link: bytes


class Alias(NamedTuple):
    """Another name of a reply (`gateway.sessions.reply_aliases`): `link` is the hash of what was said, the other fields
    are in short what it answers.

    `history` (b"" where there is none) and `question` are digests, so that a reply can be looked for by its link alone,
    with its history, or with both. `marks` is compared when it has been found.
    """

    link: bytes
    history: bytes
    question: bytes
    marks: bytes


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a turn has left its conversation's chain; no `tip` where the reply is not known.

    `ends` are other names of the tip, under which it is found when something before it has changed.
    """

    head: bytes
    asked: bytes
    tip: bytes | None
    ends: tuple[Alias, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """A session that has a reply known under an `Alias`; `current`: that reply is its last."""

    session: Session
    alias: Alias
    current: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn, as the engine reported them; `cached` is None where it did not say."""

    prompt: int
    completion: int
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """What a request lacks of the conversation that it continues: it is put in front of the client's messages.

    `system` takes the place of the client's leading system messages, None leaves those; `history` follows them;
    `frame` has the template's fields that the client left out. `origin` says whether the history ends with the window,
    or with what the session has had since; `unsure`: the client may have meant otherwise.
    """

    system: Sequence[Message] | None
    history: Sequence[Message]
    frame: Mapping[str, Any] = field(default_factory=dict)
    origin: Literal["", "window", "session"] = field(default="", compare=False)
    unsure: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session and its outcome."""

    tenant: str
    session_id: str
    model: str
    outcome: Outcome
    status: int
    started_at: float
    duration_ms: float
    usage: Usage | None = None
    detail: str = ""
    source: str = ""  # how its session was recognised
    engine: str = ""
    estimated_tokens: int | None = None  # of the prompt, before it was sent
    expected_tokens: int | None = None  # of the prompt, that should have been cached
    miss: str = ""  # why fewer were


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer that a client can retrieve and continue (Responses API).

    `transcript` is the conversation up to this answer and with it, None where it cannot be continued; `instructed`:
    its first message is the request's own instructions. `asked` is the request's input, as a list in the store.
    """

    tenant: str
    id: str
    session_id: str
    lineage: str
    created_at: float
    answer: Mapping[str, Any]
    instructed: bool = False
    transcript: bytes | None = None
    asked: bytes | None = None


class PinnedObject(NamedTuple):
    """One KV object as it was seen in one tier when it was pinned: its LMCache key, bytes, and blake3 of the bytes.

    `pin` is the key that its pin goes by, where that is another one: an isolated clone shares its source's pins.
    """

    key: str
    tier: str
    size: int
    checksum: bytes
    pin: str = ""

    @property
    def pin_key(self) -> str:
        """The key that its pin goes by."""
        return self.pin or self.key


Sizes = Mapping[str, Mapping[str, int]]  # bytes of KV objects, by tier and key


@dataclass(frozen=True, slots=True)
class Window:
    """An immutable, named snapshot of a session at a turn boundary.

    LMCache finds its KV under `salt`; the pins go by names of `pin_salt`, another one only for an isolated clone.
    """

    tenant: str
    name: str
    session_id: str
    lineage: str
    salt: str
    pin_salt: str
    model: str
    model_root: str
    fingerprint: str
    world_size: int
    token_count: int
    chunk_size: int
    chunk_count: int
    size_bytes: int
    kv: KvState
    transcript: bytes
    frame: bytes | None
    manifest: str
    created_at: float
    description: str = ""
    tags: tuple[str, ...] = ()
    parent: str | None = None
    expires_at: float | None = None
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tail_tokens(self) -> int:
        """Tokens after the last whole pinned chunk: what a thaw recomputes."""
        return self.token_count - self.chunk_count * self.chunk_size

    def has_expired(self, at: float) -> bool:
        """Whether its time to live was over by then."""
        return self.expires_at is not None and self.expires_at <= at


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a window is made of: exact token ids, and its KV objects in chunk order (every rank of a chunk together)."""

    id: str
    token_ids: Sequence[int]
    objects: tuple[PinnedObject, ...]

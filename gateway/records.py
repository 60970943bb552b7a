"""The records that the gateway stores; those that every turn makes are structs, which cost less. Times are in seconds
since the epoch, UTC.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from msgspec import Struct

from gateway.errors import GatewayError
from gateway.validation.shown import shown

SessionState = Literal["active", "frozen", "thawed", "expired"]
# complete: every full chunk is pinned; partial: only the first ones; absent: none, a thaw recomputes everything
KvState = Literal["complete", "partial", "absent"]
Outcome = Literal["completed", "engine_error", "engine_cut", "client_gone", "gateway_error"]

MAX_NAME = 128  # characters of a session's id, and of a window's name
SESSION_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{MAX_NAME - 1}}}")
WINDOW_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")
AUTO_TAG = "auto"  # of automatic windows
TAG = re.compile(r"[\w.:-]{1,64}")
MAX_TAGS = 20
MAX_DESCRIPTION = 2000
MAX_MODEL = 500  # characters of a model's name

_SIDE_SUFFIX = 17  # characters that a side conversation adds to its agent's id

Message = dict[str, Any]


def subconversation_id(session_id: str, first_message_hash: bytes) -> str:
    """The id of another conversation that an agent has under the same id: titles, a skill, or after a compaction."""
    return f"{subconversation_stem(session_id)}:{first_message_hash.hex()[: _SIDE_SUFFIX - 1]}"


def subconversation_stem(session_id: str) -> str:
    """What the ids of all other conversations that an agent has under the same id begin with, before a colon."""
    return session_id[: MAX_NAME - _SIDE_SUFFIX]


def subconversation_source(source: str, session_id: str) -> str:
    """How a conversation beside that of `session_id` was recognised."""
    return f"{source}, beside {session_id}"


def check_session_id(value: object, where: str = "session_id") -> str:
    """Return `value` if it is a session id; raises `invalid_session_id` naming the field `where`."""
    return _check_name(value, where, SESSION_ID, "invalid_session_id", "session id", "_ . : -")


def check_window_name(value: object, where: str = "window_name") -> str:
    """Return `value` if it is a window name; raises `invalid_window_name` naming the field `where`."""
    return _check_name(value, where, WINDOW_NAME, "invalid_window_name", "window name", "_ . -")


def _check_name(value: object, where: str, pattern: re.Pattern[str], code: str, kind: str, marks: str) -> str:
    if isinstance(value, str) and pattern.fullmatch(value):
        return value
    raise GatewayError(
        code,
        f"{where} {shown(value, 200)} is not a valid {kind}",
        hint=f"use 1 to {MAX_NAME} of A-Z a-z 0-9 {marks} and begin with a letter or digit",
        details={"field": where},
    )


class Session(Struct, frozen=True):
    """A conversation. `transcript` and `frame` are content ids in the store.

    `source` says how it was recognised when it began, `parent` which session it was forked from. The hashes are links
    of its prefix chain (gateway.sessions.prefix_chain); `answered` says whether the last request has its reply.
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
    first_message_hash: bytes | None = None
    last_request_hash: bytes | None = None
    last_reply_hash: bytes | None = None
    answered: bool = False
    prompt_tokens: int = 0  # of its last turn
    engine: str = ""  # that served its last turn
    normalised: str = ""  # rules of gateway.dialects.prompt_filters that removed something, separated by spaces
    successor: str | None = None  # the session that continues the conversation if the context was full
    title: str | None = None  # see gateway.dialects.titles; None without text
    rewinds: int = 0  # how often it was taken back to a window
    booked_tokens: int = 0  # that the ledger has of the last thaw into it, and its next turn will find again

    @property
    def is_single_message(self) -> bool:
        """Whether its last request was one message only, without a system prompt: a title, or how a chat begins."""
        return self.last_request_hash is not None and self.last_request_hash == self.first_message_hash


@dataclass(frozen=True, slots=True)
class Succession:
    """A full session and its successor, without `dropped` messages that followed the system's.

    `link` is the last link of a prefix chain (gateway.sessions.prefix_chain) of these messages; `window` has them.
    """

    tenant: str
    session_id: str
    successor: str
    window: str
    dropped: int
    link: bytes


class Alias(NamedTuple):
    """Another key for a reply (`gateway.sessions.reply_aliases`): `link` is the hash of the reply itself, the other
    fields summarise what it replies to.

    `history` (b"" if there is none) and `question` are digests, so that a reply can be looked up by its link alone,
    with its history, or with both. `marks` is compared once it has been found.
    """

    link: bytes
    history: bytes
    question: bytes
    marks: bytes


class Trace(Struct, frozen=True):
    """A turn's links in its conversation's prefix chain; `reply_hash` is None if the reply is not known.

    The reply is found by one of `aliases` when something before it has changed.
    """

    first_message_hash: bytes
    request_hash: bytes
    reply_hash: bytes | None
    aliases: tuple[Alias, ...] = ()


class AliasMatch(Struct, frozen=True):
    """A session with a reply that has this alias; `current` if that reply is its last."""

    session: Session
    alias: Alias
    current: bool


class Usage(Struct, frozen=True):
    """Token counts of one turn, as the engine reported them; `cached` is None if it did not."""

    prompt: int
    completion: int
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """What a request omits of the conversation that it continues; it is put in front of the client's messages.

    `system` replaces the client's leading system messages, None leaves them; `history` follows them; `frame` has the
    template's fields that the client left out. `origin` says whether the history ends with the window or with the
    session's later turns; `unsure`: the client may have meant something else.
    """

    system: Sequence[Message] | None
    history: Sequence[Message]
    frame: Mapping[str, Any] = field(default_factory=dict)
    origin: Literal["", "window", "session"] = field(default="", compare=False)
    unsure: bool = field(default=False, compare=False)


class Turn(Struct, frozen=True):
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
    estimated_tokens: int | None = None  # of the prompt
    expected_tokens: int | None = None  # that should have been cached
    miss: str = ""  # why fewer were
    first_token_ms: float | None = None  # from the request to the engine until its first token, if that was seen


class StoredResponse(Struct, frozen=True):
    """A response that a client can retrieve and continue (Responses API).

    `transcript` is the conversation including this response, None if it cannot be continued; `instructed`: its first
    message is the request's own instructions. `request_input` is the transcript of the request's input.
    """

    tenant: str
    id: str
    session_id: str
    lineage: str
    created_at: float
    answer: Mapping[str, Any]
    instructed: bool = False
    transcript: bytes | None = None
    request_input: bytes | None = None


class PinnedObject(NamedTuple):
    """One KV object as it was in one tier when it was pinned: its LMCache key, bytes, and their checksum, by which
    algorithm depends on the tier (`Tier.checksum`).

    `pin` is the key of its pin, if that differs: an isolated clone shares its source's pins. Keys are the text of an
    `ObjectKey`: a manifest has thousands of them, and hardly any is ever taken apart.
    """

    key: str
    tier: str
    size: int
    checksum: bytes
    pin: str = ""

    @property
    def pin_key(self) -> str:
        """The key of its pin."""
        return self.pin or self.key


Sizes = Mapping[str, Mapping[str, int]]  # bytes of KV objects, by tier and key


@dataclass(frozen=True, slots=True)
class Window:
    """An immutable, named snapshot of a session at a turn boundary.

    LMCache finds its KV under `salt`; its pins are under `pin_salt`, which differs only for an isolated clone.
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
    chunk_count: int = 0
    size_bytes: int = 0
    kv: KvState = "absent"
    transcript: bytes = b""
    frame: bytes | None = None
    manifest: str = field(default_factory=lambda: uuid4().hex)
    created_at: float = field(default_factory=time.time)
    description: str = ""
    tags: tuple[str, ...] = ()
    parent: str | None = None
    expires_at: float | None = None
    receipt: Mapping[str, Any] = field(default_factory=dict)
    title: str | None = None  # of the conversation

    @property
    def tail_tokens(self) -> int:
        """Tokens after the last full pinned chunk, which a thaw recomputes."""
        return self.token_count - self.chunk_count * self.chunk_size

    @property
    def whole_chunks(self) -> int:
        """Whole chunks in its tokens, pinned or not."""
        return self.token_count // self.chunk_size if self.chunk_size else 0

    def has_expired(self, at: float) -> bool:
        """Whether it had expired by then."""
        return self.expires_at is not None and self.expires_at <= at


@dataclass(frozen=True, slots=True)
class Manifest:
    """A window's exact token ids, and its KV objects in chunk order (every rank of a chunk together)."""

    id: str
    token_ids: Sequence[int]
    objects: tuple[PinnedObject, ...]

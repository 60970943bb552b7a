"""What the gateway asks of its store. Every call is atomic in itself."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import (
    Alias,
    Known,
    Manifest,
    Message,
    PinnedObject,
    Session,
    SessionState,
    Sizes,
    StoredResponse,
    Succession,
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


class Store(Protocol):
    """Sessions and windows are named inside a tenant."""

    @property
    def store_id(self) -> str:
        """Random name of this store, made with it; it keeps our pins apart from another store's."""
        ...

    async def session(self, tenant: str, session_id: str) -> Session | None:
        """Return the session, or None."""
        ...

    async def sessions_by_prefix(self, tenant: str, links: Sequence[bytes]) -> tuple[bytes | None, list[Session]]:
        """Return the first of `links` that is known, and sessions that have been there.

        Those that are there now come first, then those that asked it last, then those that have had a turn (a thawed
        session is where its window was), then the last active ones.
        """
        ...

    async def sessions_by_reply_alias(self, tenant: str, names: Sequence[Alias]) -> list[Known]:
        """Return sessions that have a reply which goes by these names, whatever is left out.

        Where there are many, some of them; those whose last reply it is come first, then the last active ones.
        """
        ...

    async def list_sessions(
        self, tenant: str, *, state: SessionState | None, model: str | None, limit: int, offset: int,
        expired_by: float = 0.0,
    ) -> tuple[list[Session], int]:  # fmt: skip
        """Return one page of sessions, last active first, and how many there are in all.

        Those that were last active before `expired_by` count as `expired`, whatever they were until then. One whose
        every request was refused is no conversation, and is left out.
        """
        ...

    async def snapshot(self, tenant: str, session_id: str) -> tuple[Session, Text] | None:
        """Return the session and its text, both from one moment; None if there is no such session."""
        ...

    async def add_session(self, session: Session, *, source: Window | None = None) -> bool:
        """Add a session; False if its id is taken. See `add_sessions`."""
        ...

    async def add_sessions(self, sessions: Sequence[Session], *, source: Window | None = None) -> str | None:
        """Add all of these sessions of one tenant, or none where an id is taken: then return that id.

        With `source` they begin with that window's text. Raises `window_not_found` unless the window is still there,
        the same one and not another of its name, and `window_corrupted` where its text is gone.
        """
        ...

    async def delete_session(self, tenant: str, session_id: str, *, idle_since: float | None = None) -> bool:
        """Delete the session, its turns and its kept answers; False if there is none.

        Windows stay, its salts are loose. With `idle_since` only if it was not active since then.
        """
        ...

    async def forget_idle(self, keep: int) -> int:
        """Delete the sessions that were idle longest beyond `keep`; return how many."""
        ...

    async def idle_sessions(self, since: float, limit: int) -> list[tuple[str, str]]:
        """Return sessions (tenant, id) that were not active since then, idle longest first."""
        ...

    async def salts_of(self, tenant: str, session_id: str) -> list[str]:
        """Return the salts that the session's turns ran under, of turns that failed too."""
        ...

    async def salt_uses(self) -> list[SaltUse]:
        """Return every salt that a session has, idle longest first."""
        ...

    async def salt_in_use(self, salt: str) -> bool:
        """Whether a session has turns under the salt. Windows hold their objects, not their salt."""
        ...

    async def orphaned_salts(self) -> list[OrphanedSalt]:
        """Return the salts that were let go of, and that nobody has settled since."""
        ...

    async def mark_orphaned(self, salt: str, tenant: str, lineage: str) -> None:
        """Note a salt that nobody will have let go of who is stopped before: what lies under it is to be seen to."""
        ...

    async def note_salts(self, notes: Sequence[SaltNote]) -> None:
        """Note salts: as the session's where it is there, else as loose. Done again, it is noted as of now."""
        ...

    async def clear_orphan(self, gone: OrphanedSalt) -> None:
        """Say that what lay under a loose salt was seen to, unless it was let go of once more."""
        ...

    async def held_under(self, salt: str) -> set[ObjectKey]:
        """Return the objects under a salt that windows hold: their pins, and what LMCache has of isolated clones."""
        ...

    async def check(self) -> None:
        """Write something. Raises StoreUnavailable where that cannot be done."""
        ...

    async def newest(self) -> float | None:
        """Return when the newest record of a session or window was made, None where there is none."""
        ...

    async def known_secret(self) -> tuple[str | None, bool]:
        """Return the mark of the secret that it was used with (`salts.mark`), and whether it holds any session."""
        ...

    async def remember_secret(self, mark: str) -> None:
        """Keep the mark of the secret that it is used with from now on."""
        ...

    async def record(self, finished: Sequence[TurnRecord], *, last: bool = False) -> None:
        """Record finished turns; each makes its session if it is new and moves its transcript on.

        On a full disk turns use up a part of what is set aside for that, the `last` ones all of it. Raises
        StoreUnavailable: the same turns can be recorded later.
        """
        ...

    async def turns(self, tenant: str, session_id: str, limit: int) -> list[Turn]:
        """Return the last turns, newest first."""
        ...

    async def response(self, tenant: str, response_id: str) -> StoredResponse | None:
        """Return a kept answer, or None."""
        ...

    async def response_items(self, tenant: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return items of kept answers by their ids; those that are not there are left out."""
        ...

    async def delete_response(self, tenant: str, response_id: str) -> bool:
        """Delete a kept answer; False if there is none. Answers that go on from it stay."""
        ...

    async def messages(self, transcript: bytes) -> list[Message]:
        """Return the messages of a transcript, first to last."""
        ...

    async def frame(self, frame: bytes) -> Mapping[str, object]:
        """Return a frame: what besides the messages a prompt is rendered from."""
        ...

    async def window(self, tenant: str, name: str) -> Window | None:
        """Return the window, or None."""
        ...

    async def list_windows(self, tenant: str, query: WindowQuery) -> tuple[list[Window], int]:
        """Return one page of windows and how many match in all."""
        ...

    async def lineage(self, tenant: str, name: str) -> tuple[list[str], list[str]]:
        """Return the ancestors of a window, nearest first, and its direct clones."""
        ...

    async def add_window(
        self, window: Window, manifest: Manifest, text: Text, *, seen: Session | None = None, wanted: bool = True
    ) -> Window | None:
        """Commit a window with its manifest and its text; return it as it was committed, None if its name is taken.

        The window's own `transcript` and `frame` do not count: they become those of `text`, which is added unless the
        store has it already. `seen` is the session that was frozen, as it was read. It becomes `frozen` unless it has
        gone on since. Where it was deleted meanwhile, the window is committed all the same if it is `wanted`; else
        `session_not_found` is raised.
        """
        ...

    async def copy_window(self, copy: Window, source: Window, manifest: Manifest | None) -> Window | None:
        """Commit a copy of `source`, with a manifest of its own or with that of its source; None if its name is taken.

        Raises `window_not_found` unless the source is still there, the same one and not another of its name, and
        `window_corrupted` where its text is gone.
        """
        ...

    async def text(self, window: Window) -> Text:
        """Return a window's text.

        Raises `window_not_found` when the window has just been deleted, and `window_corrupted` where it is there
        without its text.
        """
        ...

    async def check_there(self, window: Window) -> None:
        """Raise `window_not_found` unless the window is still there, the same one and not another of its name."""
        ...

    async def windows_without_text(self) -> list[tuple[str, str]]:
        """Return tenant and name of windows whose text is gone: no window of today, but older versions left some."""
        ...

    async def describe_window(self, tenant: str, name: str, changes: Mapping[str, Any]) -> Window | None:
        """Change `description`, `tags` or `expires_at`; return the window as it is now, or None."""
        ...

    async def manifest(self, window: Window) -> Manifest:
        """Return a window's manifest, its objects under the window's salt.

        Raises `window_not_found` when it has just been deleted.
        """
        ...

    async def sizes(self, window: Window) -> Sizes:
        """Return the bytes of each object of a window in each tier, in no order. Raises as `manifest` does."""
        ...

    async def pinned(self, window: Window) -> tuple[PinnedObject, ...]:
        """Return the objects of a window's manifest alone. Raises as `manifest` does."""
        ...

    async def delete_window(
        self, tenant: str, name: str, *, expired_by: float | None = None, automatic_of: str | None = None
    ) -> Released | None:
        """Delete a window; return what no window holds any more, or None if there is no such window.

        With `expired_by` only if it had expired by then, with `automatic_of` only if it is an automatic window of that
        session (`auto_windows`). Its salts are loose.
        """
        ...

    async def expired_windows(self, by: float, limit: int) -> list[Window]:
        """Return windows of every tenant that had expired by then, the first to expire first."""
        ...

    async def objects(self, keys: Sequence[ObjectKey]) -> list[PinnedObject]:
        """Return what is known of those of `keys` that windows hold, an entry for each tier."""
        ...

    async def held_bytes(self, tenant: str, more: Sequence[PinnedObject]) -> int:
        """Return the bytes that a tenant's windows would hold with `more`, what they share counted once."""
        ...

    async def held_objects(self) -> set[ObjectKey]:
        """Every object that some window has pinned."""
        ...

    async def isolated_names(self) -> set[ObjectKey]:
        """Names under which LMCache may have the objects of isolated clones, whose pins go by other names."""
        ...

    async def succeed(self, step: Succession, new: Session, *, seen: Session) -> Succession:
        """Add a full session's successor, unless it has one already; return what is so then.

        Raises `session_busy` where the full session is not as it was `seen`, where its window has gone, or where the
        successor's id was taken meanwhile.
        """
        ...

    async def successions(self, tenant: str, session_id: str) -> list[Succession]:
        """Return all steps from session to successor of the conversation that a session is part of, in their order."""
        ...

    async def lineage_in_use(self, tenant: str, lineage: str) -> bool:
        """Whether a session of the lineage is still going on (active or thawed)."""
        ...

    async def unfrozen(self, since: float, before: tuple[float, str, str] | None, limit: int) -> list[Unfrozen]:
        """Return sessions active since `since` that have gone on since they were last frozen, last active first.

        `before` is where the page before ended: when its last session was active, its tenant and its id.
        """
        ...

    async def unfrozen_sessions(self, keys: Collection[tuple[str, str]]) -> list[Unfrozen]:
        """Return sessions as above, by tenant and id, whatever their state; without those that are not there."""
        ...

    async def claim_freeze(
        self, seen: Session, *, now: float, until: float, cool: bool, latest: float = math.inf
    ) -> bool:
        """Take the automatic freeze of a session for oneself, until it is reported or `until` is over.

        False where another has it, where the session is not as it was `seen`, and, with `cool`, before `not_before`.
        Neither a claim nor `not_before` holds that ends after `latest`: it was set while the clock was wrong.
        """
        ...

    async def report_freeze(self, seen: Session, *, window: str | None, not_before: float) -> None:
        """Give a claim back: with the window that was made, or None where that failed."""
        ...

    async def uncover(self, seen: Session) -> None:
        """Note that a session has shrunk: what it has now is all that is covered."""
        ...

    async def auto_windows(self, tenant: str, session_id: str) -> list[str]:
        """Return the names of a session's automatic windows, newest first; one without tag `auto` is none any more."""
        ...

    async def auto_freeze(self) -> str | None:
        """Return the rules of automatic freezing that were set at run time, as JSON."""
        ...

    async def set_auto_freeze(self, rules: str | None) -> None:
        """Keep them; None forgets them."""
        ...

    async def window_counts(self) -> dict[str, int]:
        """How many windows there are, by `kv`."""
        ...

    async def tier_usage(self) -> dict[str, tuple[int, int]]:
        """Objects and bytes that windows hold, by tier, each object counted once."""
        ...

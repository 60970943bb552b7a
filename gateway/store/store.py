"""The store on SQLite in WAL mode: one writer thread, one reader thread, and an inline read for the request path.

The reads that a request waits for (`session`, `beginning`, `standing`) are point reads from pages that SQLite has
cached: some ten microseconds, less than handing them to a thread would cost. Everything else runs in a thread of its
own; `gateway.store.writer` is the one that writes.
"""

import asyncio
import math
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gateway.errors import StartError
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
    Turn,
    Window,
)
from gateway.store import (
    autofreeze_rows,
    manifest_rows,
    response_rows,
    salt_rows,
    secret_rows,
    session_rows,
    successor_rows,
    text_rows,
    transcript_rows,
    window_rows,
)
from gateway.store.ballast import PART_BYTES, Ballast, Reserve
from gateway.store.connect import connect
from gateway.store.damage import REMEDY, is_damage
from gateway.store.failures import read_failure
from gateway.store.schema import migrate
from gateway.store.types import OrphanedSalt, Released, SaltNote, SaltUse, Text, TurnRecord, Unfrozen, WindowQuery
from gateway.store.writer import Work, Writer

T = TypeVar("T")
_FORGOTTEN_AT_ONCE = 50  # sessions; a finished turn may wait that long for the writer


class SqliteStore:
    """See `gateway.store.types.Store`."""

    def __init__(self, path: Path, *, turns_kept: int, responses_kept: int = 10_000) -> None:
        self._path = path
        self._turns_kept = turns_kept
        self._responses_kept = responses_kept
        self._ballast = Ballast(path)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer = Writer(path, partial(connect, path), self._ballast)
        self.store_id = ""

    async def __aenter__(self) -> "SqliteStore":
        """Open the database and bring its schema up to date. Raises StartError."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open_on_any_disk()
        except (OSError, sqlite3.DatabaseError) as error:
            raise StartError(f"the store {self._path} cannot be opened: {error}{self._remedy(error)}") from error
        self._ballast.restore()
        self._writer.start()
        return self

    def _open_on_any_disk(self) -> None:
        """Open it; where the disk is full, use up what was set aside for that, part by part."""
        for part in (Reserve.TURNS, Reserve.DELETIONS):
            try:
                return self._open()
            except (OSError, sqlite3.DatabaseError):
                if not (self._no_room() and self._ballast.give_up(part)):
                    raise
        return self._open()

    def _remedy(self, error: Exception) -> str:
        if is_damage(error):
            return f"; {REMEDY}"
        return f"; its disk is full: free {2 * PART_BYTES >> 20} MiB there" if self._no_room() else ""

    def _no_room(self) -> bool:
        return self._path.parent.is_dir() and self._ballast.free_bytes < PART_BYTES // 4

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        self._inline = connect(self._path)
        migrate(self._inline)
        (self.store_id,) = self._inline.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
        self._slow = connect(self._path)

    async def __aexit__(self, *_: object) -> None:
        await self._writer.stop()
        self._reader.shutdown()
        self._slow.close()
        self._inline.close()

    async def session(self, tenant: str, session_id: str) -> Session | None:
        """See `Store.session`."""
        return self._read_inline(lambda db: session_rows.session(db, tenant, session_id))

    async def sessions_by_prefix(self, tenant: str, links: Sequence[bytes]) -> tuple[bytes | None, list[Session]]:
        """See `Store.sessions_by_prefix`."""
        return self._read_inline(lambda db: session_rows.beginning(db, tenant, links))

    async def sessions_by_reply_alias(self, tenant: str, names: Sequence[Alias]) -> list[Known]:
        """See `Store.sessions_by_reply_alias`."""
        return self._read_inline(lambda db: session_rows.standing(db, tenant, names))

    async def list_sessions(
        self, tenant: str, *, state: SessionState | None, model: str | None, limit: int, offset: int,
        expired_by: float = 0.0,
    ) -> tuple[list[Session], int]:  # fmt: skip
        """See `Store.list_sessions`."""
        return await self._read(
            lambda db: session_rows.list_sessions(db, tenant, state, model, limit, offset, expired_by)
        )

    async def snapshot(self, tenant: str, session_id: str) -> tuple[Session, Text] | None:
        """See `Store.snapshot`."""
        return await self._read(lambda db: text_rows.snapshot(db, tenant, session_id))

    async def add_session(self, session: Session, *, source: Window | None = None) -> bool:
        """See `Store.add_session`."""
        return await self.add_sessions([session], source=source) is None

    async def add_sessions(self, sessions: Sequence[Session], *, source: Window | None = None) -> str | None:
        """See `Store.add_sessions`."""
        return await self._write(lambda db: text_rows.add_sessions(db, sessions, source))

    async def delete_session(self, tenant: str, session_id: str, *, idle_since: float | None = None) -> bool:
        """See `Store.delete_session`."""
        return await self._delete(lambda db: session_rows.delete_session(db, tenant, session_id, idle_since))

    async def forget_idle(self, keep: int) -> int:
        """See `Store.forget_idle`."""
        forgotten = 0
        while some := await self._delete(lambda db: session_rows.forget_idle(db, keep, _FORGOTTEN_AT_ONCE)):
            forgotten += some
        return forgotten

    async def idle_sessions(self, since: float, limit: int) -> list[tuple[str, str]]:
        """See `Store.idle_sessions`."""
        return await self._read(lambda db: session_rows.idle_sessions(db, since, limit))

    async def salts_of(self, tenant: str, session_id: str) -> list[str]:
        """See `Store.salts_of`."""
        return await self._read(lambda db: salt_rows.of_session(db, tenant, session_id))

    async def salt_uses(self) -> list[SaltUse]:
        """See `Store.salt_uses`."""
        return await self._read(salt_rows.uses)

    async def salt_in_use(self, salt: str) -> bool:
        """See `Store.salt_in_use`."""
        return await self._read(lambda db: salt_rows.in_use(db, salt))

    async def orphaned_salts(self) -> list[OrphanedSalt]:
        """See `Store.orphaned_salts`."""
        return await self._read(salt_rows.loose)

    async def mark_orphaned(self, salt: str, tenant: str, lineage: str) -> None:
        """See `Store.mark_orphaned`."""
        await self._delete(lambda db: salt_rows.loosen(db, salt, tenant, lineage))

    async def note_salts(self, notes: Sequence[SaltNote]) -> None:
        """See `Store.note_salts`."""
        await self._write(lambda db: salt_rows.note(db, notes))

    async def clear_orphan(self, gone: OrphanedSalt) -> None:
        """See `Store.clear_orphan`."""
        await self._delete(lambda db: salt_rows.settle(db, gone))

    async def held_under(self, salt: str) -> set[ObjectKey]:
        """See `Store.held_under`."""
        return await self._read(lambda db: manifest_rows.held_under(db, salt))

    async def check(self) -> None:
        """See `Store.check`."""
        await self._write(_touch)
        await asyncio.to_thread(self._ballast.restore)

    async def newest(self) -> float | None:
        """See `Store.newest`."""
        return await self._read(session_rows.newest)

    async def known_secret(self) -> tuple[str | None, bool]:
        """See `Store.known_secret`."""
        return await self._read(secret_rows.known)

    async def remember_secret(self, mark: str) -> None:
        """See `Store.remember_secret`."""
        await self._write(lambda db: secret_rows.remember(db, mark))

    async def record(self, finished: Sequence[TurnRecord], *, last: bool = False) -> None:
        """See `Store.record`."""
        await self._write(lambda db: self._record(db, finished), Reserve.DELETIONS if last else Reserve.TURNS)

    def _record(self, db: sqlite3.Connection, finished: Sequence[TurnRecord]) -> None:
        session_rows.record(db, finished, self._turns_kept)
        response_rows.record(db, finished, self._responses_kept)

    async def turns(self, tenant: str, session_id: str, limit: int) -> list[Turn]:
        """See `Store.turns`."""
        return await self._read(lambda db: session_rows.turns(db, tenant, session_id, limit))

    async def response(self, tenant: str, response_id: str) -> StoredResponse | None:
        """See `Store.response`."""
        return await self._read(lambda db: response_rows.find(db, tenant, response_id))

    async def response_items(self, tenant: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See `Store.response_items`."""
        return await self._read(lambda db: response_rows.items(db, tenant, ids))

    async def delete_response(self, tenant: str, response_id: str) -> bool:
        """See `Store.delete_response`."""
        return await self._delete(lambda db: response_rows.delete(db, tenant, response_id))

    async def messages(self, transcript: bytes) -> list[Message]:
        """See `Store.messages`."""
        return await self._read(lambda db: transcript_rows.messages(db, transcript))

    async def frame(self, frame: bytes) -> Mapping[str, object]:
        """See `Store.frame`."""
        return await self._read(lambda db: transcript_rows.content(db, frame))

    async def window(self, tenant: str, name: str) -> Window | None:
        """See `Store.window`."""
        return self._read_inline(lambda db: window_rows.window(db, tenant, name))

    async def list_windows(self, tenant: str, query: WindowQuery) -> tuple[list[Window], int]:
        """See `Store.list_windows`."""
        return await self._read(lambda db: window_rows.list_windows(db, tenant, query))

    async def lineage(self, tenant: str, name: str) -> tuple[list[str], list[str]]:
        """See `Store.lineage`."""
        return await self._read(lambda db: window_rows.lineage(db, tenant, name))

    async def add_window(
        self, window: Window, manifest: Manifest, text: Text, *, seen: Session | None = None, wanted: bool = True
    ) -> Window | None:
        """See `Store.add_window`."""
        return await self._write(lambda db: text_rows.add_window(db, window, manifest, text, seen, wanted=wanted))

    async def copy_window(self, copy: Window, source: Window, manifest: Manifest | None) -> Window | None:
        """See `Store.copy_window`."""
        return await self._write(lambda db: text_rows.copy_window(db, copy, source, manifest))

    async def text(self, window: Window) -> Text:
        """See `Store.text`."""
        return await self._read(lambda db: text_rows.text(db, window))

    async def check_there(self, window: Window) -> None:
        """See `Store.check_there`."""
        self._read_inline(lambda db: text_rows.check_there(db, window))

    async def windows_without_text(self) -> list[tuple[str, str]]:
        """See `Store.windows_without_text`."""
        return await self._read(text_rows.windows_without_text)

    async def describe_window(self, tenant: str, name: str, changes: Mapping[str, Any]) -> Window | None:
        """See `Store.describe_window`."""
        return await self._write(lambda db: window_rows.describe_window(db, tenant, name, changes))

    async def manifest(self, window: Window) -> Manifest:
        """See `Store.manifest`."""
        return await self._read(lambda db: manifest_rows.manifest(db, window))

    async def sizes(self, window: Window) -> Sizes:
        """See `Store.sizes`."""
        return await self._read(lambda db: manifest_rows.sizes(db, window))

    async def pinned(self, window: Window) -> tuple[PinnedObject, ...]:
        """See `Store.pinned`."""
        return await self._read(lambda db: manifest_rows.pinned(db, window))

    async def delete_window(
        self, tenant: str, name: str, *, expired_by: float | None = None, automatic_of: str | None = None
    ) -> Released | None:
        """See `Store.delete_window`."""
        return await self._delete(lambda db: window_rows.delete_window(db, tenant, name, expired_by, automatic_of))

    async def expired_windows(self, by: float, limit: int) -> list[Window]:
        """See `Store.expired_windows`."""
        return await self._read(lambda db: window_rows.expired_windows(db, by, limit))

    async def objects(self, keys: Sequence[ObjectKey]) -> list[PinnedObject]:
        """See `Store.objects`."""
        return await self._read(lambda db: manifest_rows.objects(db, keys))

    async def held_bytes(self, tenant: str, more: Sequence[PinnedObject]) -> int:
        """See `Store.held_bytes`."""
        return await self._read(lambda db: manifest_rows.held_bytes(db, tenant, more))

    async def held_objects(self) -> set[ObjectKey]:
        """See `Store.held_objects`."""
        return await self._read(manifest_rows.held_objects)

    async def isolated_names(self) -> set[ObjectKey]:
        """See `Store.isolated_names`."""
        return await self._read(manifest_rows.isolated_names)

    async def succeed(self, step: Succession, new: Session, *, seen: Session) -> Succession:
        """See `Store.succeed`."""
        return await self._write(lambda db: text_rows.succeed(db, step, new, seen))

    async def successions(self, tenant: str, session_id: str) -> list[Succession]:
        """See `Store.successions`."""
        return await self._read(lambda db: successor_rows.successions(db, tenant, session_id))

    async def lineage_in_use(self, tenant: str, lineage: str) -> bool:
        """See `Store.lineage_in_use`."""
        return await self._read(lambda db: session_rows.lineage_in_use(db, tenant, lineage))

    async def window_counts(self) -> dict[str, int]:
        """See `Store.window_counts`."""
        return await self._read(window_rows.window_counts)

    async def tier_usage(self) -> dict[str, tuple[int, int]]:
        """See `Store.tier_usage`."""
        return await self._read(manifest_rows.tier_usage)

    async def unfrozen(self, since: float, before: tuple[float, str, str] | None, limit: int) -> list[Unfrozen]:
        """See `Store.unfrozen`."""
        return await self._read(lambda db: autofreeze_rows.unfrozen(db, since, before, limit))

    async def unfrozen_sessions(self, keys: Collection[tuple[str, str]]) -> list[Unfrozen]:
        """See `Store.unfrozen_sessions`."""
        return await self._read(lambda db: autofreeze_rows.unfrozen_sessions(db, keys))

    async def claim_freeze(
        self, seen: Session, *, now: float, until: float, cool: bool, latest: float = math.inf
    ) -> bool:
        """See `Store.claim_freeze`."""
        return await self._write(lambda db: autofreeze_rows.claim(db, seen, now, until, latest, cool=cool))

    async def report_freeze(self, seen: Session, *, window: str | None, not_before: float) -> None:
        """See `Store.report_freeze`."""
        await self._write(lambda db: autofreeze_rows.report(db, seen, window, not_before))

    async def uncover(self, seen: Session) -> None:
        """See `Store.uncover`."""
        await self._write(lambda db: autofreeze_rows.uncover(db, seen))

    async def auto_windows(self, tenant: str, session_id: str) -> list[str]:
        """See `Store.auto_windows`."""
        return await self._read(lambda db: autofreeze_rows.auto_windows(db, tenant, session_id))

    async def auto_freeze(self) -> str | None:
        """See `Store.auto_freeze`."""
        return await self._read(autofreeze_rows.rules)

    async def set_auto_freeze(self, rules: str | None) -> None:
        """See `Store.set_auto_freeze`."""
        await self._write(lambda db: autofreeze_rows.set_rules(db, rules))

    def _read_inline(self, work: Work[T]) -> T:
        try:
            return work(self._inline)
        except sqlite3.DatabaseError as error:
            raise read_failure(self._path, error) from error

    async def _read(self, work: Work[T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, _whole, self._slow, work)
        except sqlite3.DatabaseError as error:
            raise read_failure(self._path, error) from error

    async def _delete(self, work: Work[T]) -> T:
        return await self._write(work, Reserve.DELETIONS)

    async def _write(self, work: Work[T], reserve: Reserve = Reserve.NONE) -> T:
        return await self._writer.write(work, reserve)


def _touch(db: sqlite3.Connection) -> None:
    # The value has to be another each time: SQLite writes no page that would stay as it is.
    db.execute("INSERT OR REPLACE INTO meta VALUES ('checked_at', ?)", (str(time.time_ns()),))


def _whole(db: sqlite3.Connection, work: Work[T]) -> T:
    """All that a call reads it reads from one moment, however many statements that takes."""
    db.execute("BEGIN")
    try:
        return work(db)
    finally:
        db.execute("ROLLBACK")  # there is nothing to commit, and of a damaged file a COMMIT fails

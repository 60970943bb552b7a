"""The operations of the store. Each is atomic; its SQL and its docstring are in `*_rows.py`.

Names of sessions and windows are unique within a tenant. A database is a subclass that runs the operations
(`gateway.store.sqlite`); if its SQL has to differ, it overrides that operation.
"""

import asyncio
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import ParamSpec, TypeVar

from gateway.records import Sizes, Window
from gateway.store import (
    autofreeze_rows,
    claim_rows,
    drain_rows,
    gateway_rows,
    ledger_rows,
    listed_rows,
    manifest_rows,
    open_turn_rows,
    record_rows,
    response_rows,
    rewind_rows,
    salt_rows,
    savings_rows,
    search_rows,
    session_rows,
    successor_rows,
    text_rows,
    title_rows,
    transcript_rows,
    window_rows,
)
from gateway.store.ballast import Reserve
from gateway.store.database import Database, Db, Method, Operation, delete, passing, point_read, read, read_after, write
from gateway.store.sql import set_meta
from gateway.store.types import Member, Peer, Saved, StoreCheck, StoreUnavailable, TurnRecord

P = ParamSpec("P")
T = TypeVar("T")
_FORGET_BATCH = 50  # sessions; finished turns wait for the writer meanwhile
_INDEXED_AT_ONCE = 100  # messages, likewise
_BETWEEN_S = 0.05  # two batches, so that the turns that wait are recorded first
_RETRY_S = 5.0  # between two attempts while the store cannot be written
_GATHER_S = 1.0  # how long turns are gathered before they are indexed
_FEW_OBJECTS = 32  # of a window: reading them costs less than handing that to a thread
_TITLES_BATCH = 20  # sessions or windows, likewise


def _ledger_read(operation: Operation[P, T]) -> Method[P, T]:
    """Make a method of an operation that reads the ledger, with all turns."""
    return read_after(operation, ledger_rows.has_unbooked, ledger_rows.book_turns)


class Store(Database):
    """The operations. Keeps the last `turns_kept` of each session, and the last `responses_kept` of each tenant."""

    def __init__(self, *, turns_kept: int, responses_kept: int) -> None:
        self._turns_kept = turns_kept
        self._responses_kept = responses_kept
        self._recorded = asyncio.Event()

    reads_wait = False
    """Whether a point read waits for a server, so that something may happen between two of them."""

    @abstractmethod
    async def __aenter__(self) -> "Store":
        """Open it, and bring its schema up to date. Raises StartError."""

    @abstractmethod
    async def __aexit__(self, *_: object) -> None:
        """Close it, once all waiting writes are done."""

    # Sessions and their turns.

    session = point_read(session_rows.session)
    sessions_by_prefix = point_read(session_rows.sessions_by_prefix)
    sessions_by_reply_alias = point_read(session_rows.sessions_by_reply_alias)
    list_sessions = read(session_rows.list_sessions)
    listed_sessions = _ledger_read(listed_rows.listed_sessions)
    idle_sessions = read(session_rows.idle_sessions)
    sessions_beside = read(session_rows.sessions_beside)
    active_session = read(session_rows.active_session)
    newest = read(session_rows.newest)
    turns = read(session_rows.turns)
    snapshot = read(text_rows.snapshot)
    add_sessions = write(text_rows.add_sessions)
    rewind_session = write(rewind_rows.rewind_session)
    delete_session = delete(session_rows.delete_session)
    succeed = write(text_rows.succeed)
    successions = read(successor_rows.successions)

    async def record(self, records: Sequence[TurnRecord], *, last: bool = False) -> None:
        """Record finished turns; each creates its session if it is new, and extends its transcript.

        On a full disk turns use up part of the space set aside, the `last` ones all of it. Raises StoreUnavailable: the
        same turns can be recorded later.
        """

        async def work(db: Db) -> None:
            await db.lock(record_rows.lock_names(records))
            recorded = await record_rows.record(db, records, self._turns_kept)
            await response_rows.record(db, recorded, self._responses_kept)
            await ledger_rows.record(db, recorded)

        await self.run_write(work, Reserve.DELETIONS if last else Reserve.TURNS, shared=True)
        self._recorded.set()

    async def forget_idle(self, keep: int) -> int:
        """Delete the sessions beyond `keep` that have been idle longest; return how many."""
        total = 0
        while count := await self._forget_some(keep, _FORGET_BATCH):
            total += count
        return total

    _forget_some = delete(session_rows.forget_idle)

    async def fill_in_titles(self) -> None:
        """Give a title to the sessions and windows of an older version. Several processes may do so at once."""
        while await self._when_writable(lambda: self._fill_in_some(_TITLES_BATCH)):
            pass

    _fill_in_some = write(title_rows.fill_in)

    # Salts, and the secret that they are made with.

    salts_of = read(salt_rows.salts_of)
    salt_uses = read(salt_rows.salt_uses)
    salt_in_use = read(salt_rows.salt_in_use)
    orphaned_salts = read(salt_rows.orphaned_salts)
    mark_orphaned = delete(salt_rows.mark_orphaned)
    note_salts = write(salt_rows.note_salts)
    clear_orphan = delete(salt_rows.clear_orphan)
    known_secret = read(salt_rows.known_secret)
    remember_secret = write(salt_rows.remember_secret)

    # Transcripts and stored responses.

    messages = read(transcript_rows.messages)
    frame = read(transcript_rows.frame)
    response = read(response_rows.response)
    response_items = read(response_rows.response_items)
    delete_response = delete(response_rows.delete_response)

    # Windows.

    window = point_read(window_rows.window)
    check_exists = point_read(text_rows.check_exists)
    list_windows = read(window_rows.list_windows)
    listed_windows = read(listed_rows.listed_windows)
    ancestors = read(window_rows.ancestors)
    lineage = read(window_rows.lineage)
    text = read(text_rows.text)
    transcript_until = read(text_rows.transcript_until)
    begins_with = read(text_rows.begins_with)
    add_window = write(text_rows.add_window)
    copy_window = write(text_rows.copy_window)
    describe_window = write(window_rows.describe_window)
    delete_window = delete(window_rows.delete_window)
    expired_windows = read(window_rows.expired_windows)
    windows_without_text = read(text_rows.windows_without_text)
    window_counts = read(window_rows.window_counts)

    # Full-text search.

    search_windows = read(search_rows.search_windows)
    search = read(search_rows.search)
    best_windows = read(search_rows.best_windows)

    async def keep_searchable(self) -> None:
        """Index messages soon after they are recorded, until it is cancelled. Several processes may do so at once."""
        while True:
            if await self._when_writable(lambda: self._index_some(_INDEXED_AT_ONCE)):
                await asyncio.sleep(_BETWEEN_S)
                continue
            await self._recorded.wait()
            await asyncio.sleep(_GATHER_S)
            self._recorded.clear()

    async def _index_some(self, at_once: int) -> bool:
        return await self.run_write(lambda db: db.words.index_some(db, at_once), shared=True)

    # The KV objects that windows hold.

    manifest = read(manifest_rows.manifest)
    sizes = read(manifest_rows.sizes)

    async def sizes_and_saved(self, window: Window) -> tuple[Sizes, Saved]:
        """Return the bytes of a window's objects, and what it has saved. Raises `window_not_found` if it is deleted."""
        run = self.run_inline if window.chunk_count * window.world_size <= _FEW_OBJECTS else self.run_read
        return await run(lambda db: listed_rows.sizes_and_saved(db, window))

    pinned = read(manifest_rows.pinned)
    objects = read(manifest_rows.objects)
    held_bytes = read(manifest_rows.held_bytes)
    held_objects = read(manifest_rows.held_objects)
    held_under = read(manifest_rows.held_under)
    isolated_names = read(manifest_rows.isolated_names)
    tier_usage = read(manifest_rows.tier_usage)

    # The gateways that share the store: their leases, their claims on objects, and their turns in flight.

    join_gateways = passing(gateway_rows.join)
    bury_gateways = passing(gateway_rows.bury)
    has_lease = read(gateway_rows.has_lease)
    take_lease = passing(gateway_rows.take_lease)
    drop_lease = passing(gateway_rows.drop_lease)
    claim = passing(claim_rows.claim)
    claim_everything = passing(claim_rows.claim_everything)
    claim_removal = passing(claim_rows.claim_removal)
    end_claim = passing(claim_rows.end_claim)
    add_claimed_window = write(claim_rows.add_window)
    delete_claimed_window = delete(claim_rows.delete_window)
    any_dead_claims = read(claim_rows.any_dead)
    take_over_claims = passing(claim_rows.take_over)
    open_turns_elsewhere = point_read(open_turn_rows.elsewhere)
    any_open_turn_elsewhere = point_read(open_turn_rows.any_elsewhere)
    ended_batches_elsewhere = point_read(open_turn_rows.ended)

    async def renew_gateway(self, member: Member) -> list[Peer] | None:
        """See `gateway_rows.renew`."""
        return await self.run_write(lambda db: gateway_rows.renew(db, member), shared=True, durable=False)

    async def write_open_turns(self, gateway: str, new: Sequence[tuple[bytes, bool]], old: Sequence[bytes]) -> None:
        """See `open_turn_rows.write`."""
        await self.run_write(lambda db: open_turn_rows.write(db, gateway, new, old), shared=True)

    # Automatic freezing.

    unfrozen = read(autofreeze_rows.unfrozen)
    freeze_candidates = read(autofreeze_rows.freeze_candidates)
    claim_freeze = write(autofreeze_rows.claim_freeze)
    report_freeze = write(autofreeze_rows.report_freeze)
    lower_covered_tokens = write(autofreeze_rows.lower_covered_tokens)
    auto_windows = read(autofreeze_rows.auto_windows)
    auto_freeze = read(autofreeze_rows.auto_freeze)
    set_auto_freeze = write(autofreeze_rows.set_auto_freeze)

    # Drained engines.

    drained = read(drain_rows.drained)
    drain = write(drain_rows.drain)
    undrain = write(drain_rows.undrain)

    # What the cache has saved, and what holding KV costs.

    book = write(ledger_rows.book)
    saved = _ledger_read(savings_rows.saved)
    saved_by_source = _ledger_read(savings_rows.saved_by_source)
    saved_since = _ledger_read(savings_rows.saved_since)
    saved_by_tenants = _ledger_read(savings_rows.saved_by_tenants)
    most_saved = _ledger_read(savings_rows.most_saved)
    prefill_curves = _ledger_read(savings_rows.prefill_curves)
    hold = write(savings_rows.hold)
    held_kv = read(savings_rows.held_kv)

    # The store itself.

    async def _when_writable(self, write: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a write that can wait until the store can be written."""
        while True:
            try:
                return await write()
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_S)

    async def numbers_given(self, numbered: Sequence[tuple[str, str]]) -> None:
        """Rows were added to these tables with numbers (in a column) that were given elsewhere."""

    @abstractmethod
    async def examine(self) -> StoreCheck:
        """Look for damage, and for what will soon be short. May take seconds."""

    async def check(self) -> None:
        """Write something. Raises StoreUnavailable if that fails."""
        # A different value each time: SQLite writes no page that does not change.
        await self.run_write(lambda db: set_meta(db, "checked_at", str(time.time_ns())), shared=True)

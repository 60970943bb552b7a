"""Register temporary salts up front, so that a crash leaves their KV to the sweeper.

A turn is recorded when it is over, and a request that passes through never is. If the gateway were killed meanwhile,
the KV that the engine has stored for it would never be removed. So the salt is noted when the work begins: as orphaned,
which the next sweep checks when the work is over, or as another salt of an existing session. Requests do not wait for
their notes. These are written some milliseconds later, many at once, before the engine can have stored any KV; a turn
that is over before that is recorded about as soon, and its note is withdrawn.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from gateway.records import Session
from gateway.store.store import Store
from gateway.store.types import SaltNote, StoreUnavailable

log = logging.getLogger(__name__)

_GATHER_S = 0.025  # a note is written when it is once to twice as old


class SaltNotes:
    """Writes notes of salts to the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._due: dict[SaltNote, None] = {}
        self._wake = asyncio.Event()

    async def __aenter__(self) -> "SaltNotes":
        self._task = asyncio.create_task(self._run(), name="salt notes")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._write(list(self._due))

    def begin(self, session: Session, salt: str) -> SaltNote | None:
        """Note the salt of a turn that begins; return the note, None if the store has that salt already."""
        if salt == session.salt:
            return None
        note = SaltNote(salt, session.tenant, session.lineage, session.id)
        self.add(note)
        return note

    def withdraw(self, note: SaltNote | None) -> None:
        """Drop a note that has not been written yet."""
        if note is not None:
            self._due.pop(note, None)

    def add(self, note: SaltNote) -> None:
        """Note a salt. Does not block."""
        self._due[note] = None
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            due = list(self._due)
            await asyncio.sleep(_GATHER_S)
            await self._write([note for note in due if note in self._due])

    async def _write(self, notes: Sequence[SaltNote]) -> None:
        for note in notes:
            del self._due[note]
        if not notes:
            return
        try:
            await self._store.note_salts(notes)
        except StoreUnavailable as error:
            # A full disk, say. The turns are recorded all the same, unless the gateway is killed first.
            log.warning("could not note %d salts: %s", len(notes), error)
        except Exception:
            log.exception("could not note %d salts", len(notes))

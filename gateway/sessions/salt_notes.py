"""Register temporary salts up front, so that a crash leaves their KV to the sweeper.

A turn is recorded when it is over, and what merely passes through never is. Were the gateway killed meanwhile, nobody
would know whose KV the engine has made, and nobody would ever remove it. So such a salt is noted when the work begins:
as loose, which the next sweep looks at when the work is over, or as another salt of a session that is there already.
Nobody waits for a note. It is written some milliseconds later, with those of others, and no KV can have landed by then;
a turn that is over before that is recorded about as soon, and its note is withdrawn.
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
    """Takes notes of salts to the store."""

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
        """Note the salt of a turn that begins; return the note, None where the store has that salt already."""
        if salt == session.salt:
            return None
        note = SaltNote(salt, session.tenant, session.lineage, session.id)
        self.add(note)
        return note

    def withdraw(self, note: SaltNote | None) -> None:
        """Take back a note that is not written yet."""
        if note is not None:
            self._due.pop(note, None)

    def add(self, note: SaltNote) -> None:
        """Note a salt. Never waits."""
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
            # A full disk, say. The KV is that of turns which are recorded all the same, unless we are killed first.
            log.warning("could not note %d salts: %s", len(notes), error)
        except Exception:
            log.exception("could not note %d salts", len(notes))

"""A gateway's parts before a fake engine, a fake LMCache and its real directory: what a freeze and a thaw need."""

import sqlite3
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.app import open_services
from gateway.kv.keys import ObjectKey
from gateway.records import Session, Turn, Window
from gateway.runtime.progress import Progress, silent
from gateway.sessions import prefix_chain
from gateway.settings import Settings
from gateway.store.types import TurnRecord
from gateway.windows.context import OperationContext, Services
from gateway.windows.freeze import Naming, freeze
from tests.support.fakes.engine import MODEL, FakeEngine, render
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.postgres import store_settings

TENANT = "default"
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hello there, how are you? " * 3},
    {"role": "assistant", "content": "Fine."},
]
IDS = render(MESSAGES, generation_prompt=False)
CHUNKS = len(IDS) // CHUNK


@dataclass(frozen=True, slots=True)
class Cached:
    """The services, the cache behind them, and what they leave in the file system."""

    services: Services
    cache: FakeLMCache

    @property
    def ctx(self) -> OperationContext:
        """The context of an operation that begins now."""
        return OperationContext(self.services, TENANT)

    @property
    def pins(self) -> Path:
        """The directory of our pins."""
        assert self.services.settings.pins_path
        return self.services.settings.pins_path / self.services.store.store_id

    @property
    def pinned(self) -> set[str]:
        """File names of what is pinned."""
        return {path.name for path in self.pins.iterdir()}

    @property
    def claimed(self) -> bool:
        """Whether objects are claimed, so that nothing may unpin them."""
        path = self.services.settings.store_path
        assert path is not None
        with closing(sqlite3.connect(path)) as db:
            return bool(db.execute("SELECT 1 FROM pin_claims").fetchone())

    async def session(
        self, name: str = "s", messages: Sequence[Mapping[str, Any]] = MESSAGES, *, stored: bool = True, **more: Any
    ) -> Session:
        """A session that has had a turn; with `stored` LMCache has what the engine computed for it."""
        model = await self.services.engines.model(MODEL)
        fingerprint = more.pop("fingerprint", model.fingerprint)
        salt = self.services.salts.of(TENANT, name, fingerprint)
        said = [dict(message) for message in messages]
        turn = Turn(TENANT, name, MODEL, "completed", 200, time.time(), 1.0)
        trace = prefix_chain.trace(b"", said[:-1], said[-1], None)
        await self.services.store.record(
            [TurnRecord(turn, Session(TENANT, name, name), fingerprint, salt, said, {}, trace)]
        )
        if stored:
            self.cache.store(render(said[:-1], generation_prompt=True), salt)
        found = await self.services.store.session(TENANT, name)
        assert found is not None
        return found

    async def window(self, name: str = "w", *, session: str = "s", progress: Progress = silent) -> Window:
        """A window of a session, which is created if it does not exist."""
        if await self.services.store.session(TENANT, session) is None:
            await self.session(session)
        ctx = OperationContext(self.services, TENANT, progress)
        return (await freeze(ctx, session, Naming(name))).window

    def keys(self, window: Window) -> list[ObjectKey]:
        """The keys of a window's whole chunks."""
        return self.cache.keys(IDS, window.salt)


@asynccontextmanager
async def opened(engine: FakeEngine, cache: FakeLMCache, folder: Path, **more: Any) -> AsyncIterator[Cached]:
    """The services on what is in `folder`."""
    given = {"cache_url": cache.url, "kv_dir": str(cache.folder), "freeze_timeout_s": 0.3} | more
    settings = Settings(
        engine_urls=(engine.url,), data_dir=str(folder / "own"), **store_settings(folder / "own"), **given
    )
    (folder / "own").mkdir(exist_ok=True)
    async with open_services(settings) as parts:
        yield Cached(parts, cache)

"""An engine for the attack: its answers can be held back or be late, and it stores KV as LMCache would."""

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gateway.kv.keys import object_keys
from loadtests.attack_rig import Engine, Gateway, Ground
from tests.support.fakes.engine import Exchange, render
from tests.support.harness import CHUNK, cache_server

ROOT_MODEL = "org/demo"
_HELD_S = 8.0


class StoringEngine(Engine):
    """Writes an object for each chunk that it is asked for, as LMCache does; answers when it is let."""

    def __init__(self, kv: Path | None = None) -> None:
        self._kv_dir = kv
        self._held: dict[str, threading.Event] = {}
        self._came: dict[str, threading.Event] = {}
        self.object_size = 0  # bytes of an object; 0: a few hundred
        self.late: tuple[random.Random, float] | None = None  # by chance, at most so many seconds
        super().__init__()

    @contextmanager
    def holding(self, path: str) -> Iterator[threading.Event]:
        """Let requests for a path wait until the block ends; the event says that one has come."""
        let_go, came = threading.Event(), threading.Event()
        self._came[path], self._held[path] = came, let_go
        try:
            yield came
        finally:
            del self._held[path]
            let_go.set()

    def keep(self, body: Mapping[str, Any]) -> None:
        """Store the KV of a chat's prompt."""
        self._store(render(body["messages"], generation_prompt=True), body.get("cache_salt"))

    def answer_chat(self, exchange: Exchange) -> None:
        """See FakeEngine."""
        self.keep(exchange.request.json)
        super().answer_chat(exchange)

    def answer_completion(self, exchange: Exchange) -> None:
        """See FakeEngine."""
        body = exchange.request.json
        if isinstance(body["prompt"], list):
            self._store(body["prompt"], body.get("cache_salt"))
        super().answer_completion(exchange)

    def _answer(self, exchange: Exchange) -> None:
        path = exchange.request.path
        if held := self._held.get(path):
            self._came[path].set()
            held.wait(_HELD_S)
        elif self.late and exchange.request.method == "POST":
            threading.Event().wait(self.late[0].uniform(0, self.late[1]))
        super()._answer(exchange)

    def _store(self, ids: list[int], salt: str | None) -> None:
        if self._kv_dir is None or not salt:
            return
        for key in object_keys(ROOT_MODEL, ids, CHUNK, 1, salt):
            file = self._kv_dir / key.file_name
            if not file.exists():
                fresh = file.with_name(f"{file.name}.{threading.get_ident()}.tmp")
                with fresh.open("wb") as out:
                    out.write(str(key).encode() * 4)
                    if self.object_size:
                        out.truncate(self.object_size)
                with suppress(OSError):
                    fresh.replace(file)


def harness(ground: Ground, **settings: object) -> tuple[StoringEngine, Gateway]:
    """An engine that stores, as much of LMCache as a gateway asks, and a gateway before both."""
    kv = ground.folder / "kv"
    kv.mkdir()
    engine = StoringEngine(kv)
    ground.engine(engine)
    cache = ground.enter(cache_server())
    given = {"cache_url": cache, "kv_dir": kv, "busy_wait_s": 1, "sweep_every_s": 2, **settings}
    return engine, ground.gateway(engine.url, **given)


def pinned(ground: Ground) -> set[str]:
    """The hashes of the chunks that are pinned on disk."""
    folder = ground.folder / "kv-pins"
    return {file.name.split("@")[3] for file in folder.rglob("*.data")} if folder.exists() else set()

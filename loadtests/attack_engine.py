"""An engine for the attack: its responses can be held back or delayed, and it stores KV as LMCache would."""

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gateway.kv.keys import object_keys
from loadtests.attack_harness import Engine, Gateway, Testbed
from tests.support.fakes.engine import Exchange, render
from tests.support.harness import CHUNK, cache_server

ROOT_MODEL = "org/demo"
_HELD_S = 8.0


class StoringEngine(Engine):
    """Writes an object for each chunk it computes, as LMCache does; responses can be held back."""

    def __init__(self, kv: Path | None = None) -> None:
        self._kv_dir = kv
        self._held: dict[str, threading.Event] = {}
        self._arrived: dict[str, threading.Event] = {}
        self.object_size = 0  # bytes of an object; 0: a few hundred
        self.random_delay: tuple[random.Random, float] | None = None  # and the maximum in seconds
        super().__init__()

    @contextmanager
    def hold_requests(self, path: str) -> Iterator[threading.Event]:
        """Let requests for a path wait until the block ends; the event says that one has come."""
        released, arrived = threading.Event(), threading.Event()
        self._arrived[path], self._held[path] = arrived, released
        try:
            yield arrived
        finally:
            del self._held[path]
            released.set()

    def store_prompt(self, body: Mapping[str, Any]) -> None:
        """Store the KV of a chat's prompt."""
        self._store(render(body["messages"], generation_prompt=True), body.get("cache_salt"))

    def answer_chat(self, exchange: Exchange) -> None:
        """See FakeEngine."""
        self.store_prompt(exchange.request.json)
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
            self._arrived[path].set()
            held.wait(_HELD_S)
        elif self.random_delay and exchange.request.method == "POST":
            threading.Event().wait(self.random_delay[0].uniform(0, self.random_delay[1]))
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


def start_storing_stack(testbed: Testbed, **settings: object) -> tuple[StoringEngine, Gateway]:
    """Start an engine that stores KV, a fake of LMCache's API, and a gateway in front of both."""
    kv = testbed.folder / "kv"
    kv.mkdir()
    engine = StoringEngine(kv)
    testbed.engine(engine)
    cache = testbed.enter_context(cache_server())
    options = {"cache_url": cache, "kv_dir": kv, "busy_wait_s": 1, "sweep_every_s": 2, **settings}
    return engine, testbed.gateway(engine.url, **options)


def pinned(testbed: Testbed) -> set[str]:
    """Return the hashes of the chunks that are pinned on disk."""
    folder = testbed.folder / "kv-pins"
    return {file.name.split("@")[3] for file in folder.rglob("*.data")} if folder.exists() else set()

"""Several nodes: fake engines, each with a cache beside it, over one directory that all of them share."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.gateway_process import Gateway

Start = Callable[..., Gateway]


@dataclass
class Pair:
    """An engine and the cache of its node."""

    engine: FakeEngine
    cache: FakeLMCache

    def restart_cache(self, **options: Any) -> None:
        """Have the cache come back at its address with nothing in its memory."""
        if self.cache.listening:
            self.cache.stop()
        self.cache = FakeLMCache(self.cache.folder, port=self.cache.port, **options).start().behind(self.engine)


@contextmanager
def pairs(folder: Path, count: int = 2) -> Iterator[list[Pair]]:
    """So many nodes, whose engines and caches a test may stop."""
    made: list[Pair] = []
    for _ in range(count):
        engine = FakeEngine().start()
        made.append(Pair(engine, FakeLMCache(folder / "kv").start().behind(engine)))
    try:
        yield made
    finally:
        for pair in made:
            if pair.engine.listening:
                pair.engine.stop()
            if pair.cache.listening:
                pair.cache.stop()


def entries(nodes: list[Pair], caches: list[FakeLMCache] | None = None) -> str:
    """The setting `engines` of these nodes, as JSON; `caches`, in their order, are others than their own."""
    own = caches or [pair.cache for pair in nodes]
    return json.dumps([{"url": p.engine.url, "cache_url": c.url} for p, c in zip(nodes, own, strict=True)])


def component(gateway: Gateway, name: str) -> dict[str, Any]:
    """What health says of a component."""
    return dict(gateway.http.get(f"/admin/health?component={name}").json()["components"][name])


def states(gateway: Gateway) -> dict[str, str]:
    """The state of each engine."""
    return {one["url"]: one["state"] for one in component(gateway, "engine")["engines"]}


def frozen(gateway: Gateway, session: str) -> str:
    """The window of a new session."""
    assert gateway.chat(session, "hello there, how are you?").status_code == 200
    gateway.turns(session)
    answer = gateway.freeze(session, f"w-{session}")
    assert answer.json()["kv"] == "complete", answer.text
    return f"w-{session}"


def evict(gateway: Gateway, window: str) -> dict[str, Any]:
    """Empty every memory of a window."""
    answer = gateway.http.post(f"/admin/windows/{window}/evict", json={})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def loaded_at(nodes: list[Pair]) -> list[int]:
    """How many loads each cache was asked for."""
    return [len(pair.cache.prefetches) for pair in nodes]


def beside(nodes: list[Pair], engine: str) -> Pair:
    """The node of an engine."""
    return next(pair for pair in nodes if pair.engine.url == engine)

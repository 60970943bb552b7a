"""A harness whose KV can be made, found and counted."""

import time
from pathlib import Path

from gateway.kv.keys import ObjectKey
from gateway.records import Manifest, Session, Window
from gateway.settings import Settings
from gateway.store.types import Text
from gateway.windows.context import OperationContext, Services
from tests.support.fakes.engine import FakeEngine
from tests.support.postgres import store_settings
from tests.support.tier_harness import RedisServer, TierHarness, key, value

TENANT = "default"


SIZE = 5000


def keys_of(salt: str, count: int = 3) -> list[ObjectKey]:
    """Objects of a conversation."""
    return [key(number, salt=salt) for number in range(count)]


class RetentionHarness:
    """The services of a gateway on both tiers, and the tiers' harnesses."""

    def __init__(self, services: Services, rigs: tuple[TierHarness, ...]) -> None:
        self.parts = services
        self.rigs = rigs

    @property
    def ctx(self) -> OperationContext:
        """The context of an operation that begins now."""
        return OperationContext(self.parts, TENANT)

    def stored(self, keys: list[ObjectKey]) -> None:
        """LMCache has written objects to both tiers."""
        for rig in self.rigs:
            for one in keys:
                rig.put(one, value(SIZE))

    def there(self, keys: list[ObjectKey]) -> list[list[ObjectKey]]:
        """Which of them are there, pinned or not, in each tier."""
        return [[one for one in keys if rig.live(one) or rig.pinned(one)] for rig in self.rigs]

    async def session(self, name: str, salt: str, *, lineage: str = "", idle_s: float = 0.0) -> None:
        """A session that had turns under a salt."""
        now = time.time() - idle_s
        session = Session(
            TENANT, name, lineage or name, salt=salt, created_at=now, last_active_at=now, transcript=None
        )  # fmt: skip
        assert await self.parts.store.add_sessions([session]) is None

    async def window(self, name: str, keys: list[ObjectKey], *, expires_at: float | None = None) -> None:
        """A window that holds objects."""
        async with self.parts.claims.keep(keys) as claim:
            by_tier, _ = await self.parts.pins.pin(keys, [])
            objects = tuple(one for tier in by_tier.values() for one in tier.values())
            window = Window(
                TENANT, name, "gone", "l", keys[0].salt, keys[0].salt, "demo", "org/demo", "fp", 1, 48, 16, len(keys),
                SIZE, "complete", b"t", None, f"m-{name}", time.time(), expires_at=expires_at,
            )  # fmt: skip
            manifest = Manifest(window.manifest, (1,) * 48, objects)
            assert await claim.commit(window, manifest, Text([{"role": "user", "content": name}]))


def settings(folder: Path, engine: FakeEngine, redis: RedisServer, **more: object) -> Settings:
    return Settings(
        engine_urls=(engine.url,), data_dir=str(folder / "data"), kv_dir=str(folder / "kv"),
        kv_redis_url=f"redis://127.0.0.1:{redis.port}", **store_settings(folder / "data"), **more,  # type: ignore[arg-type]
    )  # fmt: skip

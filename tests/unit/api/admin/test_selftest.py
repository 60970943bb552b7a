"""The self-test finds what is wrong with a stack: an engine or a tier that leaks, a cache that is not where we look."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.api.health import Health
from gateway.api.selftest import Check, keeps_kv, run
from gateway.kv import message_port
from gateway.kv.cache_pool import CachePool
from gateway.kv.keys import ObjectKey, object_keys
from gateway.kv.lmcache import LMCache
from gateway.kv.pins import Pins
from gateway.kv.tiers.disk import DiskTier
from gateway.records import PinnedObject
from gateway.windows.context import Services
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.harness import CHUNK, GatewayHarness, value
from tests.support.prefix_cache_model import opened

pytestmark = pytest.mark.anyio

Keep = Callable[[ObjectKey, bytes], None]


class SaltlessTier(DiskTier):
    """A directory that finds an object under every salt, as storage would whose names leave the salt out."""

    async def sizes(self, names: Sequence[str]) -> list[int]:
        there = {path.name.rpartition("@")[0]: path.stat().st_size for path in self._kv.iterdir()}
        return [there.get(ObjectKey.parse(name).file_name.rpartition("@")[0], 0) for name in names]


class EvictingTier(DiskTier):
    """A directory whose objects are evicted just before they are pinned."""

    async def pin(self, keys: Sequence[ObjectKey], known: Mapping[str, PinnedObject]) -> list[PinnedObject]:
        await self.drop_original(keys)
        return await super().pin(keys, known)


def storing(engine: FakeEngine, keep: Keep, *, salted: bool = True) -> None:
    """Let the engine store what it computes, as LMCache does; without `salted` under no salt, whatever it was given."""

    def answer(exchange: Exchange) -> None:
        body = exchange.request.json
        if "kv_transfer_params" not in body:
            salt = body["cache_salt"] if salted else ""
            for index, key in enumerate(object_keys("org/demo", body["prompt"], CHUNK, 1, salt)):
                keep(key, value(index))
        engine.answer_completion(exchange)

    engine.on_completion = answer


def to_both(harness: GatewayHarness) -> Keep:
    """Write to disk and Redis."""

    def keep(key: ObjectKey, data: bytes) -> None:
        (harness.kv / key.file_name).write_bytes(data)
        harness.redis.put(key, data)

    return keep


def on_disk(harness: GatewayHarness, tier: DiskTier | None = None) -> Services:
    """The parts with a disk tier alone."""
    return replace(harness.services, pins=Pins((tier or harness.services.pins.tiers[0],)))


async def checked(services: Services) -> dict[str, Check]:
    """What the self-test says, by name."""
    (member,) = services.engines.members
    return {check.name: check for check in await run(services, member, land_s=0.5)}


def failed(checks: dict[str, Check]) -> list[str]:
    """What it found to be wrong."""
    return [name for name, check in checks.items() if check.status == "failed"]


async def test_a_stack_that_keeps_salts_apart_passes_and_nothing_is_left_behind(
    engine: FakeEngine, harness: GatewayHarness
) -> None:
    before = harness.everything()
    storing(engine, to_both(harness))
    checks = await checked(harness.services)
    assert failed(checks) == []
    assert {"disk tier", "disk pins", "redis tier", "redis pins", "isolation"} <= checks.keys()
    assert harness.everything()[:2] == before[:2]


async def test_an_engine_that_finds_kv_under_another_salt_is_found_out(
    engine: FakeEngine, harness: GatewayHarness
) -> None:
    engine.leaks_salts = True
    storing(engine, to_both(harness))
    checks = await checked(harness.services)
    assert failed(checks) == ["isolation"]
    assert "sessions are NOT isolated" in checks["isolation"].message


async def test_a_tier_that_finds_objects_under_another_salt_is_a_leak(
    engine: FakeEngine, harness: GatewayHarness
) -> None:
    storing(engine, to_both(harness))
    disk = SaltlessTier(harness.kv, Path(harness.services.settings.data_dir) / "pins")
    checks = await checked(on_disk(harness, disk))
    assert failed(checks) == ["isolation in the disk tier"]
    assert checks["isolation in the disk tier"].leaks


async def test_a_cache_that_stores_under_no_salt_is_found_out_in_every_tier(
    engine: FakeEngine, harness: GatewayHarness
) -> None:
    storing(engine, to_both(harness), salted=False)
    checks = await checked(harness.services)
    assert failed(checks) == ["disk tier", "redis tier"]
    assert "kv_redis_url" in checks["redis tier"].remedy


async def test_a_cache_that_stores_elsewhere_is_found_out(engine: FakeEngine, harness: GatewayHarness) -> None:
    storing(engine, lambda key, data: None)
    checks = await checked(on_disk(harness))
    assert failed(checks) == ["disk tier"]
    assert checks["disk tier"].message.startswith("0 of 2 objects")
    assert "kv_dir" in checks["disk tier"].remedy


async def test_a_failing_tier_is_a_fault_of_the_tiers_and_not_of_the_isolation(
    engine: FakeEngine, harness: GatewayHarness
) -> None:
    storing(engine, lambda key, data: None)
    async with Health(on_disk(harness)) as health:
        await health.test()
        found = await health.components()
    assert (found["tiers"]["status"], found["isolation"]["status"]) == ("degraded", "healthy")
    assert str(found["tiers"]["message"]).startswith("0 of 2 objects")


async def test_isolation_in_the_tiers_is_not_proved_without_the_cache(harness: GatewayHarness, tmp_path: Path) -> None:
    async with (
        CachePool(lambda url: LMCache(url, 1.0, tmp_path)) as nobody,
        Health(replace(harness.services, cache=nobody)) as health,
    ):
        await nobody.add("http://127.0.0.1:9")
        await health.test()
        found = await health.components("isolation")
    assert found["isolation"]["status"] == "degraded"
    assert "LMCache" in str(found["isolation"]["message"])


async def test_pins_that_cannot_be_made_are_found_out(
    engine: FakeEngine, harness: GatewayHarness, tmp_path: Path
) -> None:
    storing(engine, to_both(harness))
    (tmp_path / "file").touch()
    checks = await checked(on_disk(harness, DiskTier(harness.kv, tmp_path / "file" / "pins")))
    assert failed(checks) == ["disk pins"]
    assert "pins_dir must be writable" in checks["disk pins"].remedy


async def test_objects_removed_before_they_are_pinned_fail_the_check(
    engine: FakeEngine, harness: GatewayHarness, tmp_path: Path
) -> None:
    storing(engine, to_both(harness))
    (tmp_path / "pins").mkdir()
    checks = await checked(on_disk(harness, EvictingTier(harness.kv, tmp_path / "pins")))
    assert failed(checks) == ["disk pins"]
    assert checks["disk pins"].message == "0 of 2 objects could be pinned"


async def test_an_engine_that_reuses_nothing_is_found_out(engine: FakeEngine, harness: GatewayHarness) -> None:
    storing(engine, to_both(harness))
    answer = engine.on_completion

    def forgetful(exchange: Exchange) -> None:
        engine.forget()
        answer(exchange)

    engine.on_completion = forgetful
    assert failed(await checked(harness.services)) == ["cached_tokens"]


async def test_kv_that_could_not_be_tested_is_not_called_lost(harness: GatewayHarness) -> None:
    unreachable, lost, kept = (
        Check("engine", "failed", ""),
        Check("disk pins", "failed", ""),
        Check("redis pins", "ok", ""),
    )
    services, without = harness.services, replace(harness.services, cache=None)
    assert [keeps_kv(services, [unreachable]), keeps_kv(services, [lost]), keeps_kv(services, [lost, kept])] == [
        None, False, True,
    ]  # fmt: skip
    assert keeps_kv(without, [unreachable]) is False


async def test_a_cache_that_reads_no_messages_of_engines_is_found_out(engine: FakeEngine, tmp_path: Path) -> None:
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    try:
        async with opened(engine, cache, tmp_path) as harness, Health(harness.services) as health:
            assert (await checked(harness.services))["cache"].status == "ok"
            assert (await health.components("cache"))["cache"]["status"] == "healthy"
            cache.reads_messages = False
            check = (await checked(harness.services))["cache"]
            assert (check.status, check.message, check.remedy) == ("failed", message_port.ENDED, message_port.RESTART)
            found = (await health.components("cache"))["cache"]
            assert (found["status"], found["message"]) == ("unhealthy", message_port.ENDED)
    finally:
        cache.stop()

"""What a freeze has read is what it commits, whatever happens at the same time: see `tests.support.operations_model`.

`CWG_MODEL_STEPS` sets the number of operations, `CWG_MODEL_SEED` another seed than one of today.
"""

import os
import random
import secrets
from pathlib import Path

import httpx
import pytest

from tests.support import operations_model
from tests.support.fakes.delays import Delays
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.gateway_process import gateway_in_front_of
from tests.support.operations_world import Broken, World

pytestmark = pytest.mark.anyio
STEPS = int(os.environ.get("CWG_MODEL_STEPS", "250"))


@pytest.mark.timeout(300 + STEPS)
@pytest.mark.parametrize("forgets", [False, True], ids=["all sessions kept", "sessions forgotten"])
async def test_what_is_acknowledged_holds_whatever_happens_at_once(
    engine: FakeEngine, tmp_path: Path, *, forgets: bool
) -> None:
    seed = int(os.environ.get("CWG_MODEL_SEED", secrets.randbelow(10**9)))
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    settings = {
        "cache_url": cache.url, "kv_dir": cache.folder, "freeze_timeout_s": 0.5, "busy_wait_s": 2,
        "sweep_every_s": 0.5, "sessions_kept": 2 if forgets else 1000,
        "workers": os.environ.get("CWG_MODEL_WORKERS", "1"),
    }  # fmt: skip
    try:
        with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway:
            Delays(engine, seed)
            async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
                world = World(http, gateway.data_dir, cache.folder, cache, random.Random(seed), forgets)
                try:
                    await operations_model.run(world, STEPS)
                except (Broken, httpx.HTTPError) as broken:
                    last = "\n".join(world.log[-60:])
                    pytest.fail(f"{broken}\nCWG_MODEL_SEED={seed}, after {world.steps} steps:\n{last}\n{gateway.log}")
    finally:
        cache.stop()

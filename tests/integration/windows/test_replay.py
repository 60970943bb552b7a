"""Deep verification and eviction without a real engine: what is exposed, compared and cleaned up."""

from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.kv.keys import object_keys
from gateway.windows.prefetch_evict import Residency, evict
from gateway.windows.verify import verify
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.harness import CHUNK, CHUNKS, IDS, GatewayHarness, value, window

pytestmark = pytest.mark.anyio

TENANT = "default"
WHOLE = CHUNKS * CHUNK


@pytest.fixture
async def harness(harness: GatewayHarness, engine: FakeEngine) -> GatewayHarness:
    """A harness whose engine reads the KV."""
    engine.on_completion = lambda exchange: answer(harness, exchange)
    return harness


def answer(harness: GatewayHarness, exchange: Exchange) -> None:
    """Go on as the KV says that lies under the request's salt: wrong bytes in a chunk change what follows."""
    asked = exchange.request.json
    keys = object_keys("org/demo", IDS, CHUNK, 1, asked["cache_salt"])
    lying = [(harness.kv / key.file_name) for key in keys]
    found = [f.read_bytes() if f.exists() else harness.redis.live(key) for f, key in zip(lying, keys, strict=True)]
    wrong = any(seen is not None and seen != value(index) for index, seen in enumerate(found))
    there = sum(seen is not None for seen in found)
    ids = [100 + wrong * (n > 3) + n for n in range(asked["max_tokens"])]
    likely = [-1.0 - wrong * 0.01] * len(ids)
    tokens = [str(one) for one in ids]
    logprobs = {"tokens": tokens, "token_logprobs": likely, "top_logprobs": [{token: likely[0]} for token in tokens]}
    choice = {"text": "x", "token_ids": ids, "logprobs": logprobs}
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": len(ids),
             "prompt_tokens_details": {"cached_tokens": there * CHUNK}}  # fmt: skip
    exchange.json({"choices": [choice], "usage": usage})


async def test_deep_verify_uses_each_tiers_own_bytes(harness: GatewayHarness) -> None:
    made = await window(harness.services)
    before = harness.everything()
    verdict = await verify(harness.ctx, "w", deep=True)
    assert harness.everything() == before
    assert verdict.ok
    assert verdict.deep is not None
    assert [(one.tier, one.equal, one.cached_tokens, one.first_difference) for one in verdict.deep] == [
        ("disk", True, WHOLE, None), ("redis", True, WHOLE, None),
    ]  # fmt: skip
    assert {one.tokens_compared for one in verdict.deep} == {16}
    key = object_keys(made.model_root, IDS, CHUNK, 1, made.salt)[1]
    pin = f"cwg:{harness.services.store.store_id}:pin:{key}"
    harness.redis.client.set(pin, value(0) + b"x")
    verdict = await verify(harness.ctx, "w", deep=True)
    assert verdict.deep is not None
    disk, redis = verdict.deep
    assert (verdict.ok, disk.equal, redis.equal) == (False, True, False)
    assert redis.first_difference is not None
    assert (redis.first_difference.position, redis.first_difference.expected_token_id) == (4, 104)
    assert redis.first_difference.token_id == 105
    assert redis.largest_logprob_difference == pytest.approx(0.01)
    harness.redis.client.delete(pin)
    (_, redis) = (await verify(harness.ctx, "w", deep=True)).deep or ((), ())
    assert (redis.equal, redis.cached_tokens, redis.first_difference) == (False, WHOLE - CHUNK, None)


@pytest.mark.parametrize("choices", [[], [{}], [{"logprobs": None, "token_ids": [1]}], [{"logprobs": {}}]])
async def test_an_engine_that_tells_too_little_is_named(
    harness: GatewayHarness, engine: FakeEngine, choices: list[dict[str, Any]]
) -> None:
    await window(harness.services)
    engine.on_completion = lambda exchange: exchange.json({"choices": choices})
    with pytest.raises(GatewayError, match="no token ids or no log probabilities: nothing can be compared"):
        await verify(harness.ctx, "w", deep=True)


async def test_interrupted_deep_verify_is_swept(harness: GatewayHarness, engine: FakeEngine) -> None:
    await window(harness.services)
    before = harness.everything()
    engine.on_completion = lambda exchange: exchange.cut()
    with pytest.raises(Exception, match="engine"):
        await verify(harness.ctx, "w", deep=True)
    assert harness.everything() == before


async def test_evict_keeps_what_no_durable_tier_has(harness: GatewayHarness) -> None:
    made = await window(harness.services)
    done = await evict(harness.ctx, "w")
    assert done.tiers == {"cpu": Residency(CHUNKS, 0), "disk": Residency(0, CHUNKS), "redis": Residency(0, CHUNKS)}
    assert (done.objects, done.kept, done.warnings) == (CHUNKS, 0, ())
    last = object_keys(made.model_root, IDS, CHUNK, 1, made.salt)[-1:]
    for tier in harness.services.pins.tiers:
        await tier.remove(last)
    done = await evict(harness.ctx, "w")
    assert (done.tiers["cpu"].before, done.kept) == (CHUNKS - 1, 1)
    assert "in no durable tier" in done.warnings[0]

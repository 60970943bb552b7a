"""Workflows continued another day: gateway, engine and cache were stopped in between, and their memory is gone."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.stack.clients import cwg, mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.stack.restart import across_restart
from tests.stack.tiers import contents, files, hashes
from tests.support.conversations import unbooked, without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
NEXT = {"role": "user", "content": "And then?"}


@dataclass
class Evening:
    """What was frozen, and what was said, before the lights went out."""

    gateway: Gateway
    said: dict[str, list[dict[str, Any]]]

    def whole(self, window: str) -> int:
        """Tokens of a window in whole chunks."""
        return int(mcp(self.gateway, "window_status", window_name=window)["kv_cache"]["block_count"]) * CHUNK


@across_restart
def evening(_: Stack, gateway: Gateway) -> Iterator[Evening]:
    """Three conversations frozen, each through another interface."""
    said = {name: converse(gateway.client(name), name) for name in ("current-session", "today", "slow")}
    description = {"description": "Found the race in the token refresh", "tags": ["debug", "auth"]}
    mcp(
        gateway, "window_freeze", session_id="current-session", window_name="debug-session-jan23", **description
    )  # fmt: skip
    tags = [option for tag in ("daily", "auth", "api") for option in ("--tag", tag)]
    assert cwg(gateway, "freeze", "today", "end-of-day", *tags).returncode == 0
    mcp(gateway, "window_freeze", session_id="slow", window_name="cold")
    yield Evening(gateway, said)


def test_w01_a_window_goes_on_as_often_as_one_likes_and_does_not_change(stack: Stack, evening: Evening) -> None:
    gateway, name = evening.gateway, "debug-session-jan23"
    before = contents(stack, hashes(gateway, name))
    status = mcp(gateway, "window_status", window_name=name, include_blocks=True)
    assert (status["description"], status["tags"]) == ("Found the race in the token refresh", ["debug", "auth"])
    for attempt in range(2):
        thawed = mcp(gateway, "window_thaw", window_name=name)
        receipt = thawed["receipt"]
        assert (receipt["partial"], receipt["prompt_tokens"]) == (False, status["token_count"])
        assert receipt["cached_tokens"] >= evening.whole(name)
        assert receipt["duration_ms"] > 0
        answer = chat(gateway.client(thawed["session_id"]), [NEXT])
        assert answer.usage.prompt_tokens > status["token_count"]
        assert answer.usage.prompt_tokens_details.cached_tokens >= evening.whole(name)
        mcp(gateway, "window_freeze", session_id=thawed["session_id"], window_name=f"went-on-{attempt}")
        kept = without_turns(gateway.http.get(f"/admin/windows/went-on-{attempt}/messages").json()["messages"])
        assert kept[:-1] == [*evening.said["current-session"], NEXT]
    assert unbooked(mcp(gateway, "window_status", window_name=name, include_blocks=True)) == unbooked(status)
    assert contents(stack, hashes(gateway, name)) == before


def test_i1_the_work_of_yesterday_is_found_and_goes_on(evening: Evening) -> None:
    found = cwg(evening.gateway, "list", "--tag", "daily", "--tag", "auth")
    assert (found.returncode, "end-of-day" in found.stdout, "cold" in found.stdout) == (0, True, False)
    thawed = cwg(evening.gateway, "thaw", "end-of-day", "--session", "tomorrow")
    assert thawed.returncode == 0, thawed.stderr
    whole = evening.whole("end-of-day")
    told = dict(re.split(" {2,}", line, maxsplit=1) for line in thawed.stdout.splitlines())
    assert told["cached"].startswith(f"{whole:,} of ")
    assert told["continue at"] == f"{evening.gateway.url}/s/tomorrow/v1"
    answer = chat(evening.gateway.client("tomorrow"), [*evening.said["today"], NEXT])
    assert answer.usage.prompt_tokens_details.cached_tokens >= whole


def test_w11_a_cold_window_is_moved_up_before_it_is_used(stack: Stack, evening: Evening) -> None:
    gateway, mine = evening.gateway, hashes(evening.gateway, "cold")
    salt = gateway.thaw("cold")["cache_salt"]
    for file in files(stack, mine, pins=False):
        file.unlink()
    cache = mcp(gateway, "window_status", window_name="cold")["kv_cache"]
    assert (cache["storage_tier"], cache["tiers"]["disk"]["present"]) == ("redis", 0)
    assert _drop_from_memory(stack, mine, salt) == 0
    receipt = mcp(gateway, "window_prefetch", window_name="cold")["receipt"]
    assert receipt["chunks_prefetched"] == receipt["chunks_found"] == receipt["chunks_relinked"] == len(mine)
    assert not receipt["partial"]
    assert mcp(gateway, "window_status", window_name="cold")["kv_cache"]["storage_tier"] == "disk"
    assert _drop_from_memory(stack, mine, salt) == len(mine)
    # Dropped again from memory, it is still used without being computed: from the tiers, at the first request.
    session = mcp(gateway, "window_thaw", window_name="cold", warm_cache=False)["session_id"]
    usage = chat(gateway.client(session), [NEXT], max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens >= evening.whole("cold")


def _drop_from_memory(stack: Stack, wanted: list[str], salt: str) -> int:
    """Take chunks out of LMCache's memory; it tells how many it had."""
    key = {"model_name": stack.plan.model.key, "kv_rank": 0x01000100, "object_group_id": 0, "cache_salt": salt}
    body = {"keys": [{**key, "chunk_hash_hex": one} for one in wanted], "tier": "l1", "force": True}
    return int(httpx.request("DELETE", f"{stack.plan.cache_url}/cache/objects", json=body).json()["deleted"])
